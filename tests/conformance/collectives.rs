//! Lines 31 to 34 of the list: collectives on the main object, nested values, unequal lengths, groups.

use std::collections::BTreeMap;

use fabric::{Fabric, ReduceOp, Result, optim::Sgd, vec::VecModel};
use fabric_engine::kernels::Dtype;
use serde::{Deserialize, Serialize};

use crate::puppet::{all_say, ddp, failures};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Nested {
    name: String,
    done: bool,
    loss: f32,
    counts: BTreeMap<String, (i64, Vec<u8>)>,
    maybe: Option<f64>,
}

impl Nested {
    fn of(rank: usize) -> Self {
        Self {
            name: format!("rank {rank}"),
            done: rank == 0,
            loss: rank as f32,
            counts: BTreeMap::from([("seen".into(), (rank as i64 - 1, vec![rank as u8, 3]))]),
            maybe: (rank < 9).then_some(f64::INFINITY),
        }
    }
}

// one rank's value stays what it is but for the dimension of the world, which is always there.
#[test]
fn line_31_all_gather_gives_every_ranks_buffer_by_rank() {
    for world in [1, 2, 3] {
        let run = ddp(world).launch_threads(|fabric| {
            let rank = fabric.global_rank() as f32;
            let all = fabric.all_gather(&vec![rank, -rank, 0.5])?;
            let expected: Vec<f32> = (0..world)
                .flat_map(|rank| [rank as f32, -(rank as f32), 0.5])
                .collect();
            assert_eq!(all.as_slice::<f32>(), expected);
            assert_eq!(fabric.all_gather(&vec![rank])?.numel(), world);
            let nested = fabric.all_gather_object(&Nested::of(fabric.global_rank()))?;
            let expected: Vec<_> = (0..world).map(Nested::of).collect();
            assert_eq!(nested, expected);
            Ok(())
        });
        run.unwrap();
    }
}

// the mean of floats is exact in place; whole numbers are cut towards zero.
#[test]
fn line_31_all_reduce_is_in_place_and_cuts_whole_means() {
    let run = ddp(2).launch_threads(|fabric| {
        let rank = fabric.global_rank();
        let mut floats = vec![rank as f32 + 1.0, 3.0];
        fabric.all_reduce(&mut floats, ReduceOp::Avg)?;
        assert_eq!(floats, [1.5, 3.0]);
        let mut whole = vec![rank as i64 + 1, 3, -3 - rank as i64];
        fabric.all_reduce(&mut whole, ReduceOp::Avg)?;
        assert_eq!(whole, [1, 3, -3]);
        let (mut left, mut right) = (vec![rank as f32], vec![1f32; 3]);
        fabric.all_reduce_coalesced(&mut [&mut left, &mut right], ReduceOp::Sum)?;
        assert_eq!((left, right), (vec![1.0], vec![2.0; 3]));
        Ok(())
    });
    run.unwrap();
}

#[test]
fn line_31_every_number_of_a_nested_value_is_folded_by_itself() {
    let run = ddp(3).launch_threads(|fabric| {
        let mine = Nested::of(fabric.global_rank());
        let sum = fabric.all_reduce_value(mine.clone(), ReduceOp::Sum)?;
        let expected = Nested {
            loss: 3.0,
            counts: BTreeMap::from([("seen".into(), (0, vec![3, 9]))]),
            maybe: Some(f64::INFINITY),
            ..mine.clone()
        };
        assert_eq!(sum, expected);
        let most = fabric.all_reduce_value(mine, ReduceOp::Max)?;
        assert_eq!((most.loss, &most.counts["seen"].1), (2.0, &vec![2, 3]));
        assert_eq!(
            fabric.all_reduce_value((1u64, 1.0f64), ReduceOp::Sum)?,
            (3, 3.0)
        );
        Ok(())
    });
    run.unwrap();
}

