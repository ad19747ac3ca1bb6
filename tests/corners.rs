//! Corners where several ideas meet: two models and replicas, a loss scale that changes between micro-batches, clipping and
//! overflow, a backward that fails on one rank, small parameters beside sharded ones. Method: every row must do what plain
//! data parallelism does.

use std::sync::mpsc;

use fabric::{
    Clip, Fabric, Result,
    engine::{
        Error as EngineError,
        shard::{
            placement::FSDP,
            plan::{Options, Plan, Reshard},
        },
    },
    model::{Edge, Model, ParamId, ParamMeta, UnitId},
    optim::Sgd,
    precision::LossScalerState,
    vec::VecModel,
};
use half::f16;

use crate::{
    blocks::{backward, chain, model, uses_extra},
    fsdp::{fabric, small_buckets},
    puppet::{Puppet, Script},
};

const ROWS: [&str; 5] = ["ddp", "zero1", "zero2", "fsdp", "hsdp"];

/// On four ranks; replicas of two under hsdp.
fn four(row: &str, precision: &str) -> Fabric {
    let builder = Fabric::builder().devices(4).strategy(row);
    let builder = builder.precision(precision).buckets(small_buckets());
    let builder = match row {
        "hsdp" => builder.group(2),
        _ => builder,
    };
    builder.build().unwrap()
}

#[test]
fn a_loss_that_leaves_a_model_out_leaves_its_gradients_alone() {
    for row in ROWS {
        let values = four(row, "32-true").launch_threads(|fabric| {
            let one = || VecModel::new([("w", vec![1f32; 6])]);
            let (first, mut first_optimizer) = fabric.setup(one(), Sgd::new(1.0))?;
            let (second, _) = fabric.setup(one(), Sgd::new(1.0))?;
            fabric.backward(first.gradients(vec![Some(vec![0.5; 6])]))?;
            fabric.backward(second.gradients(vec![Some(vec![0.25; 6])]))?;
            first_optimizer.step()?;
            Ok(first.read("w"))
        });
        assert_eq!(values.unwrap(), vec![vec![0.5; 6]; 4], "{row}");
    }
}

#[test]
fn micro_batches_whose_loss_was_scaled_differently_add_in_one_scale() {
    for row in ROWS {
        let values = four(row, "16-mixed").launch_threads(|fabric| {
            let start = VecModel::new([("w", vec![f16::ONE; 6])]);
            let (model, mut optimizer) = fabric.setup(start, Sgd::new(1.0))?;
            let grad = || vec![Some(vec![f16::from_f32(0.125); 6])];
            let scale = |scale| {
                let finite_steps = 0;
                fabric.load_loss_scaler_state(Some(LossScalerState {
                    scale,
                    finite_steps,
                }))
            };
            scale(64.0)?;
            fabric.no_backward_sync(&model, true, || fabric.backward(model.gradients(grad())))?;
            scale(16.0)?;
            fabric.no_backward_sync(&model, true, || fabric.backward(model.gradients(grad())))?;
            scale(32.0)?;
            fabric.backward(model.gradients(grad()))?;
            scale(128.0)?;
            fabric.no_backward_sync(&model, true, || fabric.backward(model.gradients(grad())))?;
            scale(8.0)?;
            fabric.backward(model.gradients(grad()))?;
            optimizer.step()?;
            Ok(model.read("w"))
        });
        let expected = vec![f16::from_f32(1.0 - 5.0 * 0.125); 6];
        assert_eq!(values.unwrap(), vec![expected; 4], "{row}");
    }
}

#[test]
fn clipping_by_value_does_not_hide_an_overflow() {
    for row in ROWS {
        let fabric = four(row, "16-mixed");
        let outcome = fabric.launch_threads(|fabric| {
            let start = VecModel::new([("w", vec![f16::ONE; 6])]);
            let (model, mut optimizer) = fabric.setup(start, Sgd::new(1.0))?;
            let large = f16::from_f32(f32::from(fabric.global_rank() == 3) * 2.0); // times 65536 is no f16
            fabric.backward(model.gradients(vec![Some(vec![large; 6])]))?;
            fabric.clip_gradients(&model, Clip::Value(0.5))?;
            optimizer.step()?;
            assert!(optimizer.was_skipped(), "{row}");
            assert_eq!(model.read("w"), [f16::ONE; 6], "{row}");
            Ok(())
        });
        outcome.unwrap();
    }
}

