//! Fabric's verbs beside the training step: clipping, objects, order among ranks, logging, callbacks, loaders, launching.
//! Method: ranks as threads; plain code as the oracle.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use fabric::{
    Clip, Error, Fabric, FabricModule, ReduceOp, Result, State,
    callback::{Hook, at, on},
    data::DataLoader,
    logger::CsvLogger,
    model::ParamId,
    optim::Sgd,
    vec::VecModel,
};
use serde::{Deserialize, Serialize};

use crate::puppet::{Puppet, Script, all_say, ddp, failures};

const SIZES: [usize; 3] = [10_000, 3, 1];

fn gradient(rank: usize, param: usize) -> Vec<f32> {
    let value = |index: usize| ((index * 31 + rank * 17 + param * 7) % 1009) as f32 / 100.0 - 5.0;
    (0..SIZES[param]).map(value).collect()
}

/// A model with averaged gradients, and those gradients.
fn with_gradients(fabric: &Fabric) -> Result<(FabricModule<VecModel>, Vec<Vec<f32>>)> {
    let params = (0..SIZES.len()).map(|param| (format!("p{param}"), vec![0f32; SIZES[param]]));
    let (model, _) = fabric.setup(VecModel::new(params), Sgd::new(0.1))?;
    let rank = fabric.global_rank();
    let mine = (0..SIZES.len()).map(|param| Some(gradient(rank, param)));
    fabric.backward(model.gradients(mine.collect()))?;
    let whole = gradients(&model);
    Ok((model, whole))
}

fn gradients(model: &FabricModule<VecModel>) -> Vec<Vec<f32>> {
    let grad = |param| model.grad(ParamId(param)).unwrap();
    (0..SIZES.len()).map(grad).collect()
}

#[test]
fn clipping_by_norm_scales_all_gradients_and_returns_the_norm_before() {
    let norms = ddp(2).launch_threads(|fabric| {
        let mut norms = Vec::new();
        for (order, max) in [(2.0, 1.0), (f64::INFINITY, 0.5), (2.0, 1e9)] {
            let (model, before) = with_gradients(fabric)?;
            let all = before.concat().into_iter().map(f64::from);
            let naive = match order {
                2.0 => all.map(|x| x * x).sum::<f64>().sqrt(),
                _ => all.map(f64::abs).fold(0.0, f64::max),
            };
            let norm = fabric
                .clip_gradients(&model, Clip::Norm { max, order })?
                .unwrap();
            assert!((norm / naive - 1.0).abs() < 1e-12, "{norm} {naive}");
            let factor = (max / (norm + 1e-6)).min(1.0) as f32;
            let scaled = |grad: &Vec<f32>| grad.iter().map(|x| x * factor).collect::<Vec<_>>();
            assert_eq!(
                gradients(&model),
                before.iter().map(scaled).collect::<Vec<_>>()
            );
            norms.push(norm.to_bits());
        }
        Ok(norms)
    });
    let norms = norms.unwrap();
    assert_eq!(norms[0], norms[1], "ranks agree bit for bit");
}