#[test]
fn line_31_values_of_other_forms_and_sums_that_do_not_fit_are_refused() {
    let said = failures(2, |fabric| {
        let mine = vec![1.0; fabric.global_rank() + 1];
        fabric.all_reduce_value(mine, ReduceOp::Sum)
    });
    all_say(&said, &["1 x f64", "2 x f64"]);
    let said = failures(2, |fabric| fabric.all_reduce_value(200u8, ReduceOp::Sum));
    all_say(&said, &["cannot be read back", "fold wider numbers"]);
    let said = failures(2, |fabric| fabric.all_reduce_value(u64::MAX, ReduceOp::Sum));
    all_say(&said, &["18446744073709551615", "i64"]);
}

// R-05, BUG-18: a value by serde, a buffer as it lies in memory.
#[test]
fn line_31_broadcast_brings_the_sources_value_and_buffer() {
    let run = ddp(2).launch_threads(|fabric| {
        let rank = fabric.global_rank();
        assert_eq!(fabric.broadcast(Nested::of(rank), 1)?, Nested::of(1));
        let before = fabric.spent()?;
        let mut buffer = vec![rank as f64; 1000];
        fabric.broadcast_buffer(&mut buffer, 1)?;
        assert_eq!(buffer, [1.0; 1000]);
        let bytes = fabric.spent()?.bytes - before.bytes;
        assert!(bytes <= 8000, "{bytes} bytes for 8000"); // no header, no second message
        Ok(())
    });
    run.unwrap();
}

#[test]
fn line_31_decisions_are_agreed_on() {
    let run = ddp(3).launch_threads(|fabric| {
        let mine = fabric.global_rank() == 1;
        assert!(!fabric.reduce_boolean_decision(mine, true)?);
        assert!(fabric.reduce_boolean_decision(mine, false)?);
        assert!(fabric.reduce_boolean_decision(true, true)?);
        assert!(!fabric.reduce_boolean_decision(false, false)?);
        Ok(())
    });
    run.unwrap();
}

#[test]
fn line_31_reduce_scatter_all_to_all_gather_and_scatter() {
    let run = ddp(3).launch_threads(|fabric| {
        let rank = fabric.global_rank();
        let mine: Vec<i64> = (0..6).map(|index| index + 10 * rank as i64).collect();
        let slice = fabric.reduce_scatter(&mine, ReduceOp::Sum)?;
        let first = 2 * rank as i64;
        assert_eq!(slice.as_slice::<i64>(), [3 * first + 30, 3 * first + 33]);
        let blocks = fabric.all_to_all(&mine)?;
        let expected = [
            first,
            first + 1,
            first + 10,
            first + 11,
            first + 20,
            first + 21,
        ];
        assert_eq!(blocks.as_slice::<i64>(), expected);
        let (uneven, counts) = fabric.all_to_all_uneven(&mine, &[1, 2, 3])?;
        assert_eq!(counts, vec![rank + 1; 3]);
        assert_eq!(uneven.numel(), 3 * (rank + 1));
        let all = fabric.gather(&mine, 2)?;
        assert_eq!(all.map(|all| all.numel()), (rank == 2).then_some(18));
        let whole: Vec<i64> = (0..6).collect();
        let mut slice = vec![0i64; 2];
        let from = (rank == 1).then_some(&whole as &dyn fabric_engine::buffer::Buffer);
        fabric.scatter(from, &mut slice, 1)?;
        assert_eq!(slice, [first, first + 1]);
        let mut sum = vec![rank as i64];
        fabric.reduce(&mut sum, ReduceOp::Sum, 1)?;
        assert_eq!(sum, [if rank == 1 { 3 } else { rank as i64 }]);
        Ok(())
    });
    run.unwrap();
}

