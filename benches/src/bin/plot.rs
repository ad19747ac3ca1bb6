//! Bus bandwidth over size as an SVG, from what `coll -J` or `benches/peers/run --out` wrote.
//!
//! `cargo run --release -p fabric-benches --bin plot -- out.svg a.json b.json`

use std::{fs, path::PathBuf};

use clap::Parser;
use fabric_benches::coll::{plot, report::Report};
use serde_json::Value;

/// Draw bus bandwidth over size.
#[derive(Parser)]
struct Args {
    /// The SVG to be written.
    svg: PathBuf,
    /// Files of `coll -J`, or of benches/peers/run --out.
    #[arg(required = true)]
    json: Vec<PathBuf>,
    /// From files of benches/peers/run: this collective.
    #[arg(long, default_value = "all_reduce")]
    collective: String,
    /// And this number of ranks.
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// What stands above.
    #[arg(long, default_value = "Bus bandwidth over size")]
    title: String,
}

fn main() -> fabric::Result<()> {
    let args = Args::parse();
    let mut lines = Vec::new();
    for path in &args.json {
        let json: Value = serde_json::from_slice(&fs::read(path)?)?;
        if json.get("cells").is_some() {
            lines.extend(plot::peer_lines(&json, &args.collective, args.ranks));
        } else {
            lines.extend(plot::lines(&serde_json::from_value::<Report>(json)?));
        }
    }
    let svg = plot::draw(&lines, &args.title)
        .ok_or_else(|| fabric::Error::new("there is nothing to plot in these files"))?;
    Ok(fs::write(&args.svg, svg)?)
}
