//! Sharded gradients and parameters do what replicated ones do, to the bit. Method: the same training under every row,
//! compared with one device that is given the gradients which the canonical tree makes of all ranks'.

use fabric::{
    Clip, Fabric, Result,
    engine::shard::plan::{Accumulate, Options, Reshard, ShardBy},
    model::{Backward, Model, ParamId},
    optim::{AdamW, Sgd},
};

use crate::blocks::{backward, chain, model, read, sample, uses_extra};

const STEPS: usize = 20;

pub(crate) fn fabric(strategy: &str, world: usize, options: &Options) -> Fabric {
    Fabric::builder()
        .devices(world)
        .strategy(strategy)
        .buckets(options.clone())
        .build()
        .unwrap()
}

/// When gradients are added over ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Moment {
    /// After the last micro-batch.
    Last,
    /// In each micro-batch.
    Each,
    /// In each within groups of this many ranks, then over groups.
    Groups(usize),
}

type Grads = Vec<Option<Vec<f32>>>;

fn add(left: Grads, right: Grads) -> Grads {
    let sum = |(left, right): (Option<Vec<f32>>, Option<Vec<f32>>)| match (left, right) {
        (Some(left), Some(right)) => Some(left.iter().zip(&right).map(|(a, b)| a + b).collect()),
        (one, other) => one.or(other),
    };
    left.into_iter().zip(right).map(sum).collect()
}

/// The canonical tree: neighbours, then neighbours of those.
fn tree(mut leaves: Vec<Grads>) -> Grads {
    while leaves.len() > 1 {
        let mut next = Vec::new();
        let mut rest = leaves.into_iter();
        while let Some(left) = rest.next() {
            next.push(match rest.next() {
                Some(right) => add(left, right),
                None => left,
            });
        }
        leaves = next;
    }
    leaves.remove(0)
}

fn mean(grads: Grads, world: usize) -> Grads {
    let factor = (1.0 / world as f64) as f32;
    let scale = |grad: Vec<f32>| grad.into_iter().map(|x| x * factor).collect();
    grads.into_iter().map(|grad| grad.map(scale)).collect()
}

/// Collects what a backward reports.
struct Collect(std::sync::Mutex<Grads>);

impl fabric::model::Events for Collect {
    fn ready(
        &self,
        param: ParamId,
        grad: &dyn fabric::engine::buffer::Buffer,
    ) -> fabric::engine::Result<fabric::model::Keep> {
        let mut copy = vec![0f32; grad.numel()];
        grad.read(
            0..grad.numel(),
            fabric::engine::kernels::SpanMut::of(&mut copy),
        )?;
        self.0.lock().unwrap()[param.0] = Some(copy);
        Ok(fabric::model::Keep::Drop)
    }
    fn unit(&self, _: fabric::model::UnitId, _: fabric::model::Edge) -> fabric::engine::Result<()> {
        Ok(())
    }
}

/// What one rank's backward gives, by a model of its own with the values of `twin`.
fn gradients(values: &[Vec<f32>], rank: usize, step: usize, batch: usize) -> Grads {
    let model = model::<f32>();
    for (index, values) in values.iter().enumerate() {
        model.acquire(ParamId(index)).unwrap();
        let span = fabric::engine::kernels::Span::of(values);
        model
            .with(ParamId(index), &mut |buffer| {
                buffer.write(0..span.len(), span)
            })
            .unwrap();
    }
    let collect = std::sync::Arc::new(Collect(vec![None; values.len()].into()));
    model.attach(collect.clone());
    let chain = chain(&model, uses_extra(rank));
    let (input, target) = sample(rank, step, batch);
    let pass = chain.forward(&model, input).unwrap();
    let error = pass
        .output()
        .iter()
        .zip(&target)
        .map(|(y, t)| y - t)
        .collect();
    pass.loss(error).backward(1.0).unwrap();
    collect.0.lock().unwrap().clone()
}

