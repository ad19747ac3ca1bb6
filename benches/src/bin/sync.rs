//! The synchronisation of GPT-2 small's gradients under `ddp`, beside torch's over gloo in the same run: from gradients in
//! the tensor library's own memory to the averages that an optimizer reads.
//!
//! `cargo run --release -p fabric-benches --bin sync -- --ranks 2 --torch python3` (without `--torch` ours alone). Ranks are
//! processes of one thread each. A time is the slowest rank's, the median of a round's steps.
//!
//! [Note: what is compared] Ours is all of `fabric.backward`, with gradients that are there already: plain vectors are lent
//! one after the other, last parameter first, and nothing is computed (that lending takes no time is asserted). The copy into
//! buckets, which a backward without synchronisation makes too, is in it. Beside it stand the same inside `no_backward_sync`,
//! which is that copy, and the difference, which is the exchange and the waiting. Torch's backward computes, so that its cost
//! is a difference: the backward under DistributedDataParallel less the same under `no_sync`. It is measured twice. In `kept`
//! gradients stay in DDP's buckets from step to step (`zero_grad(set_to_none=False)`), and nothing is copied. In `new` they come
//! anew in every backward (torch's default), and DDP copies them into its buckets, as ours are copied; there `no_sync` drops them
//! as they come, so that the copy is in the difference. The ratio is all of ours to the lower of torch's two. The limit is a
//! plain copy of as many bytes as the gradients have, by all ranks at once: what the copy into buckets alone would take. The
//! averages are compared with exact values on both sides.

use std::{
    process::Command,
    sync::{Arc, OnceLock},
    time::Duration,
};

use clap::Parser;
use fabric::{
    Fabric, FabricModule, ReduceOp, Result,
    engine::{buffer::Buffer, clock::Clock, kernels, shard::plan::Options},
    model::{Backward, Events, Model, ParamId, ParamMeta},
    optim::Sgd,
    vec::VecModel,
};
use fabric_benches::{Nobody, beside};
use serde::{Deserialize, Serialize};

type EngineResult<T> = fabric::engine::Result<T>;

const LAYERS: usize = 12;
const WIDTH: usize = 768;
const VOCABULARY: usize = 50257;
const CONTEXT: usize = 1024;
const WARM_UP: usize = 2;

/// The synchronisation of 124 million parameters' gradients, beside torch's.
#[derive(Parser)]
struct Args {
    /// Processes; where results are checked to the bit, a power of two.
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// Backwards of each kind that are timed; the median counts.
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// A python that has torch, to run torch's side.
    #[arg(long)]
    torch: Option<String>,
    /// How often everything runs, both sides in turn; the last line has the best, because other work disturbs.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Bytes of a bucket of gradients, in MiB.
    #[arg(long, default_value_t = 25)]
    bucket_mib: usize,
    /// One row alone, as JSON: copy or ddp.
    #[arg(long, hide = true)]
    row: Option<String>,
}

/// What one side says of one row, in seconds.
#[derive(Serialize, Deserialize)]
struct Line {
    who: String,
    row: String,
    /// With synchronisation.
    sync_s: f64,
    /// The same without.
    alone_s: f64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let fabric = Fabric::builder()
        .devices(args.ranks)
        .strategy("ddp")
        .buckets(Options {
            bucket_bytes: args.bucket_mib << 20,
            ..Options::default()
        });
    match args.row.as_deref() {
        Some("copy") => fabric.build()?.launch(|fabric| copy(fabric, args.steps)),
        Some(_) => fabric
            .build()?
            .launch(|fabric| synchronise(fabric, args.steps)),
        None => return all(&args),
    }
    .map(drop)
}

