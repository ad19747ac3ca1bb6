//! What a run tells, over ranks: callbacks that agree, averages that do not depend on the cut, and checkpoints that are
//! kept.

mod loggers;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use fabric::{
    Error, Fabric, ReduceOp, Result, State,
    callback::{
        Callback, EarlyStopping, Ema, GradientStatistics, Hook, LoopState, Mode, ModelCheckpoint,
        Moment, SpikeDetection, TrainingSpike, at, on,
    },
    model::ParamId,
    optim::{AdamW, Sgd},
    vec::VecModel,
};

const ROWS: [&str; 5] = ["ddp", "zero1", "zero2", "fsdp", "hsdp"];
const SIZES: [usize; 4] = [7, 33, 1, 12];

fn build(strategy: &str, world: usize) -> fabric::Builder {
    let builder = Fabric::builder()
        .accelerator("cpu")
        .devices(world)
        .strategy(strategy);
    match strategy {
        "hsdp" => builder.group(2),
        _ => builder,
    }
}

fn model() -> VecModel {
    let value = |param: usize| (0..SIZES[param]).map(move |at| (param * 10 + at) as f32 * 0.01);
    let params =
        (0..SIZES.len()).map(|param| (format!("p{}.w{param}", param / 2), value(param).collect()));
    VecModel::new(params)
}

/// The same under every cut: eighths, the same on every rank.
fn gradients(step: usize) -> Vec<Option<Vec<f32>>> {
    let grad = |numel: usize| (0..numel).map(|at| ((at * 7 + step * 3) % 16) as f32 / 8.0 - 1.0);
    SIZES.map(|numel| Some(grad(numel).collect())).into()
}

// API-46: a callback may run a collective under threads, because each rank has its own
#[test]
fn callbacks_may_run_collectives_under_threads() {
    #[derive(Clone)]
    struct Sums(Vec<f64>);
    impl Callback for Sums {
        fn on_train_batch_end(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
            let sum = fabric.all_reduce_value(moment.loss.unwrap(), ReduceOp::Sum)?;
            self.0.push(sum);
            fabric.call("summed", &mut sum.clone()) // and announce a moment of its own
        }
        fn twin(&self) -> Option<Box<dyn Callback>> {
            Some(Box::new(self.clone()))
        }
    }
    let heard = Arc::new(AtomicUsize::new(0));
    let count = heard.clone();
    let builder = build("ddp", 3).callback(Sums(Vec::new()));
    let builder =
        builder.callback(at(Hook::TrainBatchEnd, |fabric, _| fabric.barrier()).per_rank());
    // Without a twin: the ranks take turns with it.
    let builder = builder.callback(on("summed", move |_, sum: &mut f64| {
        assert_eq!(*sum, 6.0);
        count.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }));
    let outcome = builder.build().unwrap().launch_threads(|fabric| {
        let mut state = LoopState::default();
        for _ in 0..10 {
            let loss = fabric.global_rank() as f64 + 1.0;
            fabric.notify(Hook::TrainBatchEnd, &mut state.moment().loss(loss))?;
        }
        fabric.with_callback(|sums: &mut Sums| Ok(sums.0.clone()))
    });
    assert_eq!(outcome.unwrap(), vec![Some(vec![6.0; 10]); 3]);
    assert_eq!(heard.load(Ordering::Relaxed), 30);
}

#[test]
fn one_ranks_bad_number_stops_all_at_the_same_moment() {
    for (bad, reason) in [(f64::NAN, "val_loss is NaN"), (100.0, "worse than 50")] {
        for unlucky in 0..3 {
            let stopping = EarlyStopping::new("val_loss").divergence_threshold(50.0);
            let fabric = build("ddp", 3).callback(stopping).build().unwrap();
            let outcome = fabric.launch_threads(|fabric| {
                let mut state = LoopState::default();
                for look in 0..10 {
                    let is_bad = look == 4 && fabric.global_rank() == unlucky;
                    state.metrics.set(
                        "val_loss",
                        if is_bad { bad } else { 1.0 / (look + 1) as f64 },
                    );
                    fabric.notify(Hook::ValidationEnd, &mut state.moment())?;
                    if let Some(reason) = state.stopped() {
                        return Ok((look, reason.to_string()));
                    }
                }
                Err(Error::new("nobody stopped"))
            });
            for (rank, (look, why)) in outcome.unwrap().into_iter().enumerate() {
                assert_eq!(look, 4);
                assert!(why.contains(reason), "{why}");
                assert_eq!(
                    why.contains(&format!("rank {unlucky}: ")),
                    rank != unlucky,
                    "{why}"
                );
            }
        }
    }
}

