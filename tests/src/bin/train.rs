//! A training program for the process tests: trains the small problem on N devices, and can be told to misbehave.
//!
//! `train N steps [fault]`, where fault is one of `hang:R` (rank R stops joining), `models` (rank 1 builds another
//! model), `twice` (two jobs, one after the other), `error:R` (rank R returns an error in step 3), `panic:R`, `exit:R` (rank R leaves without a word),
//! `alone` (joins nothing in its first step). Its losses go to TEST_LOGS, where that is a folder.

use std::time::Duration;

use fabric::{Error, Fabric, Result, logger::JsonlLogger, optim::Sgd, vec::VecModel};
use fabric_tests::Problem;

fn main() -> Result<()> {
    let args = std::env::args().skip(1).collect::<Vec<_>>();
    let number = |index: usize| {
        args.get(index)
            .and_then(|text| text.parse::<u64>().ok())
            .unwrap_or(1)
    };
    let fault = args.get(2).cloned().unwrap_or_default();
    let (kind, who) = fault.split_once(':').unwrap_or((&fault, ""));
    let who = who.parse::<usize>().ok();
    let strategy = std::env::var("TEST_STRATEGY").unwrap_or_else(|_| "auto".into());
    let mut builder = Fabric::builder()
        .devices(args.first().map_or("auto", String::as_str))
        .strategy(&strategy);
    if let Some(folder) = std::env::var_os("TEST_LOGS") {
        builder = builder.logger(JsonlLogger::new(folder, ""));
    }
    let fabric = builder.build()?;
    if kind == "twice" {
        fabric.launch(|fabric| run(fabric, number(1), kind, who))?;
    }
    fabric
        .launch(|fabric| run(fabric, number(1), kind, who))
        .map(drop)
}

fn run(fabric: &Fabric, steps: u64, kind: &str, who: Option<usize>) -> Result<()> {
    let problem = Problem::new(1000);
    let model = if kind == "models" && fabric.global_rank() == 1 {
        VecModel::new([("weight", vec![0f32; 999]), ("bias", vec![0f32; 1])])
    } else {
        problem.model()
    };
    let (model, mut optimizer) = fabric.setup(model, Sgd::new(1e-4))?;
    println!(
        "rank {} is process {}",
        fabric.global_rank(),
        std::process::id()
    );
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let mut last = 0.0;
    for step in 0..steps {
        if step == 3 && who == Some(rank) {
            match kind {
                "error" => return Err(Error::new("the data ran out")),
                "panic" => panic!("this panic is part of the test"),
                "exit" => std::process::exit(7),
                "hang" => std::thread::sleep(Duration::from_secs(60)),
                _ => {}
            }
        }
        let batch = (0..8)
            .map(|index| (step as usize * 8 * world) + index * world + rank)
            .collect::<Vec<_>>();
        let (loss, gradients) = problem.loss(&model, &batch)?;
        fabric.backward(model.gradients(gradients))?;
        optimizer.step()?;
        optimizer.zero_grad();
        if kind == "alone" {
            fabric.log("loss", f64::from(loss), step)?;
            std::thread::sleep(Duration::from_secs(60)); // a step that joins nothing
        }
        last = fabric.all_reduce_value(f64::from(loss), fabric::ReduceOp::Avg)?;
        fabric.log("loss", last, step)?;
        if steps > 1000 {
            std::thread::sleep(Duration::from_millis(5)); // a step of a real model takes time
        }
    }
    if fabric.is_global_zero() {
        println!("loss {last}");
    }
    Ok(())
}