#[test]
fn line_34_values_and_buffers_go_from_rank_to_rank() {
    let run = ddp(3).launch_threads(|fabric| {
        let (rank, world) = (fabric.global_rank(), fabric.world_size());
        let (next, last) = ((rank + 1) % world, (rank + world - 1) % world);
        let exchange = |fabric: &Fabric| -> Result<(Vec<f32>, Nested)> {
            let mut buffer = vec![0f32; 5];
            if rank == 0 {
                fabric.send(&vec![rank as f32; 5], next)?;
                fabric.recv(&mut buffer, last)?;
                fabric.send_object(&Nested::of(rank), next)?;
                Ok((buffer, fabric.recv_object(last)?))
            } else {
                fabric.recv(&mut buffer, last)?;
                fabric.send(&vec![rank as f32; 5], next)?;
                let object = fabric.recv_object(last)?;
                fabric.send_object(&Nested::of(rank), next)?;
                Ok((buffer, object))
            }
        };
        assert_eq!(exchange(fabric)?, (vec![last as f32; 5], Nested::of(last)));
        Ok(())
    });
    run.unwrap();
}

// UTIL-35: what Lightning keeps private.
#[test]
fn line_32_unequal_lengths_are_gathered() {
    let run = ddp(4).launch_threads(|fabric| {
        let rank = fabric.global_rank();
        let (all, counts) = fabric.all_gather_uneven(&vec![rank as u8; rank % 3])?;
        assert_eq!(
            (all.as_slice::<u8>(), &counts[..]),
            (&[1, 2, 2][..], &[0, 1, 2, 0][..])
        );
        Ok(())
    });
    run.unwrap();
}

#[test]
fn line_34_groups_are_made_again_and_again_and_work_side_by_side() {
    let run = ddp(4).launch_threads(|fabric| {
        let rank = fabric.global_rank();
        for round in 0..3 {
            let half = fabric.split(rank as u32 % 2, 0)?;
            let sum = half.all_reduce_value(rank, ReduceOp::Sum)?;
            assert_eq!((half.world_size(), sum), (2, 2 + 2 * (rank % 2)));
            let trio = fabric.new_group(&[3, 0, 2])?;
            assert_eq!(trio.is_some(), rank != 1);
            if let Some(trio) = &trio {
                assert_eq!(trio.broadcast(rank, 0)?, 3);
                assert_eq!(trio.is_global_zero(), rank == 3);
            }
            assert_eq!(fabric.all_reduce_value(round, ReduceOp::Sum)?, 4 * round);
        }
        Ok(())
    });
    run.unwrap();
    let said = failures(2, |fabric| fabric.new_group(&[0, 0]).map(drop));
    all_say(&said, &["[0, 0]", "Name each rank once"]);
    let said = failures(2, |fabric| fabric.new_group(&[2]).map(drop));
    all_say(&said, &["a world of 2"]);
}

// EX-07 needs it: a model that some of the ranks train, while another plays.
#[test]
fn line_34_a_group_trains_a_model_of_its_own() {
    let run = ddp(3).launch_threads(|fabric| {
        let rank = fabric.global_rank();
        let trainers = fabric.new_group(&[1, 2])?;
        let Some(trainers) = trainers else {
            return fabric.recv_object::<Vec<f32>>(1);
        };
        let model = VecModel::new([("w", vec![0f32; 2])]);
        let (model, mut optimizer) = trainers.setup(model, Sgd::new(1.0))?;
        trainers.backward(model.gradients(vec![Some(vec![rank as f32, 1.0])]))?;
        optimizer.step()?;
        if rank == 1 {
            fabric.send_object(&model.read("w"), 0)?;
        }
        Ok(model.read("w"))
    });
    assert_eq!(run.unwrap(), vec![vec![-1.5, -1.0]; 3]);
}