#[test]
fn a_micro_batch_that_fails_on_one_rank_ends_the_job_where_others_wait_for_it() {
    for row in ["zero2", "fsdp", "hsdp"] {
        let (sender, failed) = mpsc::channel();
        let outcome = four(row, "32-true").launch_threads(|fabric| {
            let model = fabric.setup_module(Puppet::new().param("w", &[1f32; 8]))?;
            let grad = || model.ready(0, vec![1f32; 8]);
            let first = fabric.no_backward_sync(&model, true, || match fabric.global_rank() {
                1 => fabric.backward(Script(|| Err(EngineError::argument("no luck", "Hope")))),
                _ => fabric.backward(Script(grad)),
            });
            // Whoever carries on regardless must not meet the others' last micro-batch with its next one.
            let second = fabric.backward(Script(grad));
            let both = (fabric.global_rank(), first.is_err(), second.is_err());
            sender.send(both).unwrap();
            first.and(second)
        });
        assert!(outcome.is_err(), "{row}");
        drop(sender);
        let group = match row {
            "hsdp" => vec![0, 1], // the others' micro-batch does without
            _ => vec![0, 1, 2, 3],
        };
        for (rank, first, second) in failed {
            assert!(!group.contains(&rank) || first, "{row}: rank {rank}");
            assert!(second, "{row}: rank {rank}");
        }
    }
}

#[test]
fn plans_that_move_other_things_have_other_hashes() {
    let plan = |units: [usize; 4], change: &dyn Fn(&mut ParamMeta), options: &Options| {
        let params = units.into_iter().enumerate().map(|(index, unit)| {
            let meta = ParamMeta::new(
                format!("p{index}"),
                &[4],
                fabric::engine::kernels::Dtype::F32,
            );
            let mut meta = meta.in_unit(UnitId(unit));
            change(&mut meta);
            meta
        });
        let units = vec!["a".into(), "b".into()];
        Plan::with_units(FSDP, 2, params.collect(), units, options).unwrap()
    };
    let usual = Options::default();
    let one = plan([0, 0, 1, 1], &|_| (), &usual).hash();
    assert_eq!(one, plan([0, 0, 1, 1], &|_| (), &usual).hash());
    assert_ne!(one, plan([0, 1, 0, 1], &|_| (), &usual).hash(), "members");
    let whole = Options {
        replicate_below: 5,
        ..usual.clone()
    };
    assert_ne!(
        plan([0, 0, 1, 1], &|_| (), &usual).facts().last(),
        plan([0, 0, 1, 1], &|_| (), &whole).facts().last(),
        "small ones stay whole"
    );
    let tie = |meta: &mut ParamMeta| meta.tied.push(Some(UnitId(1)));
    assert_ne!(one, plan([0, 0, 1, 1], &tie, &usual).hash(), "ties");
}

#[test]
fn several_micro_batches_send_what_the_forecast_adds_up() {
    for reshard_after_forward in [Reshard::Yes, Reshard::No, Reshard::Within(2)] {
        let options = Options {
            reshard_after_forward,
            ..small_buckets()
        };
        let outcome = fabric("fsdp", 4, &options).launch_threads(|fabric| {
            let rank = fabric.global_rank();
            let (model, mut optimizer) = fabric.setup(model::<f32>(), Sgd::new(0.01))?;
            let chain = chain(&model, uses_extra(rank));
            for step in 0..2 {
                let before = fabric.spent()?;
                for batch in 0..3 {
                    fabric.no_backward_sync(&model, batch < 2, || {
                        backward(fabric, &model, &chain, rank, step, batch)
                    })?;
                }
                optimizer.step()?;
                optimizer.zero_grad();
                let sent = fabric.spent()? - before;
                assert_eq!(sent, model.forecast().total(3), "{reshard_after_forward:?}");
            }
            Ok(())
        });
        outcome.unwrap();
    }
}