#[test]
fn a_metric_that_one_rank_lacks_is_an_error_there_and_no_hang() {
    let fabric = build("ddp", 2)
        .callback(EarlyStopping::new("val_loss"))
        .build()
        .unwrap();
    let outcome = fabric.launch_threads(|fabric| {
        let mut state = LoopState::default();
        if fabric.global_rank() == 0 {
            state.metrics.set("val_loss", 1.0);
        }
        fabric.notify(Hook::ValidationEnd, &mut state.moment())
    });
    let error = outcome.unwrap_err().to_string();
    assert!(
        error.contains("EarlyStopping looks for the metric 'val_loss'"),
        "{error}"
    );
}

// UTIL-20, line 59: the spiking rank, the value, and whether only finite losses are good
#[test]
fn line_59_spikes_on_any_rank_end_training_on_all_in_all_24_combinations() {
    let mut combinations = 0;
    for (unlucky, world) in [(0, 1), (0, 2), (1, 2)] {
        for value in [3.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
            for finite_only in [true, false] {
                combinations += 1;
                let folder = tempfile::tempdir().unwrap();
                let detection = SpikeDetection::new(folder.path()).finite_only(finite_only);
                let fabric = Fabric::builder()
                    .devices(world)
                    .callback(detection)
                    .build()
                    .unwrap();
                // Minus infinity is better than all before; NaN is at no distance from anything.
                let spikes = finite_only || value == 3.0 || value == f64::INFINITY;
                let outcome = fabric.launch_threads(|fabric| {
                    let mut state = LoopState::default();
                    for batch in 0..8u64 {
                        let is_bad = batch == 4 && fabric.global_rank() == unlucky;
                        let loss = if is_bad {
                            value
                        } else {
                            1.0 / (batch + 1) as f64
                        };
                        let mut moment = state.moment().loss(loss).batch(batch);
                        let Err(error) = fabric.notify(Hook::TrainBatchEnd, &mut moment) else {
                            continue;
                        };
                        let spike = error.downcast_ref::<TrainingSpike>().copied();
                        return Ok(spike.map(|spike| (spike.batch, error.to_string())));
                    }
                    Ok(None)
                });
                let text = "Training spike detected in batch 4".to_string();
                let expected = spikes.then_some((4, text));
                assert_eq!(
                    outcome.unwrap(),
                    vec![expected; world],
                    "{unlucky} {value} {finite_only}"
                );
                let skip = std::fs::read(folder.path().join("skip_batches.json"));
                let skip = skip
                    .ok()
                    .map(|bytes| serde_json::from_slice::<Vec<u64>>(&bytes).unwrap());
                assert_eq!(skip, spikes.then(|| vec![3, 4]));
            }
        }
    }
    assert_eq!(combinations, 24);
}

/// Five steps; the averages of all parameters, whole, by way of a checkpoint in `folder`, and whether the model has its own
/// values back after validation.
fn averaged(strategy: &str, folder: &Path) -> Vec<Vec<u32>> {
    let path = folder.join(format!("{strategy}.ckpt"));
    let builder = build(strategy, 4).state_dict_type("full");
    let fabric = builder.callback(Ema::new(0.75).unwrap()).build().unwrap();
    let outcome = fabric.launch_threads(|fabric| {
        let units = ["p0", "p1"];
        let (model, mut optimizer) = fabric.setup(model().in_units(units)?, AdamW::new(0.05))?;
        for step in 0..5 {
            for unit in 0..2 {
                model.unit(
                    fabric::model::UnitId(unit),
                    fabric::model::Edge::ForwardEnter,
                )?;
                model.unit(
                    fabric::model::UnitId(unit),
                    fabric::model::Edge::ForwardLeave,
                )?;
            }
            fabric.backward(Pass(&model, step))?;
            optimizer.step()?;
            optimizer.zero_grad();
        }
        let view = model.view();
        let own =
            || -> Result<Vec<Vec<f32>>> { view.trained().map(|piece| view.read(piece)).collect() };
        let before = own()?;
        let mut state = LoopState::default();
        fabric.notify(Hook::ValidationStart, &mut state.moment().model(&model))?;
        assert_ne!(own()?, before, "the averages stand there");
        fabric.save(&path, State::new().model("model", &model))?;
        fabric.notify(Hook::ValidationEnd, &mut state.moment())?;
        assert_eq!(own()?, before);
        fabric.with_callback(|ema: &mut Ema| {
            let both = folder.join(format!("{strategy}-both.ckpt"));
            fabric.save(
                &both,
                State::new()
                    .model("model", &model)
                    .average("ema", ema, &model),
            )?;
            let averages = ema.read(&view)?;
            ema.update(&view)?; // another value, until it is loaded
            assert_ne!(ema.read(&view)?, averages);
            fabric.load(&both, State::new().average("ema", ema, &model))?;
            assert_eq!(ema.read(&view)?, averages);
            Ok(())
        })?;
        Ok(())
    });
    outcome.unwrap();
    // Averages that were saved beside the model are those that stood in its place.
    let read = |name: &str, prefix: &str| -> Vec<Vec<u32>> {
        let bytes = std::fs::read(folder.join(name)).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |param: usize| {
            let tensor = tensors
                .tensor(&format!("{prefix}.p{}.w{param}", param / 2))
                .unwrap();
            let words = tensor
                .data()
                .chunks(4)
                .map(|word| u32::from_le_bytes(word.try_into().unwrap()));
            words.collect()
        };
        (0..SIZES.len()).map(tensor).collect()
    };
    let whole = read(&format!("{strategy}.ckpt"), "model");
    assert_eq!(read(&format!("{strategy}-both.ckpt"), "ema.average"), whole);
    whole
}