/// The parameters' bits after training on one device with the gradients of `world` ranks.
fn oracle(world: usize, batches: usize, moment: Moment, clip: Option<Clip>) -> Vec<u32> {
    fabric("single", 1, &Options::default())
        .launch(|fabric| {
            let (model, mut optimizer) =
                fabric.setup(model::<f32>(), AdamW::new(0.02).weight_decay(0.1))?;
            for step in 0..STEPS {
                let values = (0..model.params().len())
                    .map(|param| model.lent(&[ParamId(param)], |values| values[0].to_vec()))
                    .collect::<Result<Vec<_>, _>>()?;
                let leaf = |rank: usize, batch: usize| gradients(&values, rank, step, batch);
                let sum_batches = |f: &dyn Fn(usize) -> Grads| {
                    (1..batches).fold(f(0), |sum, batch| add(sum, f(batch)))
                };
                let total = match moment {
                    Moment::Last => mean(
                        tree(
                            (0..world)
                                .map(|rank| sum_batches(&|batch| leaf(rank, batch)))
                                .collect(),
                        ),
                        world,
                    ),
                    Moment::Each => sum_batches(&|batch| {
                        mean(
                            tree((0..world).map(|rank| leaf(rank, batch)).collect()),
                            world,
                        )
                    }),
                    Moment::Groups(size) => {
                        let group = |first: usize| {
                            let ranks = first..first + size;
                            sum_batches(&|batch| {
                                tree(ranks.clone().map(|rank| leaf(rank, batch)).collect())
                            })
                        };
                        mean(tree((0..world).step_by(size).map(group).collect()), world)
                    }
                };
                fabric.backward(model.gradients(total))?;
                if let Some(clip) = clip {
                    fabric.clip_gradients(&model, clip)?;
                }
                optimizer.step()?;
                optimizer.zero_grad();
            }
            read(&model)
        })
        .unwrap()
        .unwrap()
}

/// The parameters' bits after training under a strategy; all ranks must have the same.
fn train(
    strategy: &str,
    world: usize,
    options: &Options,
    batches: usize,
    clip: Option<Clip>,
) -> Vec<u32> {
    let ranks = fabric(strategy, world, options)
        .launch_threads(|fabric| {
            let rank = fabric.global_rank();
            let (model, mut optimizer) =
                fabric.setup(model::<f32>(), AdamW::new(0.02).weight_decay(0.1))?;
            let chain = chain(&model, uses_extra(rank));
            for step in 0..STEPS {
                for batch in 0..batches {
                    let last = batch + 1 == batches;
                    fabric.no_backward_sync(&model, !last, || {
                        backward(fabric, &model, &chain, rank, step, batch)
                    })?;
                }
                if let Some(clip) = clip {
                    fabric.clip_gradients(&model, clip)?;
                }
                optimizer.step()?;
                optimizer.zero_grad();
            }
            read(&model)
        })
        .unwrap();
    assert!(ranks.iter().all(|rank| *rank == ranks[0]), "ranks agree");
    ranks.into_iter().next().unwrap()
}

pub(crate) fn small_buckets() -> Options {
    Options {
        bucket_bytes: 120,
        first_bucket_bytes: 60,
        ..Options::default()
    }
}

#[test]
fn line_37_every_row_ends_with_the_bits_of_one_device() {
    for world in [1, 2, 3, 4, 8] {
        for clip in [None, Some(Clip::norm(0.5))] {
            let expected = oracle(world, 1, Moment::Each, clip);
            for strategy in ["ddp", "zero1", "zero2", "fsdp"] {
                let bits = train(strategy, world, &small_buckets(), 1, clip);
                assert_eq!(bits, expected, "{strategy} on {world} ranks, {clip:?}");
            }
        }
    }
}

#[test]
fn groups_of_ranks_end_with_the_bits_of_one_device() {
    for (world, group) in [(4, 2), (8, 2), (8, 4)] {
        for (batches, moment) in [(1, Moment::Each), (3, Moment::Groups(group))] {
            let clip = Some(Clip::norm(0.5));
            let options = Options {
                group: Some(group),
                ..small_buckets()
            };
            let bits = train("hsdp", world, &options, batches, clip);
            assert_eq!(
                bits,
                oracle(world, batches, moment, clip),
                "groups of {group} in {world} ranks, {batches} micro-batches"
            );
        }
    }
}

#[test]
fn accumulated_micro_batches_end_with_the_bits_of_one_device_that_adds_them_at_the_same_moment() {
    let keep = Options {
        accumulate: Accumulate::Keep,
        ..small_buckets()
    };
    for world in [1, 2, 3, 4, 8] {
        let clip = Some(Clip::norm(0.5));
        let last = oracle(world, 3, Moment::Last, clip);
        for (strategy, options) in [
            ("ddp", small_buckets()),
            ("zero1", small_buckets()),
            ("zero2", keep.clone()),
            ("fsdp", keep.clone()),
        ] {
            let bits = train(strategy, world, &options, 3, clip);
            assert_eq!(bits, last, "{strategy} on {world} ranks, reduced once");
        }
        let each = oracle(world, 3, Moment::Each, clip);
        for strategy in ["zero2", "fsdp"] {
            let bits = train(strategy, world, &small_buckets(), 3, clip);
            assert_eq!(bits, each, "{strategy} on {world} ranks, reduced each time");
        }
    }
}

