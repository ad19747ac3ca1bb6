//! A training step of 67 million parameters in 16 blocks under every strategy, beside torch's over gloo in the same run.
//!
//! `cargo run --release -p fabric-benches --bin step -- --ranks 2 --torch python3` (without `--torch` ours alone). What is
//! compared is the time beyond computing, because the model is computed by different code: a step, less the forward and
//! backward of the model alone on every rank at once. Ranks are processes of one thread each. Times are the best of the
//! rounds' medians.

use std::{
    fs,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use clap::Parser;
use fabric::{
    Fabric, Result,
    engine::{clock::Clock, kernels, shard::plan::Options},
    model::{Backward, Model, ParamId},
    optim::AdamW,
    vec::{Block, Chain, Dense, Link, VecModel},
};
use fabric_benches::{Nobody, beside};
use serde::{Deserialize, Serialize};

const BLOCKS: usize = 16;
const WIDTH: usize = 2048;
const WARM_UP: usize = 2;
const ROWS: [&str; 5] = ["compute", "ddp", "zero1", "zero2", "fsdp"];

/// A training step under every strategy, beside torch's.
#[derive(Parser)]
struct Args {
    /// Processes.
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// Steps that are timed; the median counts.
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// A python that has torch, to run torch's side.
    #[arg(long)]
    torch: Option<String>,
    /// How often everything runs, both sides in turn; each row's best counts, because other work disturbs.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Bytes of a bucket of gradients, in MiB.
    #[arg(long, default_value_t = 25)]
    bucket_mib: usize,
    /// One row alone, as JSON.
    #[arg(long, hide = true)]
    row: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Line {
    who: String,
    row: String,
    ranks: usize,
    step_s: f64,
    update_s: f64,
    peak_bytes: f64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    match &args.row {
        Some(row) if row == "adamw" => adamw(args.steps),
        Some(row) if row == "copy" => copy(args.steps),
        Some(row) => one(row, &args),
        None => all(&args),
    }
}

/// Run every row in processes of its own, then torch's, and print the table.
fn all(args: &Args) -> Result<()> {
    let program = std::env::current_exe()?;
    let (ranks, steps) = (args.ranks.to_string(), args.steps.to_string());
    let mut lines: Vec<Line> = Vec::new();
    for round in 1..=args.rounds {
        for row in ["copy", "adamw"].iter().chain(&ROWS) {
            eprintln!("round {round}: {row} ...");
            let mut command = Command::new(&program);
            let bucket_mib = args.bucket_mib.to_string();
            command.args(["--row", row, "--ranks", &ranks, "--steps", &steps]);
            command.args(["--bucket-mib", &bucket_mib]);
            // Otherwise the system's allocator keeps what was freed.
            command.env("MALLOC_MMAP_THRESHOLD_", (1 << 20).to_string());
            lines.extend(beside::run(&mut command)?);
        }
        if let Some(python) = &args.torch {
            eprintln!("round {round}: torch ...");
            let mut command = beside::script(python, "step.py", &[&ranks, &steps]);
            lines.extend(beside::run(&mut command)?);
        }
    }
    lines.sort_by(|a, b| a.step_s.total_cmp(&b.step_s)); // the table takes the first that it finds
    table(&lines);
    Ok(())
}

fn table(lines: &[Line]) {
    let find = |who: &str, row: &str| lines.iter().find(|line| line.who == who && line.row == row);
    let compute = |who: &str| find(who, "compute").map_or(0.0, |line| line.step_s);
    let ms = |seconds: f64| seconds * 1e3;
    println!(
        "# {BLOCKS} blocks of {WIDTH} x {WIDTH}, f32, AdamW; times in ms, memory in MB a rank"
    );
    println!(
        "#                  ours                                 torch                          ours / torch"
    );
    println!(
        "#   row       step   beyond   update     peak      step   beyond   update     peak    beyond     peak"
    );
    for row in ROWS {
        let mut cells = format!("{row:>9}");
        let mut beyonds = Vec::new();
        for who in ["fabric", "torch"] {
            match find(who, row) {
                Some(line) => {
                    let beyond = line.step_s - compute(who);
                    beyonds.push((beyond, line.peak_bytes));
                    cells += &format!(
                        " {:>9.1}{:>9.1}{:>9.1}{:>9.0}",
                        ms(line.step_s),
                        ms(beyond),
                        ms(line.update_s),
                        line.peak_bytes / 1e6
                    );
                }
                None => cells += &format!(" {:>9}{:>9}{:>9}{:>9}", "-", "-", "-", "-"),
            }
        }
        if let ([(ours, our_peak), (theirs, their_peak)], true) = (&beyonds[..], row != "compute") {
            cells += &format!("{:>10.2}{:>9.2}", ours / theirs, our_peak / their_peak);
        }
        println!("{cells}");
    }
    let elements = (BLOCKS * WIDTH * WIDTH) as f64;
    let per_element = |line: &Line| line.step_s * 1e9 / elements;
    if let (Some(ours), Some(copy)) = (find("fabric", "adamw"), find("fabric", "copy")) {
        // AdamW loads four vectors and stores three; a copy loads one and stores one.
        let limit = copy.step_s * 7.0 / 2.0;
        print!(
            "# AdamW alone, one thread: {:.3} ns an element, {:.2} of the limit (7/2 plain copies of the same bytes)",
            per_element(ours),
            limit / ours.step_s
        );
        match find("torch", "adamw") {
            Some(theirs) => println!("; torch's fused one {:.3} ns", per_element(theirs)),
            None => println!(),
        }
    }
}

/// Anonymous memory of this process that lies in RAM, in bytes.
fn anonymous_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// A block that looks at the memory while its gradients are there.
struct Watched(Dense, Arc<AtomicU64>);

impl Block<f32> for Watched {
    fn forward(&self, params: &[&[f32]], input: &[f32]) -> Vec<f32> {
        self.0.forward(params, input)
    }

    fn backward(
        &self,
        params: &[&[f32]],
        input: &[f32],
        output_grad: &[f32],
        grads: &mut [Vec<f32>],
    ) -> Vec<f32> {
        let by_input = self.0.backward(params, input, output_grad, grads);
        self.1.fetch_max(anonymous_bytes(), Ordering::Relaxed);
        by_input
    }
}

fn model() -> Result<VecModel> {
    let [weight, bias] = Dense::new(WIDTH).sizes();
    let params = (0..BLOCKS).flat_map(|block| {
        let init = |numel: usize| Box::new(move || vec![1e-4f32; numel]) as _;
        [
            (format!("block.{block}.weight"), weight, init(weight)),
            (format!("block.{block}.bias"), bias, init(bias)),
        ]
    });
    let units = (0..BLOCKS).map(|block| format!("block.{block}"));
    Ok(VecModel::deferred(params).in_units(units)?)
}

fn chain(model: &VecModel, peak: &Arc<AtomicU64>) -> Result<Chain<f32>> {
    let links = (0..BLOCKS).map(|block| {
        let watched = Watched(Dense::new(WIDTH), peak.clone());
        Link::new(model, &format!("block.{block}"), watched)
    });
    Ok(Chain::new(links.collect::<Result<_, _>>()?))
}

fn one(row: &str, args: &Args) -> Result<()> {
    let strategy = if row == "compute" { "ddp" } else { row };
    let (steps, options) = (
        args.steps,
        Options {
            bucket_bytes: args.bucket_mib << 20,
            ..Options::default()
        },
    );
    let fabric = Fabric::builder()
        .devices(args.ranks)
        .strategy(strategy)
        .buckets(options)
        .build()?;
    fabric
        .launch(|fabric| match row {
            "compute" => compute(fabric, steps),
            _ => train(fabric, row, steps),
        })
        .map(drop)
}

/// Forward and backward of the model alone, on every rank at once.
fn compute(fabric: &Fabric, steps: usize) -> Result<()> {
    let (model, peak) = (model()?, Arc::default());
    (0..model.params().len()).try_for_each(|param| model.initialize(ParamId(param)))?;
    model.attach(Arc::new(Nobody));
    let chain = chain(&model, &peak)?;
    let mut laps = Laps::default();
    for _ in 0..WARM_UP + steps {
        fabric.barrier()?;
        laps.begin();
        let pass = chain.forward(&model, vec![0.01; WIDTH])?;
        let loss = pass.output().to_vec();
        pass.loss(loss).backward(1.0)?;
        laps.middle();
        laps.end();
    }
    laps.report(fabric, "compute", 0.0)
}

fn train(fabric: &Fabric, row: &str, steps: usize) -> Result<()> {
    let (before, peak) = (anonymous_bytes(), Arc::<AtomicU64>::default());
    let (model, mut optimizer) = fabric.setup(model()?, AdamW::new(1e-3))?;
    let chain = chain(&model, &peak)?;
    let mut laps = Laps::default();
    for _ in 0..WARM_UP + steps {
        fabric.barrier()?;
        laps.begin();
        let input = vec![0.01 * (fabric.global_rank() + 1) as f32; WIDTH];
        let pass = chain.forward(&model, input)?;
        let loss = pass.output().to_vec();
        fabric.backward(pass.loss(loss))?;
        laps.middle();
        optimizer.step()?;
        optimizer.zero_grad();
        laps.end();
        peak.fetch_max(anonymous_bytes(), Ordering::Relaxed);
    }
    let own = peak.load(Ordering::Relaxed).saturating_sub(before);
    laps.report(fabric, row, (own + model.shared_bytes()) as f64)
}

/// AdamW on one thread.
fn adamw(steps: usize) -> Result<()> {
    let fabric = Fabric::builder().devices(1).build()?;
    let outcome = fabric.launch(|fabric| {
        let numel = WIDTH * WIDTH;
        let params = (0..BLOCKS).map(|block| (format!("{block}"), vec![1e-4f32; numel]));
        let (model, mut optimizer) = fabric.setup(VecModel::new(params), AdamW::new(1e-3))?;
        fabric
            .backward(model.gradients((0..BLOCKS).map(|_| Some(vec![1e-3f32; numel])).collect()))?;
        let mut laps = Laps::default();
        for _ in 0..WARM_UP + steps {
            laps.begin();
            optimizer.step()?;
            laps.middle();
            laps.end();
        }
        laps.report(fabric, "adamw", 0.0)
    });
    outcome.map(drop)
}

/// A plain copy of as many elements.
fn copy(steps: usize) -> Result<()> {
    let fabric = Fabric::builder().devices(1).build()?;
    let outcome = fabric.launch(|fabric| {
        let numel = BLOCKS * WIDTH * WIDTH;
        let (from, mut into) = (vec![1f32; numel], vec![2f32; numel]);
        let mut laps = Laps::default();
        for _ in 0..WARM_UP + steps {
            laps.begin();
            kernels::cast(kernels::Span::of(&from), kernels::SpanMut::of(&mut into))?;
            laps.middle();
            laps.end();
        }
        laps.report(fabric, "copy", 0.0)
    });
    outcome.map(drop)
}

/// How long steps took, and their updates.
#[derive(Default)]
struct Laps {
    clock: Option<Clock>,
    begun: Duration,
    halfway: Duration,
    steps: Vec<Duration>,
    updates: Vec<Duration>,
}

impl Laps {
    fn now(&mut self) -> Duration {
        self.clock.get_or_insert_with(Clock::machine).now()
    }

    fn begin(&mut self) {
        self.begun = self.now();
    }

    fn middle(&mut self) {
        self.halfway = self.now();
    }

    fn end(&mut self) {
        let now = self.now();
        self.steps.push(now - self.begun);
        self.updates.push(now - self.halfway);
    }

    fn report(mut self, fabric: &Fabric, row: &str, peak_bytes: f64) -> Result<()> {
        if !fabric.is_global_zero() {
            return Ok(());
        }
        let median = |laps: &mut Vec<Duration>| {
            laps.drain(..WARM_UP);
            laps.sort_unstable();
            laps[laps.len() / 2].as_secs_f64()
        };
        let line = Line {
            who: "fabric".into(),
            row: row.into(),
            ranks: fabric.world_size(),
            step_s: median(&mut self.steps),
            update_s: median(&mut self.updates),
            peak_bytes,
        };
        beside::print(&line)
    }
}
