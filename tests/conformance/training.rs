//! Lines 36 and 37 of the list and the defects round them: accumulation in one right recipe, its tail and its weights.

use fabric::{Fabric, FabricModule, Result, data::DataLoader, optim::Sgd, vec::VecModel};

use crate::puppet::{all_say, failures};

const ROWS: [&str; 4] = ["ddp", "zero1", "zero2", "fsdp"];

fn world(ranks: usize, strategy: &str) -> Fabric {
    let builder = Fabric::builder().devices(ranks).strategy(strategy);
    builder.build().unwrap()
}

fn model() -> VecModel {
    let model = VecModel::new([("w", vec![0f32; 3])]);
    model.in_units(["w"]).unwrap()
}

/// The gradient of half the mean of (w - x)^2 over tokens x at w = 0: minus their mean.
fn gradient(tokens: &[f32]) -> Vec<Option<Vec<f32>>> {
    let mean = tokens.iter().sum::<f32>() / tokens.len() as f32;
    vec![Some(vec![-mean, 0.0, 1.0])]
}

fn values(fabric: &Fabric, model: &FabricModule<VecModel>) -> Result<Vec<f32>> {
    let folder = tempfile::tempdir()?;
    let path = fabric.broadcast(folder.path().join("w"), 0)?;
    fabric.save(&path, fabric::State::new().model("model", model))?;
    let single = Fabric::builder().devices(1).build()?;
    let read = single.launch_threads(|single| {
        let (whole, _) = single.setup(VecModel::new([("w", vec![0f32; 3])]), Sgd::new(1.0))?;
        single.load(&path, fabric::State::new().model("model", &whole))?;
        Ok(whole.read("w"))
    })?;
    fabric.barrier()?;
    Ok(read.concat())
}

// API-28, R-06, BUG-17, GAP-03: every batch of an epoch is in a step, the tail too, and a step is a mean.
#[test]
fn line_36_accumulation_steps_on_every_batch_and_averages() {
    for strategy in ROWS {
        let run = world(2, strategy).launch_threads(|fabric| {
            let (model, mut optimizer) = fabric.setup(model(), Sgd::new(1.0))?;
            let samples: Vec<f32> = (0..14).map(|sample| sample as f32).collect();
            let loader = fabric.setup_dataloaders(DataLoader::new(samples))?;
            let mut sizes = Vec::new();
            let before = fabric.spent()?;
            for micro in fabric.accumulate(3).over(&loader) {
                let micro = micro?;
                micro.backward(&model, model.gradients(gradient(&micro.batch)))?;
                if micro.is_last() {
                    optimizer.step()?;
                    optimizer.zero_grad();
                    sizes.push(micro.count());
                }
            }
            assert_eq!(sizes, [3, 3, 1], "{strategy}");
            let spent = fabric.spent()?.collectives - before.collectives;
            if strategy == "ddp" {
                assert_eq!(spent, 3 * model.prediction().collectives); // one reduction a step
            }
            values(fabric, &model)
        });
        // Samples 0..6, 6..12 and 12..14 of both ranks; each step adds its mean, whatever w is.
        let expected = vec![2.5 + 8.5 + 12.5, 0.0, -3.0];
        for read in run.unwrap() {
            for (read, expected) in read.iter().zip(&expected) {
                assert!(
                    (read - expected).abs() < 1e-5,
                    "{strategy}: {read} {expected}"
                );
            }
        }
    }
}

// Issue 20350 of 6.4: a mean over tokens, not a mean of means.
#[test]
fn line_36_a_step_weighed_by_tokens_is_the_mean_over_all_tokens() {
    for strategy in ROWS {
        let run = world(2, strategy).launch_threads(|fabric| {
            let (model, mut optimizer) = fabric.setup(model(), Sgd::new(1.0))?;
            let rank = fabric.global_rank();
            let batches = match rank {
                0 => vec![vec![1f32], vec![2.0, 4.0, 6.0], vec![9.0]],
                _ => vec![vec![8f32; 7], vec![1.0; 2], vec![3.0; 4]],
            };
            let batches = batches.into_iter().map(Ok);
            let steps = fabric
                .accumulate(2)
                .weighted(|batch: &Vec<f32>| batch.len() as f64);
            for micro in steps.over(batches) {
                let micro = micro?;
                micro.backward(&model, model.gradients(gradient(&micro.batch)))?;
                if micro.is_last() {
                    optimizer.step()?;
                    optimizer.zero_grad();
                }
            }
            values(fabric, &model)
        });
        let first = (1.0 + 12.0 + 56.0 + 2.0) / 13.0;
        let second = (9.0 + 12.0) / 5.0;
        for read in run.unwrap() {
            assert!(
                (read[0] - (first + second)).abs() < 1e-5,
                "{strategy}: {read:?}"
            );
        }
    }
}

#[test]
fn line_36_a_step_without_any_token_changes_nothing() {
    let run = world(2, "ddp").launch_threads(|fabric| {
        let (model, mut optimizer) = fabric.setup(model(), Sgd::new(1.0))?;
        let steps = fabric.accumulate(2).weighted(|_: &Vec<f32>| 0.0);
        for micro in steps.over([Ok(vec![1f32]), Ok(vec![2.0])]) {
            let micro = micro?;
            micro.backward(&model, model.gradients(gradient(&micro.batch)))?;
            if micro.is_last() {
                optimizer.step()?;
            }
        }
        values(fabric, &model)
    });
    assert_eq!(run.unwrap(), vec![vec![0.0; 3]; 2]);
}

#[test]
fn line_36_a_failing_loader_and_a_bad_weight_end_the_epoch_with_their_error() {
    let said = failures(1, |fabric| {
        let batches = [Ok(1), fabric_error("the disk is gone"), Ok(3)];
        let mut steps = fabric.accumulate(2).over(batches);
        let error = steps.next().unwrap().err().unwrap();
        assert!(steps.next().is_none());
        Err::<(), _>(error)
    });
    all_say(&said, &["the disk is gone"]);
    let said = failures(1, |fabric| {
        let steps = fabric.accumulate(2).weighted(|_: &i32| f64::NAN);
        steps.over([Ok(1)]).next().unwrap().map(drop)
    });
    all_say(&said, &["a micro-batch of weight NaN"]);
}

fn fabric_error(text: &str) -> Result<i32> {
    Err(fabric::Error::new(text))
}
