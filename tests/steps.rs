//! Training steps through Fabric: what parameters without a gradient, mistakes, and ranks that fail do to the others.
//! Method: ranks as threads; where something must fail, what every rank says of it.

use std::sync::{Barrier, Mutex};

use fabric::{
    Error, Fabric, FabricModule, Result,
    model::ParamId,
    optim::{AdamW, Sgd},
    vec::VecModel,
};
use fabric_engine::comm::Spent;
use fabric_tests::Problem;
use half::bf16;

use crate::puppet::{Puppet, Script, all_say, ddp, failures};

const RATE: f64 = 0.1;

/// A puppet with two parameters of four elements, set up.
fn pair(fabric: &Fabric) -> Result<FabricModule<Puppet>> {
    let model = Puppet::new()
        .param("first", &[1f32; 4])
        .param("second", &[1f32; 4]);
    Ok(fabric.setup(model, Sgd::new(RATE))?.0)
}

#[test]
fn a_parameter_unused_everywhere_has_no_gradient_and_stays_as_it_is() {
    ddp(3)
        .launch_threads(|fabric| {
            let model = VecModel::new([("used", vec![1f32; 3]), ("idle", vec![1f32; 3])]);
            let (model, mut optimizer) = fabric.setup(model, AdamW::new(RATE).weight_decay(0.5))?;
            for _ in 0..3 {
                fabric.backward(model.gradients(vec![Some(vec![1.0; 3]), None]))?;
                assert_eq!(model.grad(ParamId(1)), None);
                optimizer.step()?;
                optimizer.zero_grad();
            }
            assert_eq!(model.read("idle"), [1.0; 3], "no decay without a gradient");
            assert!(model.read("used")[0] < 1.0);
            let warnings = fabric.warnings();
            assert_eq!(warnings.len(), 1, "{warnings:?}");
            assert!(warnings[0].contains("'idle' on any rank"), "{warnings:?}");
            assert!(!warnings[0].contains("'used'"), "{warnings:?}");
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_parameter_unused_on_some_ranks_counts_there_as_zero() {
    ddp(3)
        .launch_threads(|fabric| {
            let model = VecModel::new([("all", vec![0f32; 2]), ("some", vec![0f32; 2])]);
            let (model, mut optimizer) = fabric.setup(model, Sgd::new(1.0))?;
            for _ in 0..2 {
                let some = (fabric.global_rank() == 1).then(|| vec![6.0, -3.0]);
                fabric.backward(model.gradients(vec![Some(vec![1.0; 2]), some]))?;
                assert_eq!(model.grad(ParamId(1)), Some(vec![2.0, -1.0]));
                optimizer.step()?;
                optimizer.zero_grad();
            }
            assert_eq!(model.read("some"), [-4.0, 2.0]);
            let warnings = fabric.warnings();
            assert_eq!(warnings.len(), 1, "{warnings:?}");
            assert!(
                warnings[0].contains("'some' on some of the ranks"),
                "{warnings:?}"
            );
            Ok(())
        })
        .unwrap();
}

#[test]
fn both_kinds_of_unused_parameters_are_reported_also_when_they_come_apart() {
    ddp(2)
        .launch_threads(|fabric| {
            let model = VecModel::new([("a", vec![0f32]), ("b", vec![0f32]), ("c", vec![0f32])]);
            let (model, mut optimizer) = fabric.setup(model, Sgd::new(1.0))?;
            let one = || Some(vec![1f32]);
            let mine = fabric.is_global_zero();
            for use_of in [
                [one(), one(), one()],
                [one(), if mine { one() } else { None }, one()], // one rank, one step: nobody may wait for ever
                [one(), one(), None],
                [one(), if mine { one() } else { None }, None],
            ] {
                fabric.backward(model.gradients(use_of.to_vec()))?;
                optimizer.step()?;
                optimizer.zero_grad();
            }
            let warnings = fabric.warnings();
            assert_eq!(warnings.len(), 2, "each kind once: {warnings:?}");
            assert!(warnings[0].contains("'b' on some"), "{warnings:?}");
            assert!(warnings[1].contains("'c' on any"), "{warnings:?}");
            assert_eq!((model.read("b"), model.read("c")), (vec![-3.0], vec![-2.0]));
            Ok(())
        })
        .unwrap();
}

/// Train the small problem, each batch of 12 in `micro_batches` pieces; every rank's parameters.
fn trained(strategy: &str, world: usize, micro_batches: usize) -> Vec<Vec<f32>> {
    let fabric = Fabric::builder().devices(world).strategy(strategy);
    let fabric = fabric.build().unwrap();
    let outcome = fabric.launch_threads(|fabric| {
        let problem = Problem::new(9);
        let (model, mut optimizer) = fabric.setup(problem.model(), Sgd::new(RATE))?;
        for step in 0..4 {
            let size = 12 / micro_batches;
            for index in 0..micro_batches {
                let first = (step * world + fabric.global_rank()) * 12 + index * size;
                let batch = (first..first + size).collect::<Vec<_>>();
                let (_, gradients) = problem.loss(&model, &batch)?;
                let (before, last) = (fabric.spent()?, index + 1 == micro_batches);
                fabric.no_backward_sync(&model, !last, || {
                    let scale = 1.0 / micro_batches as f32;
                    fabric.backward_scaled(model.gradients(gradients), scale)
                })?;
                let cost = fabric.spent()? - before;
                let due = if last {
                    model.prediction()
                } else {
                    Spent::default()
                };
                assert_eq!(cost, due, "collectives at the end only");
            }
            optimizer.step()?;
            optimizer.zero_grad();
        }
        Ok([model.read("weight"), model.read("bias")].concat())
    });
    outcome.unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn accumulated_micro_batches_are_the_big_batch_to_rounding() {
    let [small, big] = [4, 1].map(|micro_batches| trained("ddp", 2, micro_batches));
    assert_eq!(bits(&small[0]), bits(&small[1]), "ranks agree bit for bit");
    for (a, b) in small[0].iter().zip(&big[0]) {
        assert!((a - b).abs() < 1e-5, "{small:?} {big:?}");
    }
    assert!(
        big[0].iter().any(|value| value.abs() > 0.05),
        "it has learned something"
    );
}

#[test]
fn strategies_that_reduce_at_the_same_moment_agree_bit_for_bit() {
    for micro_batches in [1, 3] {
        let [single, ddp] = ["single", "ddp"].map(|strategy| trained(strategy, 1, micro_batches));
        assert_eq!(
            bits(&single[0]),
            bits(&ddp[0]),
            "{micro_batches} micro-batches"
        );
    }
}

#[test]
fn an_error_inside_no_backward_sync_leaves_the_next_backward_synchronised() {
    ddp(2)
        .launch_threads(|fabric| {
            let model = pair(fabric)?;
            let failed = fabric.no_backward_sync(&model, true, || -> Result<()> {
                Err(Error::new("no data"))
            });
            assert_eq!(failed.unwrap_err().to_string(), "no data");
            let before = fabric.spent()?;
            fabric.backward(Script(|| model.ready(0, vec![1f32; 4])))?;
            assert_eq!(fabric.spent()? - before, model.prediction());
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_hook_that_fires_twice_ends_every_rank() {
    let said = failures(3, |fabric| {
        let model = pair(fabric)?;
        let mine = fabric.global_rank() == 1;
        fabric.backward(Script(|| {
            model.ready(1, vec![1f32; 4])?;
            if mine {
                let _ = model.ready(1, vec![1f32; 4]); // a library may swallow it: the engine must not
            }
            model.ready(0, vec![1f32; 4]).or(Ok(()))
        }))
    });
    all_say(
        &said,
        &[
            "the gradient of 'second' became ready twice in one backward",
            "rank 1",
        ],
    );
}

#[test]
fn a_gradient_of_the_wrong_length_ends_every_rank() {
    let said = failures(2, |fabric| {
        let model = pair(fabric)?;
        let numel = 4 + fabric.global_rank();
        fabric.backward(Script(|| model.ready(0, vec![1f32; numel])))
    });
    all_say(
        &said,
        &["rank 1: the gradient of 'first' has 5 elements, the parameter 4"],
    );
}

#[test]
fn a_gradient_for_no_parameter_ends_every_rank() {
    let said = failures(2, |fabric| {
        let model = pair(fabric)?;
        let param = if fabric.is_global_zero() { 7 } else { 1 };
        fabric.backward(Script(|| model.ready(param, vec![1f32; 4])))
    });
    all_say(&said, &["rank 0: a gradient for parameter 7 of 2. "]);
}

#[test]
fn a_gradient_outside_backward_is_refused() {
    let said = failures(2, |fabric| {
        let model = pair(fabric)?;
        if !fabric.is_global_zero() {
            let error = model.ready(0, vec![1f32; 4]).unwrap_err();
            all_say(
                &[error.to_string()],
                &["rank 1: ", "'first' became ready outside fabric.backward"],
            );
        }
        fabric.backward(Script(|| model.ready(0, vec![1f32; 4])))
    });
    all_say(
        &said,
        &[
            "outside fabric.backward",
            "Call fabric.backward(loss) instead",
        ],
    );
}

#[test]
fn backward_inside_backward_is_refused() {
    let said = failures(2, |fabric| {
        let model = pair(fabric)?;
        fabric.backward(Script(|| {
            let inner = fabric.backward(Script(|| Ok(())));
            let text = inner.unwrap_err().to_string();
            Err(fabric_engine::Error::argument(text, ""))
        }))?;
        drop(model);
        Ok(())
    });
    all_say(&said, &["backward was called inside backward"]);
}

#[test]
fn backward_without_a_model_is_refused() {
    let said = failures(2, |fabric| fabric.backward(Script(|| Ok(()))));
    all_say(
        &said,
        &["backward without a model. Call fabric.setup(model, optimizer) first"],
    );
    let stray = VecModel::new([("w", vec![0f32])]);
    let said = failures(2, |fabric| {
        let model = pair(fabric)?;
        let result = fabric.backward(stray.gradients(vec![Some(vec![1f32])]));
        drop(model);
        result
    });
    all_say(&said, &["a model that was not set up", "Call fabric.setup"]);
}

#[test]
fn line_16_ranks_with_different_models_say_where_they_differ() {
    let base = || Puppet::new().param("a", &[0f32; 6]);
    type Change = fn(Puppet) -> Puppet;
    let cases: [(Change, [&str; 2]); 5] = [
        (
            |_| Puppet::new().param("b", &[0f32; 6]),
            ["parameter 'a': f32 [6]", "parameter 'b': f32 [6]"],
        ),
        (
            |model| model.shape(&[2, 3]),
            ["parameter 'a': f32 [6]", "parameter 'a': f32 [2, 3]"],
        ),
        (
            |_| Puppet::new().param("a", &[0f64; 6]),
            ["parameter 'a': f32 [6]", "parameter 'a': f64 [6]"],
        ),
        (
            Puppet::frozen,
            ["parameter 'a': f32 [6]", "parameter 'a': f32 [6], frozen"],
        ),
        (
            |model| model.param("c", &[0f32]),
            ["rank 0 has bucket 0", "rank 2 has parameter 'c'"],
        ),
    ];
    for (change, words) in cases {
        let said = failures(3, |fabric| {
            let model = base();
            let odd = fabric.global_rank() == 2;
            fabric.setup_module(if odd { change(model) } else { model })
        });
        all_say(&said, &["rank 0 and rank 2 set up different models"]);
        all_say(&said, &words);
    }
}

#[test]
fn a_model_that_only_one_rank_cannot_train_ends_every_rank() {
    let said = failures(2, |fabric| match fabric.global_rank() {
        0 => fabric.setup_module(Puppet::new().param("a", &[0f32])),
        _ => fabric.setup_module(Puppet::new().param("a", &[0i64])),
    });
    all_say(
        &said,
        &["gradients of type i64. Train float parameters; freeze the others"],
    );
}

#[test]
fn every_rank_starts_from_rank_zeros_values_of_any_type() {
    let build = |rank: usize| {
        let wide = [1.0 / 3.0 + rank as f64, f64::MIN_POSITIVE, -0.0];
        let small = wide.map(bf16::from_f64);
        Puppet::new()
            .param("wide", &wide)
            .param("small", &small)
            .param("counts", &[7 + rank as i64, i64::MIN])
            .frozen()
            .param("single", &wide.map(|value| value as f32))
            .param("more wide", &[rank as f64])
            .frozen()
            .param("nothing", &[0f32; 0])
    };
    let bytes = ddp(3).launch_threads(|fabric| {
        let model = build(fabric.global_rank());
        assert_eq!(fabric.is_global_zero(), model.bytes() == build(0).bytes());
        Ok(fabric.setup_module(model)?.bytes())
    });
    assert_eq!(bytes.unwrap(), vec![build(0).bytes(); 3]);
}

#[test]
fn types_are_trained_side_by_side() {
    let trained = ddp(2).launch_threads(|fabric| {
        let half = bf16::ONE;
        let model = Puppet::new()
            .param("wide", &[1f64])
            .param("small", &[half])
            .param("counts", &[3i64])
            .frozen();
        let (model, mut optimizer) = fabric.setup(model, Sgd::new(0.5).momentum(0.9))?;
        let rank = fabric.global_rank() as f64;
        fabric.backward(Script(|| {
            model.ready(2, vec![1i64])?; // frozen: left with the library
            model.ready(1, vec![half])?;
            model.ready(0, vec![rank])
        }))?;
        optimizer.step()?;
        Ok(model.bytes())
    });
    let expected = [
        0.75f64.to_le_bytes().to_vec(),
        vec![0, 0x3f],
        3i64.to_le_bytes().to_vec(),
    ];
    assert_eq!(trained.unwrap(), vec![expected.to_vec(); 2]);
}

#[test]
fn an_error_during_backward_ends_the_others() {
    let said = failures(3, |fabric| {
        let model = pair(fabric)?;
        let broken = fabric.global_rank() == 2;
        fabric.backward(Script(|| {
            model.ready(1, vec![1f32; 4])?;
            if broken {
                return Err(fabric_engine::Error::argument("out of memory", "Buy some"));
            }
            model.ready(0, vec![1f32; 4])
        }))
    });
    all_say(&said, &["out of memory"]);
}

#[test]
fn an_error_during_backward_that_is_caught_still_ends_the_others() {
    // A rank that goes on after half a backward would add zeros to everybody's gradients.
    let said = failures(2, |fabric| {
        let model = pair(fabric)?;
        let broken = fabric.global_rank() == 1;
        let result = fabric.backward(Script(|| match broken {
            true => Err(fabric_engine::Error::argument("out of memory", "Buy some")),
            false => model.ready(0, vec![1f32; 4]),
        }));
        if broken {
            assert!(result.is_err());
            return fabric.barrier();
        }
        result
    });
    all_say(&said, &["out of memory"]);
}

#[test]
fn a_panic_during_backward_ends_the_others() {
    let said = Mutex::new(String::new());
    let set_up = Barrier::new(2);
    let outcome = ddp(2).launch_threads(|fabric| {
        let model = pair(fabric)?;
        set_up.wait();
        let broken = fabric.global_rank() == 1;
        let result = fabric.backward(Script(|| {
            assert!(!broken, "this panic is part of the test");
            model.ready(0, vec![1f32; 4])
        }));
        *said.lock().unwrap() = result.as_ref().unwrap_err().to_string();
        result
    });
    let text = outcome.unwrap_err().to_string();
    assert!(
        text.contains("rank 1 panicked: this panic is part of the test"),
        "{text}"
    );
    let text = said.into_inner().unwrap();
    assert!(text.contains("this panic is part of the test"), "{text}");
}

#[test]
fn of_two_models_a_loss_moves_only_the_one_it_touches() {
    ddp(2)
        .launch_threads(|fabric| {
            let network = |name: &str| VecModel::new([(name.to_string(), vec![1f32; 5])]);
            let (generator, mut by_generator) = fabric.setup(network("g"), Sgd::new(RATE))?;
            let (judge, mut by_judge) = fabric.setup(network("d"), AdamW::new(RATE))?;
            let grad = || vec![Some(vec![fabric.global_rank() as f32; 5])];
            let before = fabric.spent()?;
            fabric.backward(judge.gradients(grad()))?;
            assert_eq!(fabric.spent()? - before, judge.prediction());
            assert_eq!(
                (generator.grad(ParamId(0)), judge.grad(ParamId(0))),
                (None, Some(vec![0.5; 5]))
            );
            by_generator.step()?;
            by_judge.step()?;
            assert_eq!(generator.read("g"), [1.0; 5]);
            assert!(judge.read("d")[0] < 1.0);
            fabric.backward(generator.gradients(grad()))?;
            assert_eq!(
                judge.grad(ParamId(0)),
                Some(vec![0.5; 5]),
                "not reduced again"
            );
            by_generator.step()?;
            assert_eq!(generator.read("g"), [0.95; 5]);
            assert_eq!(fabric.warnings(), Vec::<String>::new());
            Ok(())
        })
        .unwrap();
}

#[test]
fn ranks_whose_losses_touch_different_models_are_told_so() {
    let said = failures(2, |fabric| {
        let network = |name: &str| VecModel::new([(name.to_string(), vec![1f32; 5])]);
        let first = fabric.setup_module(network("g"))?;
        let second = fabric.setup_module(VecModel::new([("d", vec![1f32; 9])]))?;
        match fabric.global_rank() {
            0 => fabric.backward(first.gradients(vec![Some(vec![1.0; 5])])),
            _ => fabric.backward(second.gradients(vec![Some(vec![1.0; 9])])),
        }
    });
    all_say(&said, &["diverged", "bucket 0", "5 x f32", "9 x f32"]);
}
