//! A model in shards, over plain vectors: every process holds its slice of each block, gathers a block for its use and
//! drops it. `cargo run -p fabric-facade --example 03_sharded -- --devices 3`, and then, to go on from its checkpoint
//! under another strategy, on other numbers of processes: `-- --devices 2 --strategy zero2 --resume`

use clap::Parser;
use fabric::{
    Fabric, ReduceOp, Result, State,
    data::DataLoader,
    optim::AdamW,
    vec::{Chain, Dense, Init, Link, VecModel},
};

const WIDTH: usize = 32;
const BLOCKS: usize = 4;
const EPOCHS: usize = 4;
const CHECKPOINT: &str = "out/sharded/last";

#[derive(Parser)]
struct Args {
    /// Processes: a number, or "auto": what a launcher has started, or one
    #[arg(long, default_value = "auto")]
    devices: String,
    /// ddp, zero1, zero2, fsdp or hsdp
    #[arg(long, default_value = "fsdp")]
    strategy: String,
    /// Go on from the last run's checkpoint
    #[arg(long)]
    resume: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let fabric = Fabric::builder()
        .devices(&args.devices)
        .strategy(&args.strategy)
        .state_dict_type("sharded")
        .build()?;
    fabric.launch(|fabric| train(fabric, args.resume))?;
    Ok(())
}

fn train(fabric: &Fabric, resume: bool) -> Result<()> {
    let seed = Fabric::seed_everything(Some(7))?;
    let (model, mut optimizer) = fabric.setup(blocks(seed)?, AdamW::new(2e-3))?;
    let link = |block| Link::new(&model, &name(block), Dense::new(WIDTH));
    let chain = Chain::new((0..BLOCKS).map(link).collect::<Result<_, _>>()?);
    if !resume {
        fabric.print(model.explain(&optimizer, fabric.measure_link()?).trim_end());
    }

    let mut epoch = 0u64;
    if resume {
        let state = State::new()
            .model("model", &model)
            .optimizer("optimizer", &mut optimizer)
            .value("epoch", &mut epoch);
        fabric.load(CHECKPOINT, state)?;
    }
    let loader = DataLoader::new(samples(seed)).batch_size(1).shuffle(true);
    let loader = fabric.setup_dataloaders(loader)?;
    for _ in 0..EPOCHS {
        loader.set_epoch(epoch);
        let (mut sum, mut count) = (0.0, 0.0);
        for batch in &loader {
            for (input, target) in batch? {
                let pass = chain.forward(&model, input)?; // each block is gathered, used and dropped
                let error = pass.output().iter().zip(&target).map(|(y, t)| y - t);
                let error = error.collect::<Vec<_>>();
                sum += f64::from(error.iter().map(|e| e * e).sum::<f32>()) / WIDTH as f64;
                count += 1.0;
                let by_output = error.iter().map(|e| 2.0 * e / WIDTH as f32).collect();
                fabric.backward(pass.loss(by_output))?; // this rank's slices of the mean are left
                optimizer.step()?;
                optimizer.zero_grad();
            }
        }
        epoch += 1;
        let loss = fabric.all_reduce_value(sum / count, ReduceOp::Avg)?;
        fabric.print(format!("epoch {epoch}: loss {loss:.5}"));
    }
    let state = State::new()
        .model("model", &model)
        .optimizer("optimizer", &mut optimizer)
        .value("epoch", &mut epoch);
    fabric.save(CHECKPOINT, state)?;
    fabric.print(format!(
        "saved in {CHECKPOINT}, by every rank what it holds"
    ));
    Ok(())
}

fn name(block: usize) -> String {
    format!("block.{block}")
}

/// Blocks without memory: their first values are made when `fabric.setup` asks, one parameter after the other, so that no
/// process ever holds all of them.
fn blocks(seed: u64) -> Result<VecModel> {
    let params = (0..BLOCKS).flat_map(move |block| {
        let [weight, bias] = Dense::new(WIDTH).sizes();
        let seed = fabric::seed::derive(seed, &[block as u64]);
        let weights: Init<f32> = Box::new(move || uniform(seed, weight, 0.1));
        let zeros: Init<f32> = Box::new(move || vec![0.0; bias]);
        [
            (format!("{}.weight", name(block)), weight, weights),
            (format!("{}.bias", name(block)), bias, zeros),
        ]
    });
    // A unit is what lies under its name.
    Ok(VecModel::deferred(params).in_units((0..BLOCKS).map(name))?)
}

/// Inputs, and each plus half its neighbour.
fn samples(seed: u64) -> Vec<(Vec<f32>, Vec<f32>)> {
    let sample = |index| {
        let x = uniform(fabric::seed::derive(seed, &[1, index]), WIDTH, 1.0);
        let y = (0..WIDTH).map(|j| x[j] + 0.5 * x[(j + 1) % WIDTH]);
        (x.clone(), y.collect())
    };
    (0..240).map(sample).collect()
}

fn uniform(seed: u64, count: usize, scale: f32) -> Vec<f32> {
    use rand::Rng;
    let mut rng = fabric::seed::rng(seed);
    let draw = |_| rng.random_range(-scale..scale);
    (0..count).map(draw).collect()
}