/// A backward through both units, last first.
struct Pass<'a>(&'a fabric::FabricModule<VecModel>, usize);
impl fabric::model::Backward for Pass<'_> {
    fn backward(self, scale: f32) -> fabric_engine::Result<()> {
        use fabric::model::{Edge, UnitId};
        let edge = |unit, edge| {
            let refused =
                |error: Error| fabric_engine::Error::argument(error.to_string(), "see above");
            self.0.unit(UnitId(unit), edge).map_err(refused)
        };
        for unit in [1, 0] {
            edge(unit, Edge::BackwardEnter)?;
            let mut grads = gradients(self.1);
            for (param, grad) in grads.iter_mut().enumerate() {
                if param / 2 != unit {
                    *grad = None;
                }
            }
            self.0.gradients(grads).backward(scale)?;
            edge(unit, Edge::BackwardLeave)?;
        }
        Ok(())
    }
}

#[test]
fn averages_are_the_same_bits_under_every_strategy_and_can_be_saved() {
    let folder = tempfile::tempdir().unwrap();
    let expected = averaged("ddp", folder.path());
    for strategy in &ROWS[1..] {
        assert_eq!(averaged(strategy, folder.path()), expected, "{strategy}");
    }
}

#[test]
fn gradient_norms_are_the_same_under_every_strategy() {
    let expected = {
        let squares = |params: &[usize]| -> f64 {
            let all = gradients(2);
            let grads = params.iter().flat_map(|param| all[*param].clone().unwrap());
            grads
                .map(|x| f64::from(x) * f64::from(x))
                .sum::<f64>()
                .sqrt()
        };
        [
            ("grad_norm", squares(&[0, 1, 2, 3])),
            ("grad_norm/p0", squares(&[0, 1])),
            ("grad_norm/p1", squares(&[2, 3])),
        ]
    };
    for strategy in ROWS {
        let fabric = build(strategy, 4).build().unwrap();
        let outcome = fabric.launch_threads(|fabric| {
            let (model, _) = fabric.setup(model().in_units(["p0", "p1"])?, Sgd::new(0.1))?;
            for unit in 0..2 {
                model.unit(
                    fabric::model::UnitId(unit),
                    fabric::model::Edge::ForwardEnter,
                )?;
                model.unit(
                    fabric::model::UnitId(unit),
                    fabric::model::Edge::ForwardLeave,
                )?;
            }
            fabric.backward(Pass(&model, 2))?;
            GradientStatistics::new(1)
                .groups(1)
                .norms(fabric, &model.view())
        });
        for norms in outcome.unwrap() {
            for (name, norm) in expected {
                let found = norms.get(name).unwrap();
                assert!(
                    (found / norm - 1.0).abs() < 1e-12,
                    "{strategy} {name}: {found} {norm}"
                );
            }
        }
    }
}