#[test]
fn clipping_by_value_clamps_each_element() {
    ddp(2)
        .launch_threads(|fabric| {
            let (model, before) = with_gradients(fabric)?;
            assert_eq!(fabric.clip_gradients(&model, Clip::Value(1.5))?, None);
            let clamped =
                |grad: &Vec<f32>| grad.iter().map(|x| x.clamp(-1.5, 1.5)).collect::<Vec<_>>();
            assert_eq!(
                gradients(&model),
                before.iter().map(clamped).collect::<Vec<_>>()
            );
            assert!(fabric.clip_gradients(&model, Clip::Value(-1.0)).is_err());
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_norm_that_is_not_finite_is_an_error_that_leaves_the_gradients_alone() {
    for (poison, order) in [
        (f32::NAN, 2.0),
        (f32::INFINITY, 2.0),
        (f32::NAN, f64::INFINITY),
        (f32::NEG_INFINITY, f64::INFINITY),
    ] {
        let said = failures(2, |fabric| {
            let model = fabric.setup_module(VecModel::new([("w", vec![0f32; 3])]))?;
            let mine = if fabric.global_rank() == 1 {
                poison
            } else {
                1.0
            };
            fabric.backward(model.gradients(vec![Some(vec![1.0, mine, 2.0])]))?;
            let result = fabric.clip_gradients(&model, Clip::Norm { max: 1.0, order });
            assert_eq!(model.grad(ParamId(0)).unwrap()[2], 2.0);
            result
        });
        all_say(&said, &["the gradients' norm is ", "an input may hold NaN"]);
    }
    let said = failures(1, |fabric| {
        let (model, _) = with_gradients(fabric)?;
        fabric.clip_gradients(
            &model,
            Clip::Norm {
                max: 1.0,
                order: 3.0,
            },
        )
    });
    all_say(&said, &["order 3"]);
    let said = failures(1, |fabric| {
        let (model, _) = with_gradients(fabric)?;
        fabric.clip_gradients(&model, Clip::norm(f64::NAN))
    });
    all_say(&said, &["a norm of NaN"]);
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Report {
    name: String,
    loss: f64,
    counts: BTreeMap<String, Vec<i64>>,
    note: Option<String>,
}

impl Report {
    fn of(rank: usize) -> Self {
        Self {
            name: format!("rang {rank} — \u{1f980}").repeat(rank), // rank 0's is empty, lengths differ
            loss: [f64::NAN, f64::NEG_INFINITY, -0.0][rank],
            counts: BTreeMap::from([("a".into(), vec![i64::MIN, rank as i64])]),
            note: (rank == 2).then(String::new),
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        let loss = self.loss.to_bits() == other.loss.to_bits();
        loss && Self {
            loss: 0.0,
            ..self.clone()
        } == Self {
            loss: 0.0,
            ..other.clone()
        }
    }
}

#[test]
fn objects_travel_whole_with_nan_and_strings() {
    ddp(3)
        .launch_threads(|fabric| {
            let rank = fabric.global_rank();
            for (source, report) in fabric
                .all_gather_object(&Report::of(rank))?
                .iter()
                .enumerate()
            {
                assert!(report.is_same(&Report::of(source)), "{report:?}");
            }
            for source in 0..3 {
                let report = fabric.broadcast(Report::of(rank), source)?;
                assert!(report.is_same(&Report::of(source)), "{report:?}");
            }
            assert_eq!(fabric.all_gather_object(&())?, [(); 3]);
            Ok(())
        })
        .unwrap();
}

#[test]
fn objects_of_different_types_are_refused() {
    let outcome = ddp(2).launch_threads(|fabric| {
        if fabric.is_global_zero() {
            return fabric.broadcast("text".to_string(), 0).map(drop);
        }
        let error = fabric.broadcast(7u64, 0).unwrap_err().to_string();
        all_say(
            &[error],
            &[
                "a value of another rank cannot be read",
                "the same type on all ranks",
            ],
        );
        Ok(())
    });
    outcome.unwrap();
    let said = failures(2, |fabric| fabric.broadcast(1u8, 2));
    all_say(&said, &["2"]);
}

#[test]
fn numbers_are_folded_over_the_ranks() {
    ddp(3)
        .launch_threads(|fabric| {
            let mine = fabric.global_rank() as f64 + 1.0;
            for (op, expected) in [
                (ReduceOp::Sum, 6.0),
                (ReduceOp::Avg, 2.0),
                (ReduceOp::Max, 3.0),
                (ReduceOp::Min, 1.0),
            ] {
                assert_eq!(fabric.all_reduce_value(mine, op)?, expected, "{op:?}");
            }
            let whole = fabric.all_gather(&vec![mine as i32; 2])?;
            assert_eq!(whole.as_slice::<i32>(), [1, 1, 2, 2, 3, 3]);
            Ok(())
        })
        .unwrap();
}

#[test]
fn rank_zero_is_first_and_alone() {
    let order = Mutex::new(Vec::new());
    let outcome = ddp(3).launch_threads(|fabric| {
        fabric.rank_zero_first(|| {
            if fabric.is_global_zero() {
                for _ in 0..1000 {
                    std::thread::yield_now(); // the others have every chance to overtake
                }
            }
            order.lock().unwrap().push(fabric.global_rank());
            Ok(fabric.global_rank())
        })
    });
    assert_eq!(outcome.unwrap(), [0, 1, 2]);
    let order = order.into_inner().unwrap();
    assert_eq!((order[0], order.len()), (0, 3));
}

#[test]
fn rank_zeros_failure_keeps_the_others_from_running() {
    let runs = AtomicUsize::new(0);
    let said = failures(3, |fabric| {
        fabric.rank_zero_first(|| -> Result<()> {
            runs.fetch_add(1, Ordering::Relaxed);
            Err(Error::new("the server is asleep"))
        })
    });
    assert_eq!(runs.into_inner(), 1);
    all_say(&said, &["the server is asleep"]);
    all_say(&said[1..], &["rank 0 failed first"]);
}

#[test]
fn line_55_rank_zero_alone_logs_and_every_row_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.csv");
    let fabric = Fabric::builder().devices(3).logger(CsvLogger::at(&path));
    let outcome = fabric.build().unwrap().launch_threads(|fabric| {
        for step in 0..50 {
            fabric.log("loss", fabric.global_rank() as f64 + 0.5, step)?;
        }
        fabric.log_dict(&[("loss", f64::NAN), ("accuracy", 1.0)], 50)
    });
    outcome.unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("step,accuracy,loss"));
    for step in 0..50 {
        assert_eq!(lines.next(), Some(format!("{step},,0.5").as_str()));
    }
    assert_eq!(lines.next(), Some("50,1.0,nan"));
    assert_eq!(lines.next(), None);
}

#[test]
fn callbacks_are_called_in_order_at_setup_at_every_step_and_by_name() {
    let calls = Arc::new(Mutex::new(Vec::new()));
    let note = |name: &'static str, hook: Hook| {
        let calls = calls.clone();
        at(hook, move |_, _| {
            calls.lock().unwrap().push((name, hook));
            Ok(())
        })
    };
    let (setup, step, own) = (Hook::AfterSetup, Hook::AfterOptimizerStep, "on_lunch");
    let mut builder = Fabric::builder().devices(1);
    for hook in [step, setup] {
        builder = builder
            .callback(note("first", hook))
            .callback(note("second", hook));
    }
    builder = builder.callback(on(own, |_, portions: &mut u32| {
        *portions += 1;
        Ok(())
    }));
    let outcome = builder.build().unwrap().launch(|fabric| {
        let (model, mut optimizer) =
            fabric.setup(VecModel::new([("w", vec![0f32])]), Sgd::new(0.1))?;
        assert_eq!(calls.lock().unwrap().len(), 2);
        for _ in 0..2 {
            fabric.backward(model.gradients(vec![Some(vec![1.0])]))?;
            optimizer.step()?;
        }
        let mut portions = 1u32;
        fabric.call(own, &mut portions)?;
        assert_eq!(portions, 2);
        let refused = fabric.call(own, &mut "two").unwrap_err().to_string();
        all_say(&[refused], &["on_lunch", "&str", "u32"]);
        Ok(())
    });
    outcome.unwrap();
    let both = |hook| [("first", hook), ("second", hook)];
    assert_eq!(
        *calls.lock().unwrap(),
        [both(setup), both(step), both(step)].concat()
    );
}

#[test]
fn a_callbacks_error_ends_the_step_but_not_before_the_update() {
    let fabric = Fabric::builder()
        .devices(1)
        .callback(at(Hook::AfterOptimizerStep, |_, _| {
            Err(Error::new("early stop"))
        }));
    let outcome = fabric.build().unwrap().launch(|fabric| {
        let (model, mut optimizer) =
            fabric.setup(VecModel::new([("w", vec![0f32])]), Sgd::new(1.0))?;
        fabric.backward(model.gradients(vec![Some(vec![1.0])]))?;
        assert_eq!(optimizer.step().unwrap_err().to_string(), "early stop");
        Ok(model.read("w"))
    });
    assert_eq!(outcome.unwrap(), Some(vec![-1.0]));
}

#[test]
fn line_13_everything_that_needs_the_job_is_refused_before_launch() {
    let fabric = ddp(2);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("early.safetensors");
    let ran = AtomicUsize::new(0);
    let refusals = [
        fabric.barrier().err(),
        fabric.all_reduce(&mut vec![1f32], ReduceOp::Sum).err(),
        fabric.all_reduce_value(1.0, ReduceOp::Sum).err(),
        fabric.all_gather(&vec![1f32]).err(),
        fabric.all_gather_object(&1).err(),
        fabric.broadcast(1, 0).err(),
        fabric.broadcast(1, 1).err(),
        fabric
            .rank_zero_first(|| Ok(ran.fetch_add(1, Ordering::Relaxed)))
            .err(),
        fabric.setup_module(Puppet::new()).err(),
        fabric.setup_dataloaders(DataLoader::new(vec![1])).err(),
        fabric.save(&path, State::new()).err(),
        fabric.load(&path, State::new()).err(),
        fabric.backward(Script(|| Ok(()))).err(),
        fabric.spent().err(),
        fabric.trace().err(),
        fabric.aborter().err(),
    ];
    for (index, refusal) in refusals.into_iter().enumerate() {
        let text = refusal
            .unwrap_or_else(|| panic!("verb {index} was allowed"))
            .to_string();
        assert!(
            text.contains("the job was not launched. Put the training code into fabric.launch"),
            "verb {index}: {text}"
        );
    }
    assert_eq!(ran.into_inner(), 0, "refused before it ran");
    assert!(!path.exists(), "refused before it was written");
    assert_eq!((fabric.global_rank(), fabric.world_size()), (0, 1));
}

#[test]
fn line_12_a_launch_inside_a_launch_runs_in_place_and_a_second_starts_afresh() {
    let fabric = ddp(1);
    for _ in 0..2 {
        let outcome = fabric.launch(|fabric| {
            let twice = fabric.launch(|fabric| Ok(fabric.world_size()))?;
            assert_eq!(twice, Some(1));
            let model = fabric.setup_module(VecModel::new([("w", vec![0f32; 4])]))?;
            let before = fabric.spent()?;
            fabric.backward(model.gradients(vec![None]))?; // the only model takes part, touched or not
            assert_eq!(fabric.spent()? - before, model.prediction());
            assert_eq!(before.collectives, 0);
            Ok(())
        });
        outcome.unwrap();
        assert!(fabric.barrier().is_err(), "the job is over");
    }
    assert_eq!(
        fabric
            .launch_threads(|fabric| Ok(fabric.world_size()))
            .unwrap(),
        [1]
    );
}

#[test]
fn loaders_that_are_set_up_cover_the_data_anew_every_epoch() {
    let shares = ddp(3).launch_threads(|fabric| {
        let loader = DataLoader::new((0..20).collect::<Vec<usize>>())
            .batch_size(3)
            .shuffle(true)
            .seed(5);
        let loader = fabric.setup_dataloaders(loader)?;
        assert!(
            fabric.setup_dataloaders(loader_of(fabric)?).is_err(),
            "once only"
        );
        let epoch = || loader.iter().collect::<Result<Vec<Vec<usize>>>>();
        Ok([epoch()?.concat(), epoch()?.concat()])
    });
    let shares = shares.unwrap();
    for epoch in 0..2 {
        let lengths = shares.iter().map(|share| share[epoch].len());
        assert_eq!(lengths.collect::<Vec<_>>(), [7; 3]);
        let mut all = shares
            .iter()
            .flat_map(|share| share[epoch].clone())
            .collect::<Vec<_>>();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all, (0..20).collect::<Vec<_>>());
    }
    assert_ne!(shares[0][0], shares[0][1], "epochs differ");
}

fn loader_of(fabric: &Fabric) -> Result<DataLoader<Vec<usize>>> {
    fabric.setup_dataloaders(DataLoader::new(vec![1, 2, 3]))
}

#[test]
fn what_a_backward_costs_is_predicted_on_the_wire_that_was_chosen() {
    for world in [1, 2, 4] {
        ddp(world)
            .launch_threads(|fabric| {
                let (model, _) = with_gradients(fabric)?;
                for _ in 0..2 {
                    let before = fabric.spent()?;
                    let grads = (0..SIZES.len()).map(|param| Some(gradient(0, param)));
                    fabric.backward(model.gradients(grads.collect()))?;
                    let spent = fabric.spent()? - before;
                    assert_eq!(spent, model.prediction());
                    assert_eq!(spent.collectives, model.plan().buckets().len() as u64 + 1);
                    assert_eq!(spent.bytes > 0, world > 1);
                }
                Ok(())
            })
            .unwrap();
    }
}