#[test]
fn small_parameters_beside_sharded_ones_take_no_further_block() {
    let options = Options {
        bucket_bytes: 24,
        first_bucket_bytes: 24,
        replicate_below: 7,
        ..small_buckets()
    };
    let outcome = fabric("fsdp", 2, &options).launch_threads(|fabric| {
        let rank = fabric.global_rank();
        let (model, _) = fabric.setup(model::<f32>(), Sgd::new(0.01))?;
        let chain = chain(&model, uses_extra(rank));
        for step in 0..3 {
            backward(fabric, &model, &chain, rank, step, 0)?;
        }
        let (_, blocks) = model.plan().reduce_blocks();
        assert_eq!(model.working_set().reduce_blocks, blocks);
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn values_that_are_asked_for_twice_are_lent_once() {
    let (sender, done) = mpsc::channel();
    std::thread::spawn(move || {
        let model = VecModel::new([("w", vec![1f32; 2])]);
        let twice = [ParamId(0), ParamId(0)];
        let _ = sender.send(model.lent(&twice, |values| values.concat()).unwrap());
    });
    let values = done.recv_timeout(std::time::Duration::from_secs(20));
    assert_eq!(values.expect("no lock waits for itself"), [1.0; 4]);
}

/// Units that hold nothing to gather, parameters of no elements, and ranks that own nothing.
#[test]
fn what_is_empty_is_in_nobodys_way() -> Result<()> {
    for row in ROWS {
        for replicate_below in [0, 3] {
            let options = Options {
                replicate_below,
                group: (row == "hsdp").then_some(4),
                ..small_buckets()
            };
            let ranks = fabric(row, 4, &options).launch_threads(|fabric| {
                let params = [("a.none", 0), ("a.one", 1), ("b.two", 2), ("c.none", 0)];
                let params = params.map(|(name, numel)| (name, vec![1f32; numel]));
                let model = VecModel::new(params).in_units(["a", "b", "c"])?;
                let (model, mut optimizer) = fabric.setup(model, Sgd::new(1.0))?;
                let mut seen = Vec::new();
                for _ in 0..2 {
                    seen.clear();
                    for unit in 0..3 {
                        model.unit(UnitId(unit), Edge::ForwardEnter)?;
                        for (index, meta) in model.params().iter().enumerate() {
                            if meta.unit == Some(UnitId(unit)) {
                                seen.push(model.lent(&[ParamId(index)], |v| v[0].to_vec())?);
                            }
                        }
                        model.unit(UnitId(unit), Edge::ForwardLeave)?;
                    }
                    let grads = model.params().iter();
                    let grads = grads.map(|meta| Some(vec![0.25; meta.numel()]));
                    fabric.backward(model.gradients(grads.collect()))?;
                    fabric.clip_gradients(&model, Clip::norm(10.0))?;
                    optimizer.step()?;
                    optimizer.zero_grad();
                }
                Ok(seen)
            })?;
            let expected = vec![vec![], vec![0.75], vec![0.75; 2], vec![]];
            assert_eq!(ranks, vec![expected; 4], "{row}");
        }
    }
    Ok(())
}

#[test]
fn a_prefetch_of_everything_takes_a_block_for_each_other_unit() {
    let blocks = |prefetch: usize| {
        let options = Options {
            prefetch,
            ..small_buckets()
        };
        let ranks = fabric("fsdp", 2, &options).launch_threads(|fabric| {
            let rank = fabric.global_rank();
            let (model, mut optimizer) = fabric.setup(model::<f32>(), Sgd::new(0.01))?;
            let chain = chain(&model, uses_extra(rank));
            for step in 0..2 {
                backward(fabric, &model, &chain, rank, step, 0)?;
                optimizer.step()?;
                optimizer.zero_grad();
            }
            let (_, planned) = model.plan().gather_blocks();
            let spent = fabric.spent()?;
            Ok((planned, model.working_set().gather_blocks, spent))
        });
        ranks.unwrap().swap_remove(0)
    };
    let (planned, used, spent) = blocks(usize::MAX);
    assert_eq!((planned, used), (3, 3));
    assert_eq!((planned, used, spent), blocks(3));
}
