//! A whole training loop over plain vectors, without a tensor library: fits a line through noisy points on two
//! processes. `cargo run -p fabric-facade --example 02_training_loop -- 2`

use fabric::{
    Clip, Fabric, ReduceOp, Result, State, data::DataLoader, logger::CsvLogger, optim::Sgd,
    vec::VecModel,
};

fn main() -> Result<()> {
    let devices = std::env::args().nth(1).unwrap_or_else(|| "2".into());
    let fabric = Fabric::builder()
        .devices(&devices)
        .strategy("ddp")
        .logger(CsvLogger::new("out", "line"))
        .build()?;
    fabric.launch(train)?;
    Ok(())
}

fn train(fabric: &Fabric) -> Result<()> {
    Fabric::seed_everything(Some(7))?;
    let model = VecModel::new([("slope", vec![0f32]), ("offset", vec![0f32])]);
    let (model, mut optimizer) = fabric.setup(model, Sgd::new(0.1).momentum(0.9))?;
    let loader = DataLoader::new(points()).batch_size(16).shuffle(true);
    let loader = fabric.setup_dataloaders(loader)?;

    let mut step = 0u64;
    for _epoch in 0..20 {
        for batch in &loader {
            let (loss, gradients) = squared_error(&model, &batch?);
            fabric.backward(model.gradients(gradients))?; // averaged over the ranks when it returns
            fabric.clip_gradients(&model, Clip::norm(10.0))?;
            optimizer.step()?;
            optimizer.zero_grad();
            step += 1;
            let loss = fabric.all_reduce_value(f64::from(loss), ReduceOp::Avg)?;
            fabric.log("loss", loss, step)?;
        }
    }
    let (slope, offset) = (model.read("slope")[0], model.read("offset")[0]);
    fabric.print(format!(
        "y = {slope:.2} x + {offset:.2}, drawn from y = 3 x + 1"
    ));
    let state = State::new()
        .model("model", &model)
        .optimizer("optimizer", &mut optimizer)
        .value("step", &mut step);
    fabric.save("out/line/last.safetensors", state)
}

/// Points around y = 3 x + 1.
fn points() -> Vec<(f32, f32)> {
    let point = |index: usize| {
        let x = index as f32 / 128.0 - 1.0;
        let noise = ((index * 7919) % 101) as f32 / 100.0 - 0.5;
        (x, 3.0 * x + 1.0 + noise)
    };
    (0..256).map(point).collect()
}

/// The mean squared error, and its gradient by slope and offset.
fn squared_error(model: &VecModel, batch: &[(f32, f32)]) -> (f32, Vec<Option<Vec<f32>>>) {
    let (slope, offset) = (model.read("slope")[0], model.read("offset")[0]);
    let (mut loss, mut by_slope, mut by_offset) = (0.0, 0.0, 0.0);
    for (x, y) in batch {
        let error = slope * x + offset - y;
        loss += error * error / batch.len() as f32;
        by_slope += 2.0 * error * x / batch.len() as f32;
        by_offset += 2.0 * error / batch.len() as f32;
    }
    (loss, vec![Some(vec![by_slope]), Some(vec![by_offset])])
}