/// Run every row in processes of its own, then torch's, and print the table.
fn all(args: &Args) -> Result<()> {
    let program = std::env::current_exe()?;
    let (ranks, steps, bucket_mib) = (
        args.ranks.to_string(),
        args.steps.to_string(),
        args.bucket_mib.to_string(),
    );
    head(args);
    let mut best = Figures::NONE;
    for round in 1..=args.rounds {
        let mut lines: Vec<Line> = Vec::new();
        for row in ["copy", "ddp"] {
            eprintln!("round {round}: {row} ...");
            let mut command = Command::new(&program);
            command.args(["--row", row, "--ranks", &ranks, "--steps", &steps]);
            command.args(["--bucket-mib", &bucket_mib]);
            lines.extend(beside::run(&mut command)?);
        }
        if let Some(python) = &args.torch {
            eprintln!("round {round}: torch ...");
            let mut command = beside::script(python, "sync.py", &[&ranks, &steps, &bucket_mib]);
            lines.extend(beside::run(&mut command)?);
        }
        let figures = Figures::of(&lines);
        figures.print(&round.to_string());
        best = best.or_lower(figures);
    }
    best.print("best");
    Ok(())
}

/// What is measured of one row, in seconds; infinite where it is not.
#[derive(Clone, Copy)]
struct Times {
    sync_s: f64,
    alone_s: f64,
}

/// A round's figures.
#[derive(Clone, Copy)]
struct Figures {
    copy: Times,
    ours: Times,
    kept: Times,
    new: Times,
}

impl Times {
    const NONE: Self = Self {
        sync_s: f64::INFINITY,
        alone_s: f64::INFINITY,
    };

    fn of(lines: &[Line], who: &str, row: &str) -> Self {
        let line = lines.iter().find(|line| line.who == who && line.row == row);
        line.map_or(Self::NONE, |line| Self {
            sync_s: line.sync_s,
            alone_s: line.alone_s,
        })
    }

    fn or_lower(self, other: Self) -> Self {
        Self {
            sync_s: self.sync_s.min(other.sync_s),
            alone_s: self.alone_s.min(other.alone_s),
        }
    }

    fn beyond_s(self) -> f64 {
        match self.sync_s.is_finite() {
            true => self.sync_s - self.alone_s,
            false => f64::INFINITY,
        }
    }

    fn cells(self) -> String {
        let cell = |seconds: f64| match seconds.is_finite() {
            true => format!("{:>10.1}", seconds * 1e3),
            false => format!("{:>10}", "-"),
        };
        [self.sync_s, self.alone_s, self.beyond_s()]
            .map(cell)
            .concat()
    }
}

impl Figures {
    const NONE: Self = Self {
        copy: Times::NONE,
        ours: Times::NONE,
        kept: Times::NONE,
        new: Times::NONE,
    };

    fn of(lines: &[Line]) -> Self {
        Self {
            copy: Times::of(lines, "fabric", "copy"),
            ours: Times::of(lines, "fabric", "ddp"),
            kept: Times::of(lines, "torch", "kept"),
            new: Times::of(lines, "torch", "new"),
        }
    }

    /// The lower of both, time by time.
    fn or_lower(self, other: Self) -> Self {
        Self {
            copy: self.copy.or_lower(other.copy),
            ours: self.ours.or_lower(other.ours),
            kept: self.kept.or_lower(other.kept),
            new: self.new.or_lower(other.new),
        }
    }

    fn print(&self, name: &str) {
        let theirs = self.kept.beyond_s().min(self.new.beyond_s());
        let ratios =
            [self.ours.sync_s, self.ours.beyond_s()].map(|ours| match theirs.is_finite() {
                true => format!("{:>8.3}", ours / theirs),
                false => format!("{:>8}", "-"),
            });
        println!(
            "{name:>6}{:>8.1}{}{}{}{}{:>8.2}",
            self.copy.alone_s * 1e3,
            self.ours.cells(),
            self.kept.cells(),
            self.new.cells(),
            ratios.concat(),
            self.ours.sync_s / self.copy.alone_s
        );
    }
}