// Two jobs in one: each half shards, trains, accumulates, loads its share of the data and saves for itself.
#[test]
fn line_34_groups_shard_and_save_for_themselves() {
    let folder = tempfile::tempdir().unwrap();
    let fabric = Fabric::builder()
        .devices(4)
        .strategy("fsdp")
        .build()
        .unwrap();
    let run = fabric.launch_threads(|fabric| {
        let half = fabric.global_rank() as u32 / 2;
        let group = fabric.split(half, 0)?;
        let model = VecModel::new([("w", vec![0f32; 3])]).in_units(["w"])?;
        let (model, mut optimizer) = group.setup(model, Sgd::new(1.0))?;
        let samples: Vec<f32> = (0..8)
            .map(|sample| sample as f32 + 10.0 * half as f32)
            .collect();
        let loader = group.setup_dataloaders(fabric::data::DataLoader::new(samples))?;
        for micro in group.accumulate(2).over(&loader) {
            let micro = micro?;
            let loss = model.gradients(vec![Some(vec![-micro.batch[0]; 3])]);
            micro.backward(&model, loss)?;
            if micro.is_last() {
                optimizer.step()?;
                optimizer.zero_grad();
            }
        }
        let path = folder.path().join(format!("half-{half}"));
        group.save(&path, fabric::State::new().model("m", &model))?;
        fabric.barrier()?;
        // All four load what two have saved.
        let whole = VecModel::new([("w", vec![9f32; 3])]).in_units(["w"])?;
        let whole = fabric.setup_module(whole)?;
        let other = folder.path().join("half-1");
        fabric.load(&other, fabric::State::new().model("m", &whole))?;
        let again = folder.path().join("again");
        fabric.save(&again, fabric::State::new().model("m", &whole))?;
        let single = Fabric::builder().devices(1).build()?;
        let read = single.launch_threads(|single| {
            let first = single.setup_module(VecModel::new([("w", vec![0f32; 3])]))?;
            single.load(&path, fabric::State::new().model("m", &first))?;
            let second = single.setup_module(VecModel::new([("w", vec![0f32; 3])]))?;
            single.load(&again, fabric::State::new().model("m", &second))?;
            Ok((first.read("w")[0], second.read("w")[2]))
        })?;
        fabric.barrier()?;
        Ok(read[0])
    });
    // Means of 0..4 and 4..8, and of those ten higher.
    assert_eq!(
        run.unwrap(),
        [(7.0, 27.0), (7.0, 27.0), (27.0, 27.0), (27.0, 27.0)]
    );
}

#[test]
fn line_34_several_operations_are_in_flight() {
    let run = ddp(2).launch_threads(|fabric| {
        let works = (0..5).map(|number| {
            let mut slab = fabric.alloc(Dtype::F64, 100)?;
            slab.as_mut_slice::<f64>().fill(f64::from(number));
            fabric.all_reduce_async(slab, ReduceOp::Sum)
        });
        let works = works.collect::<Result<Vec<_>>>()?;
        for (number, work) in works.into_iter().enumerate().rev() {
            let slab = work.wait()?.into_output();
            assert_eq!(slab.as_slice::<f64>(), [2.0 * number as f64; 100]);
        }
        Ok(())
    });
    run.unwrap();
}

// API-38, BUG-12: in front of `rank_zero_first`'s own tests, the form for machines with disks of their own.
#[test]
fn line_33_the_first_rank_of_a_machine_is_first() {
    let order = std::sync::Mutex::new(Vec::new());
    let run = ddp(3).launch_threads(|fabric| {
        // As threads, every rank is on machine 0, and its local rank is its rank.
        fabric.local_rank_zero_first(|| {
            order.lock().unwrap().push(fabric.local_rank());
            Ok(())
        })
    });
    run.unwrap();
    assert_eq!(order.lock().unwrap()[0], 0);
    let ran = std::sync::atomic::AtomicUsize::new(0);
    let said = failures(3, |fabric| {
        fabric.local_rank_zero_first(|| -> Result<()> {
            ran.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            fabric::bail!("no disk")
        })
    });
    assert_eq!(ran.into_inner(), 1);
    assert!(
        said.iter()
            .skip(1)
            .all(|text| text.contains("rank 0 failed first: no disk")),
        "{said:?}"
    );
}
