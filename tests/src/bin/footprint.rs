//! Trains a model of 16 blocks and 67 million parameters, and says what each rank's memory grew by, beside what the plan
//! predicted: `footprint STRATEGY RANKS`. A line of JSON for each rank.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use fabric::{
    Fabric, Result,
    optim::AdamW,
    vec::{Block, Chain, Dense, Link, VecModel},
};

const BLOCKS: usize = 16;
const WIDTH: usize = 2048;
const STATES: usize = 2; // AdamW's

/// Anonymous memory of this process that lies in RAM, in bytes.
fn anonymous_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("a kernel that tells");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let kib = kib.and_then(|kib| kib.parse::<u64>().ok());
    kib.expect("RssAnon in kB") * 1024
}

/// The highest that was seen.
#[derive(Clone, Default)]
struct Peak(Arc<AtomicU64>);

impl Peak {
    fn look(&self) {
        self.0.fetch_max(anonymous_bytes(), Ordering::Relaxed);
    }
}

/// A block that looks at the memory while its parameters and its gradients are there.
struct Watched(Dense, Peak);

impl Block<f32> for Watched {
    fn forward(&self, params: &[&[f32]], input: &[f32]) -> Vec<f32> {
        self.1.look();
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
        self.1.look();
        by_input
    }
}

fn model() -> VecModel {
    let [weight, bias] = Dense::new(WIDTH).sizes();
    let params = (0..BLOCKS).flat_map(|block| {
        let init = |numel: usize| Box::new(move || vec![1e-4f32; numel]) as _;
        [
            (format!("block.{block}.weight"), weight, init(weight)),
            (format!("block.{block}.bias"), bias, init(bias)),
        ]
    });
    let model = VecModel::deferred(params);
    model
        .in_units((0..BLOCKS).map(|block| format!("block.{block}")))
        .expect("every parameter is in one unit")
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let strategy = args.next().unwrap_or_else(|| "ddp".into());
    let devices = args.next().and_then(|text| text.parse::<usize>().ok());
    let mut builder = Fabric::builder()
        .devices(devices.unwrap_or(2))
        .strategy(&strategy);
    if strategy == "hsdp" {
        builder = builder.group(2);
    }
    builder
        .build()?
        .launch(|fabric| run(fabric, &strategy))
        .map(drop)
}

fn run(fabric: &Fabric, strategy: &str) -> Result<()> {
    let before = anonymous_bytes();
    let peak = Peak::default();
    let (model, mut optimizer) = fabric.setup(model(), AdamW::new(1e-3))?;
    let links = (0..BLOCKS).map(|block| {
        let watched = Watched(Dense::new(WIDTH), peak.clone());
        Link::new(&model, &format!("block.{block}"), watched)
    });
    let chain = Chain::new(links.collect::<Result<_, _>>()?);
    for step in 0..3 {
        let input = vec![0.01 * (step + fabric.global_rank()) as f32; WIDTH];
        let pass = chain.forward(&model, input)?;
        let loss = pass.output().to_vec();
        fabric.backward(pass.loss(loss))?;
        peak.look();
        optimizer.step()?;
        peak.look();
        optimizer.zero_grad();
    }
    // What the program holds itself: a block's gradients, before they are handed over.
    let declared = Dense::new(WIDTH).sizes().iter().sum::<usize>() * size_of::<f32>();
    let bytes = model.footprint(STATES);
    let own = peak.0.load(Ordering::Relaxed) - before;
    println!(
        "{{\"strategy\":\"{strategy}\",\"rank\":{},\"predicted\":{},\"declared\":{declared},\"own\":{own},\"shared\":{}}}",
        fabric.global_rank(),
        bytes.total(),
        model.shared_bytes()
    );
    Ok(())
}