#[test]
fn line_40_every_way_of_sharding_parameters_gives_the_same_bits() {
    let world = 4;
    let expected = oracle(world, 1, Moment::Each, None);
    for reshard_after_forward in [
        Reshard::Yes,
        Reshard::No,
        Reshard::Within(2),
        Reshard::Within(1),
    ] {
        for (prefetch, replicate_below) in [(0, 0), (1, 7), (3, 0), (1, 1000)] {
            let options = Options {
                reshard_after_forward,
                prefetch,
                replicate_below,
                offload: prefetch == 3,
                ..small_buckets()
            };
            let bits = train("fsdp", world, &options, 1, None);
            assert_eq!(bits, expected, "{options:?}");
        }
    }
}

#[test]
fn what_each_part_of_a_step_costs_is_what_the_plan_says() {
    let group = |group| Options {
        group: Some(group),
        ..small_buckets()
    };
    let within = Options {
        reshard_after_forward: Reshard::Within(2),
        ..small_buckets()
    };
    let stay = Options {
        reshard_after_forward: Reshard::No,
        ..small_buckets()
    };
    for (strategy, world, options) in [
        ("ddp", 3, small_buckets()),
        ("zero1", 3, small_buckets()),
        ("zero2", 3, small_buckets()),
        ("fsdp", 3, small_buckets()),
        ("fsdp", 4, within),
        ("fsdp", 2, stay),
        ("hsdp", 4, group(2)),
    ] {
        fabric(strategy, world, &options)
            .launch_threads(|fabric| {
                let rank = fabric.global_rank();
                let (model, mut optimizer) = fabric.setup(model::<f32>(), Sgd::new(0.01))?;
                let (chain, cost) = (chain(&model, uses_extra(rank)), model.forecast());
                for step in 0..3 {
                    let begun = fabric.spent()?;
                    for batch in 0..2 {
                        let (input, target) = sample(rank, step, batch);
                        let before = fabric.spent()?;
                        let pass = chain.forward(&model, input)?;
                        let forward = fabric.spent()?;
                        let due = match batch {
                            0 => cost.forward,
                            _ => cost.forward_again,
                        };
                        assert_eq!(forward - before, due, "{strategy}: forward {batch}");
                        let error = pass.output().iter().zip(&target).map(|(y, t)| y - t);
                        let error = error.collect();
                        fabric.no_backward_sync(&model, batch == 0, || {
                            fabric.backward(pass.loss(error))
                        })?;
                        let due = match batch {
                            0 => cost.backward,
                            _ => cost.last_backward,
                        };
                        assert_eq!(
                            fabric.spent()? - forward,
                            due,
                            "{strategy}: backward {batch}"
                        );
                    }
                    let before = fabric.spent()?;
                    optimizer.step()?;
                    let after = fabric.spent()?;
                    assert_eq!(after - before, cost.step, "{strategy}: step");
                    assert_eq!(after - begun, cost.total(2), "{strategy}: all of it");
                    optimizer.zero_grad();
                }
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn the_plan_says_what_will_happen() {
    let texts = fabric("fsdp", 4, &small_buckets())
        .launch_threads(|fabric| {
            let link = fabric.measure_link()?;
            assert!(link.is_some_and(|link| link.alpha_s > 0.0 && link.bytes_per_s > 0.0));
            let (model, optimizer) = fabric.setup(model::<f32>(), AdamW::new(0.1))?;
            Ok(model.explain(&optimizer, link))
        })
        .unwrap();
    for fact in [
        "fsdp on 4 ranks",
        "185 parameters in 4 units",
        "multiplied by 1/4 once",
        "'block.0.scale' is used outside of 'block.0' too",
        "Accumulate::Keep would reduce once",
        "exposed is what no computation runs beside: the first gather, the last reduction",
        "that nothing can hide",
    ] {
        assert!(texts[0].contains(fact), "{fact}: {}", texts[0]);
    }
}

#[test]
fn values_that_are_updated_apart_give_the_same_bits() {
    let offload = Options {
        offload: true,
        ..small_buckets()
    };
    let expected = oracle(2, 1, Moment::Each, None);
    for strategy in ["ddp", "zero1", "zero2", "fsdp"] {
        assert_eq!(
            train(strategy, 2, &offload, 1, None),
            expected,
            "{strategy}"
        );
    }
}

#[test]
fn parameters_that_are_updated_whole_give_the_same_bits() {
    let options = Options {
        shard_by: ShardBy::Tensor,
        group: Some(2),
        ..small_buckets()
    };
    let expected = oracle(4, 1, Moment::Each, Some(Clip::norm(0.5)));
    for strategy in ["zero1", "zero2", "fsdp", "hsdp"] {
        let bits = train(strategy, 4, &options, 1, Some(Clip::norm(0.5)));
        assert_eq!(bits, expected, "{strategy}");
        let pieces = fabric(strategy, 4, &options).launch_threads(|fabric| {
            let plan = fabric.setup_module(model::<f32>())?.plan();
            let pieces = plan.pieces(fabric.global_rank());
            for piece in &pieces {
                assert_eq!(piece.range, 0..plan.param(piece.param).numel(), "whole");
            }
            Ok(pieces.len())
        });
        let replicas = if strategy == "hsdp" { 2 } else { 1 };
        let count = pieces.unwrap().iter().sum::<usize>();
        assert_eq!(count, replicas * 11, "each on one rank of a replica");
    }
}

#[test]
fn frozen_parameters_are_gathered_and_never_move() {
    let run = |strategy: &str| {
        let ranks = fabric(strategy, 3, &small_buckets()).launch_threads(|fabric| {
            let frozen = model::<f32>()
                .freeze("block.1.weight")
                .freeze("block.3.bias");
            let (model, mut optimizer) = fabric.setup(frozen, AdamW::new(0.02))?;
            let before = read(&model)?;
            let chain = chain(&model, false);
            for step in 0..5 {
                backward(fabric, &model, &chain, fabric.global_rank(), step, 0)?;
                optimizer.step()?;
                optimizer.zero_grad();
            }
            let after = read(&model)?;
            assert_ne!(before, after);
            Ok(after)
        });
        ranks.unwrap().swap_remove(0)
    };
    let expected = run("ddp");
    for strategy in ["zero1", "zero2", "fsdp"] {
        let after = run(strategy);
        assert_eq!(after, expected, "{strategy}");
    }
}

#[test]
fn no_more_units_are_whole_than_are_in_use() {
    for prefetch in 0..4 {
        let options = Options {
            prefetch,
            ..small_buckets()
        };
        fabric("fsdp", 2, &options)
            .launch_threads(|fabric| {
                let (model, mut optimizer) = fabric.setup(model::<f32>(), Sgd::new(0.01))?;
                let chain = chain(&model, uses_extra(fabric.global_rank()));
                for step in 0..3 {
                    for batch in 0..2 {
                        backward(fabric, &model, &chain, fabric.global_rank(), step, batch)?;
                    }
                    optimizer.step()?;
                    optimizer.zero_grad();
                }
                let used = model.working_set();
                assert_eq!(used.whole_units, 1, "the last one waits for nobody");
                assert_eq!(used.gather_blocks, prefetch.max(1));
                assert_eq!(used.reduce_blocks, 2, "one fills, one travels");
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn a_forward_without_a_backward_leaves_nothing_behind() {
    fabric("fsdp", 2, &small_buckets())
        .launch_threads(|fabric| {
            let rank = fabric.global_rank();
            let (model, mut optimizer) = fabric.setup(model::<f32>(), Sgd::new(0.1))?;
            let chain = chain(&model, false);
            let look = |step| -> Result<Vec<f32>> {
                let (input, _) = sample(rank, step, 0);
                Ok(chain.forward(&model, input)?.output().to_vec())
            };
            let before = look(0)?;
            assert_eq!(look(0)?, before, "again");
            backward(fabric, &model, &chain, rank, 0, 0)?;
            assert_eq!(look(0)?, before, "parameters change with the update");
            optimizer.step()?;
            optimizer.zero_grad();
            assert_ne!(look(0)?, before, "what was gathered before is stale");
            assert_eq!(model.working_set().whole_units, 1);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_rank_that_stops_between_units_ends_the_others_with_its_words() {
    for strategy in ["zero2", "fsdp", "hsdp"] {
        let options = Options {
            group: Some(2),
            ..small_buckets()
        };
        let said = std::sync::Mutex::new(Vec::new());
        let outcome = fabric(strategy, 4, &options).launch_threads(|fabric| {
            let rank = fabric.global_rank();
            let (model, mut optimizer) = fabric.setup(model::<f32>(), Sgd::new(0.01))?;
            let chain = chain(&model, uses_extra(rank));
            let mut steps = || -> Result<()> {
                for step in 0.. {
                    if rank == 2 && step == 3 {
                        model.unit(fabric::model::UnitId(0), fabric::model::Edge::ForwardEnter)?;
                        return Err(fabric::Error::new("the data ran out"));
                    }
                    backward(fabric, &model, &chain, rank, step, 0)?;
                    optimizer.step()?;
                    optimizer.zero_grad();
                }
                Ok(())
            };
            let result = steps();
            said.lock()
                .unwrap()
                .push(result.as_ref().unwrap_err().to_string());
            result
        });
        assert!(
            outcome
                .unwrap_err()
                .to_string()
                .contains("the data ran out")
        );
        let said = said.into_inner().unwrap();
        assert_eq!(said.len(), 4, "{strategy}");
        let all = said.iter().all(|text| text.contains("the data ran out"));
        assert!(all, "{strategy}: {said:?}");
    }
}