fn head(args: &Args) {
    let sizes = sizes();
    let numel = sizes.iter().sum::<usize>();
    println!(
        "# {:.1}M parameters in {} tensors, {:.0} MB of f32 gradients a rank; ddp, {} ranks, buckets of {} MiB; times in ms",
        numel as f64 / 1e6,
        sizes.len(),
        numel as f64 * 4e-6,
        args.ranks,
        args.bucket_mib
    );
    println!("# copy: a plain copy of as many bytes by all ranks at once");
    println!(
        "# ours: fabric.backward of gradients that are there, where nothing is computed; no_sync: the same in \
         no_backward_sync, which copies them into buckets"
    );
    println!(
        "# torch: a backward under DDP, which computes them; no_sync: the same there. kept: gradients stay in DDP's buckets; \
         new: they come anew, and are copied"
    );
    println!("# beyond: backward less no_sync. best: the lowest of all rounds");
    println!(
        "# ours / torch: all of our backward, and our beyond, to the lower of torch's two beyonds"
    );
    println!(
        "#{:>13}{:>30}{:>30}{:>30}{:>16}{:>8}",
        "", "ours", "torch, kept", "torch, new", "ours / torch", "ours /"
    );
    let columns = format!("{:>10}{:>10}{:>10}", "backward", "no_sync", "beyond").repeat(3);
    println!(
        "#{:>5}{:>8}{columns}{:>8}{:>8}{:>8}",
        "round", "copy", "all", "beyond", "copy"
    );
}

/// Elements of each parameter, in registration order.
fn sizes() -> Vec<usize> {
    let layer = [
        WIDTH,
        WIDTH,
        3 * WIDTH * WIDTH,
        3 * WIDTH,
        WIDTH * WIDTH,
        WIDTH,
        WIDTH,
        WIDTH,
        4 * WIDTH * WIDTH,
        4 * WIDTH,
        4 * WIDTH * WIDTH,
        WIDTH,
    ];
    let mut sizes = vec![VOCABULARY * WIDTH, CONTEXT * WIDTH];
    sizes.extend(std::iter::repeat_n(layer, LAYERS).flatten());
    sizes.extend([WIDTH; 2]);
    sizes
}

/// Vectors whose gradients a program holds itself, and lends: a [`VecModel`] would take them and free them.
struct Bag {
    vectors: VecModel,
    events: OnceLock<Arc<dyn Events>>,
}

impl Bag {
    fn new() -> Self {
        let params = sizes().into_iter().enumerate().map(|(index, numel)| {
            let init = Box::new(move || vec![0f32; numel]) as _;
            (format!("param.{index}"), numel, init)
        });
        Self {
            vectors: VecModel::deferred(params),
            events: OnceLock::new(),
        }
    }

    fn loss<'a>(&'a self, grads: &'a [Vec<f32>]) -> Lent<'a> {
        let events = self.events.get().expect("the model was set up");
        Lent {
            events: &**events,
            grads,
        }
    }
}

impl Model for Bag {
    fn params(&self) -> &[ParamMeta] {
        self.vectors.params()
    }

    fn with(
        &self,
        param: ParamId,
        f: &mut dyn FnMut(&mut dyn Buffer) -> EngineResult<()>,
    ) -> EngineResult<()> {
        self.vectors.with(param, f)
    }

    fn initialize(&self, param: ParamId) -> EngineResult<()> {
        self.vectors.initialize(param)
    }

    fn acquire(&self, param: ParamId) -> EngineResult<()> {
        self.vectors.acquire(param)
    }

    fn attach(&self, events: Arc<dyn Events>) {
        let _ = self.events.set(events); // set up once
    }
}

/// A loss whose gradients are there.
struct Lent<'a> {
    events: &'a dyn Events,
    grads: &'a [Vec<f32>],
}

impl Backward for Lent<'_> {
    fn backward(self, scale: f32) -> EngineResult<()> {
        assert_eq!(scale, 1.0, "the gradients are those of the loss itself");
        for (index, grad) in self.grads.iter().enumerate().rev() {
            self.events.ready(ParamId(index), grad)?;
        }
        Ok(())
    }
}

/// Element `index` of the gradient of `param`, before it is multiplied by a rank's factor.
fn element(param: usize, index: usize) -> f32 {
    ((param * 7 + index) % 251) as f32
}

