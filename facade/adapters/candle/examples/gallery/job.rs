//! What all examples of the gallery are asked: on how many processes, how, and from which seed.

use std::{path::PathBuf, time::Instant};

use fabric::{Builder, Fabric, Result};
use serde_json::{Value, json};

/// Where and how an example runs.
#[derive(clap::Args, Clone)]
pub struct Job {
    /// auto, cpu, or cuda (or gpu) in a build with --features cuda
    #[arg(long, default_value = "auto")]
    pub accelerator: String,
    /// Processes: a number, or "auto"
    #[arg(long, default_value = "2")]
    pub devices: String,
    /// single, ddp, zero1, zero2, fsdp, hsdp or auto
    #[arg(long, default_value = "auto")]
    pub strategy: String,
    /// 32-true, 64-true, bf16-true, 16-true, bf16-mixed or 16-mixed; candle multiplies small types slowly on a CPU
    #[arg(long, default_value = "32-true")]
    pub precision: String,
    /// The seed of everything that is drawn
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The folder for what the run leaves behind
    #[arg(long)]
    out: Option<PathBuf>,
}

impl Job {
    pub fn builder(&self) -> Builder {
        Fabric::builder()
            .accelerator(&self.accelerator)
            .devices(&self.devices)
            .strategy(&self.strategy)
            .precision(&self.precision)
            .state_dict_type("full")
    }

    /// The folder of the example `name`.
    pub fn out(&self, name: &str) -> PathBuf {
        let usual = || PathBuf::from("out").join(name);
        self.out.clone().unwrap_or_else(usual)
    }
}

/// A line for whoever watches, once for the job; standard output is for the report.
pub fn tell(fabric: &Fabric, text: impl std::fmt::Display) {
    if fabric.is_global_zero() {
        eprintln!("{text}");
    }
}

/// The last line on standard output: `results`, and how they came about.
pub fn report(fabric: &Fabric, started: Instant, mut results: Value) -> Result<()> {
    results["device"] = json!(fabric.device().to_string());
    results["world_size"] = json!(fabric.world_size());
    results["strategy"] = json!(fabric.strategy());
    results["precision"] = json!(fabric.precision().to_string());
    results["seconds"] = json!((started.elapsed().as_secs_f64() * 10.0).round() / 10.0);
    fabric.print(results);
    Ok(())
}