/// What a folder holds.
fn names_in(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn checkpoints_are_kept_removed_and_gone_on_from() {
    for strategy in ["ddp", "fsdp"] {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let keep = || {
            let keep = ModelCheckpoint::new(&out)
                .monitor("val_loss", Mode::Min)
                .save_top_k(2);
            build(strategy, 2)
                .callback(keep.after_validation())
                .build()
                .unwrap()
        };
        // Every rank has its own number; rank 0's counts.
        let losses = [0.5, 0.2, 0.9, 0.3, 0.8];
        let outcome = keep().launch_threads(|fabric| train_with(fabric, &losses, None));
        assert_eq!(outcome.unwrap(), [5, 5]);
        let expected = [
            "checkpoints.json",
            "epoch=1-step=2.ckpt", // the best
            "epoch=3-step=4.ckpt", // the second
            "epoch=4-step=5.ckpt", // the last
            "last",
        ];
        assert_eq!(names_in(&out), expected);
        let latest = ModelCheckpoint::latest(&out).unwrap().unwrap();
        assert!(latest.ends_with("epoch=4-step=5.ckpt"));
        assert_eq!(latest.is_dir(), strategy == "fsdp");
        // Go on: the callback knows what is there, and removes it when it is time.
        let outcome =
            keep().launch_threads(|fabric| train_with(fabric, &[0.1, 0.15], Some(&latest)));
        assert_eq!(outcome.unwrap(), [7, 7]);
        let expected = [
            "checkpoints.json",
            "epoch=5-step=6.ckpt",
            "epoch=6-step=7.ckpt",
            "last",
        ];
        assert_eq!(names_in(&out), expected);
    }
}

/// A loop with a validation after each epoch of one step; returns the steps taken.
fn train_with(fabric: &Fabric, losses: &[f64], from: Option<&PathBuf>) -> Result<u64> {
    let (model, mut optimizer) = fabric.setup(model(), AdamW::new(0.1))?;
    let mut state = LoopState::default();
    if let Some(path) = from {
        let mut states = serde_json::Map::new();
        let checkpoint = State::new()
            .model("model", &model)
            .optimizer("optimizer", &mut optimizer);
        let checkpoint = checkpoint.value("progress", &mut state.progress);
        fabric.load(path, checkpoint.value("callbacks", &mut states))?;
        fabric.load_callback_states(&states)?;
    }
    for loss in losses {
        fabric.backward(model.gradients(gradients(state.progress.steps as usize)))?;
        optimizer.step()?;
        optimizer.zero_grad();
        state.progress.steps += 1;
        let own = if fabric.is_global_zero() {
            *loss
        } else {
            -loss
        };
        state.metrics.set("val_loss", own);
        let next = fabric::callback::Progress {
            epoch: state.progress.epoch + 1,
            ..state.progress
        };
        let (mut progress, mut states) = (next, fabric.callback_states()?);
        let mut save = |path: &Path| {
            let checkpoint = State::new()
                .model("model", &model)
                .optimizer("optimizer", &mut optimizer);
            let checkpoint = checkpoint.value("progress", &mut progress);
            fabric.save(path, checkpoint.value("callbacks", &mut states))
        };
        fabric.notify(
            Hook::ValidationEnd,
            &mut state.moment().model(&model).saving(&mut save),
        )?;
        state.progress = next;
    }
    Ok(state.progress.steps)
}

#[test]
fn a_view_reads_and_writes_what_this_rank_updates() {
    for strategy in ROWS {
        let fabric = build(strategy, 4).build().unwrap();
        let outcome = fabric.launch_threads(|fabric| {
            let model = fabric.setup_module(model())?;
            let view = model.view();
            assert_eq!(view.params().len(), SIZES.len());
            let mut held = vec![0f64; SIZES.len()];
            for piece in view.trained() {
                let values = view.read(piece)?;
                held[view.whole(piece).0] += values.len() as f64 / view.copies(piece) as f64;
                assert!(view.write(piece, &[]).is_err() || values.is_empty());
                let doubled: Vec<_> = values.iter().map(|x| x * 2.0).collect();
                view.write(piece, &doubled)?;
                assert_eq!((view.read(piece)?, view.gradient(piece)?), (doubled, None));
            }
            view.publish()?;
            fabric.all_reduce(&mut held, ReduceOp::Sum)?;
            assert_eq!(
                held,
                SIZES.map(|numel| numel as f64),
                "each element counts once"
            );
            // Without units nothing is away: every rank computes with what all have written.
            (0..SIZES.len())
                .map(|param| Ok(model.read(&view.params()[param].name)))
                .collect::<Result<Vec<_>>>()
        });
        for rank in outcome.unwrap() {
            for (param, values) in rank.iter().enumerate() {
                for (at, value) in values.iter().enumerate() {
                    assert_eq!(
                        *value,
                        (param * 10 + at) as f32 * 0.01 * 2.0,
                        "{strategy} {:?}",
                        ParamId(param)
                    );
                }
            }
        }
    }
}