/// Backwards with synchronisation and without, in turn; results are checked after the first and the last of both.
fn synchronise(fabric: &Fabric, steps: usize) -> Result<()> {
    let (model, mut optimizer) = fabric.setup(Bag::new(), Sgd::new(0.1))?;
    // The mean of 1, 3, 5, ... is their number.
    let (own, mean) = (2 * fabric.global_rank() + 1, fabric.world_size());
    let values = |(param, numel)| (0..numel).map(move |index| own as f32 * element(param, index));
    let grads = sizes().into_iter().enumerate();
    let grads = grads.map(|size| values(size).collect()).collect::<Vec<_>>();
    let (mut synced, mut alone, last) = (Laps::new(), Laps::new(), WARM_UP + steps - 1);
    for step in 0..=last {
        let is_checked = step == 0 || step == last;
        synced.time(fabric, || fabric.backward(model.loss(&grads)))?;
        if is_checked {
            check(&model, mean);
        }
        optimizer.zero_grad();
        alone.time(fabric, || {
            fabric.no_backward_sync(&model, true, || fabric.backward(model.loss(&grads)))
        })?;
        if is_checked {
            check(&model, own);
        }
        optimizer.zero_grad();
    }
    let mut bare = Laps::new();
    for _ in 0..WARM_UP + steps {
        let (events, grads) = (&Nobody, &grads[..]);
        bare.time(fabric, || Ok(Lent { events, grads }.backward(1.0)?))?;
    }
    let bare_s = bare.median(fabric)?;
    assert!(bare_s < 1e-3, "lending the gradients takes {bare_s} s");
    report(fabric, "ddp", synced.median(fabric)?, alone.median(fabric)?)
}

/// Every gradient that an optimizer reads is `factor` times what it began as.
fn check(model: &FabricModule<Bag>, factor: usize) {
    for param in 0..model.params().len() {
        let grad = model.grad(ParamId(param));
        let grad = grad.unwrap_or_else(|| panic!("no gradient of parameter {param}"));
        let expected = |index| factor as f32 * element(param, index);
        let wrong = (0..grad.len()).find(|index| grad[*index] != expected(*index));
        if let Some(index) = wrong {
            let (got, expected) = (grad[index], expected(index));
            panic!("element {index} of parameter {param} is {got}, not {expected}");
        }
    }
}

/// A plain copy of as many bytes, by all ranks at once.
fn copy(fabric: &Fabric, steps: usize) -> Result<()> {
    let numel = sizes().iter().sum::<usize>();
    let (from, mut into) = (vec![1f32; numel], vec![2f32; numel]);
    let mut laps = Laps::new();
    for _ in 0..WARM_UP + steps {
        laps.time(fabric, || {
            let (from, into) = (kernels::Span::of(&from), kernels::SpanMut::of(&mut into));
            kernels::cast(from, into).map_err(|error| fabric::Error::new(error.to_string()))
        })?;
    }
    assert_eq!(into[numel - 1], 1.0);
    report(fabric, "copy", 0.0, laps.median(fabric)?)
}

fn report(fabric: &Fabric, row: &str, sync_s: f64, alone_s: f64) -> Result<()> {
    if !fabric.is_global_zero() {
        return Ok(());
    }
    beside::print(&Line {
        who: "fabric".into(),
        row: row.into(),
        sync_s,
        alone_s,
    })
}

/// How long this rank took, each time.
struct Laps {
    clock: Clock,
    laps: Vec<Duration>,
}

impl Laps {
    fn new() -> Self {
        let (clock, laps) = (Clock::machine(), Vec::new());
        Self { clock, laps }
    }

    /// Time `body`, which all ranks begin together.
    fn time(&mut self, fabric: &Fabric, body: impl FnOnce() -> Result<()>) -> Result<()> {
        fabric.barrier()?;
        let begun = self.clock.now();
        body()?;
        self.laps.push(self.clock.now() - begun);
        Ok(())
    }

    /// The median of the slowest ranks' times, in seconds.
    fn median(self, fabric: &Fabric) -> Result<f64> {
        let mut laps = (self.laps[WARM_UP..].iter())
            .map(Duration::as_secs_f64)
            .collect::<Vec<_>>();
        fabric.all_reduce(&mut laps, ReduceOp::Max)?;
        laps.sort_unstable_by(f64::total_cmp);
        Ok(laps[laps.len() / 2])
    }
}
