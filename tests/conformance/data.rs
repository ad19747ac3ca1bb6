//! Lines 26 to 30 of the list, and what Lightning's users miss: samplers that stay, epochs, positions, streams, uneven inputs,
//! metrics that count every sample once.

use fabric::{
    Fabric, Result,
    data::{
        DataLoader, DistributedSampler, Items, LoaderState, Part, Sampler, SequentialSampler,
        Stream, StreamLoader, Subset, Uneven,
    },
    optim::Sgd,
    vec::VecModel,
};
use fabric_engine::comm::ReduceOp;

use crate::puppet::{all_say, ddp, failures};

type Loader = DataLoader<Vec<usize>>;

fn loader(count: usize) -> Loader {
    DataLoader::new((0..count).collect()).seed(11)
}

/// What every rank's loader gives in its next epoch.
fn epochs(world: usize, make: impl Fn() -> Loader + Sync) -> Vec<Vec<Vec<usize>>> {
    let run = ddp(world).launch_threads(|fabric| {
        let loader = fabric.setup_dataloaders(make())?;
        loader.iter().collect()
    });
    run.unwrap()
}

struct Backwards;
impl Sampler for Backwards {
    fn indices(&self, count: usize, epoch: u64) -> Vec<usize> {
        (0..count).rev().skip(epoch as usize).collect()
    }
    fn len(&self, count: usize) -> usize {
        count
    }
}

// WRAP-23: any sampler is wrapped, one that is distributed already is not, and sharing can be refused.
#[test]
fn line_26_any_sampler_is_shared_out_once() {
    let custom = epochs(2, || loader(5).batch_size(2).sampler(Backwards));
    assert_eq!(
        custom,
        [vec![vec![4, 2], vec![0]], vec![vec![3, 1], vec![4]]]
    );
    let own = || DistributedSampler::new(SequentialSampler, 2, 3);
    let kept = epochs(2, || loader(6).sampler(own()));
    assert_eq!(kept, vec![vec![vec![2], vec![5]]; 2]);
    let whole = epochs(2, || loader(3).use_distributed_sampler(false));
    assert_eq!(whole, vec![vec![vec![0], vec![1], vec![2]]; 2]);
    let shuffled = epochs(3, || loader(9).shuffle(true)).concat().concat();
    assert_ne!(shuffled, (0..9).collect::<Vec<_>>());
}

// WRAP-25, BUG-09: a batch sampler stays what it is; whole batches are dealt.
#[test]
fn line_27_a_batch_sampler_is_kept_and_dealt_out() {
    let by_threes =
        |order: &[usize], _: u64| order.chunks(3).map(<[usize]>::to_vec).collect::<Vec<_>>();
    let dealt = epochs(2, || loader(8).batch_sampler(by_threes));
    let expected = [
        vec![vec![0, 1, 2], vec![6, 7]],
        vec![vec![3, 4, 5], vec![0, 1, 2]],
    ];
    assert_eq!(dealt, expected);
}

// WRAP-22, BUG: the epoch reaches the sampler without a word of the loop's.
#[test]
fn line_28_every_iteration_is_an_epoch_of_its_own() {
    let run = ddp(2).launch_threads(|fabric| {
        let loader = fabric.setup_dataloaders(loader(4).sampler(Backwards))?;
        let passes = (0..3).map(|_| Ok(loader.iter().collect::<Result<Vec<_>>>()?.concat()));
        passes.collect::<Result<Vec<_>>>()
    });
    // Epoch e leaves out the last e samples.
    let expected = [
        [vec![3, 1], vec![2, 0], vec![1]],
        [vec![2, 0], vec![1, 2], vec![0]],
    ];
    for (rank, passes) in run.unwrap().into_iter().enumerate() {
        assert_eq!(passes[0], expected[rank][0]);
        assert_eq!(passes[1], expected[rank][1]);
        assert_eq!(passes[2], expected[rank][2]);
    }
}

#[test]
fn line_29_loaders_are_set_up_one_by_one_or_together_and_once() {
    let run = ddp(2).launch_threads(|fabric| {
        let (train, test) = fabric.setup_dataloaders((loader(4), loader(6)))?;
        assert_eq!((train.len(), test.len()), (2, 3));
        let text = fabric.setup_dataloaders(train).err().unwrap().to_string();
        assert!(text.contains("Set up each loader once"), "{text}");
        Ok(())
    });
    run.unwrap();
}

// GAP-08: in the middle of an epoch, with other ranks than before, no sample twice and none left out.
#[test]
fn gap_08_an_epoch_is_resumed_where_it_was_on_other_ranks() {
    let part = |world: usize, state: Option<LoaderState>, batches: usize| {
        let run = ddp(world).launch_threads(|fabric| {
            let make = loader(24).batch_size(2).shuffle(true).workers(2);
            let loader = fabric.setup_dataloaders(make)?;
            if let Some(state) = state {
                loader.resume(state);
            }
            let mut seen = Vec::new();
            for batch in loader.iter().take(batches) {
                seen.extend(fabric.gather_for_metrics(&loader, batch?)?);
            }
            // What is saved is rank 0's.
            Ok((seen, fabric.broadcast(loader.state(), 0)?))
        });
        run.unwrap().remove(0)
    };
    let (whole, _) = part(1, None, 99);
    let (mut first, state) = part(3, None, 2);
    assert_eq!((state.epoch, state.consumed), (0, 12));
    let (rest, end) = part(2, Some(state), 99);
    assert_eq!((end.epoch, end.consumed), (1, 0));
    first.extend(rest);
    first.sort_unstable();
    assert_eq!(first, (0..24).collect::<Vec<_>>());
    // On as many ranks, the very batches that an undisturbed run has.
    let (first, state) = part(1, None, 5);
    assert_eq!([first, part(1, Some(state), 99).0].concat(), whole);
}

struct Lines(usize);
impl Stream for Lines {
    type Item = usize;
    fn open(&self, _: Part) -> Result<Items<usize>> {
        Ok(Box::new((0..self.0).map(Ok)))
    }
}

// R-08, WRAP-26, GAP-07: every rank has its own part of a stream, and as many batches as any other.
#[test]
fn line_26_streams_are_shared_out_too() {
    let run = ddp(3).launch_threads(|fabric| {
        let stream = StreamLoader::new(Lines(11)).batch_size(2);
        let loader = fabric.setup_dataloaders(stream)?;
        loader.iter().collect::<Result<Vec<_>>>()
    });
    let expected = [
        vec![vec![0, 3], vec![6]],
        vec![vec![1, 4], vec![7]],
        vec![vec![2, 5], vec![8]],
    ];
    assert_eq!(run.unwrap(), expected);
}

/// A mean over batches, whoever had them: each is the gradient of one number.
fn joined(how: Uneven, strategy: &str) -> Result<Vec<Vec<f32>>> {
    let fabric = Fabric::builder().devices(3).strategy(strategy).build()?;
    fabric.launch_threads(|fabric| {
        let model = VecModel::new([("w", vec![0f32; 4])]).in_units(["w"])?;
        let (model, mut optimizer) = fabric.setup(model, Sgd::new(1.0))?;
        let rank = fabric.global_rank();
        let batches = (0..=rank).map(|batch| Ok((10 * rank + batch) as f32));
        let mut seen = Vec::new();
        for joined in fabric.join_uneven(batches, how) {
            let joined = joined?;
            let loss = model.gradients(vec![Some(vec![-joined.batch; 4])]);
            fabric.backward_scaled(loss, joined.weight)?;
            optimizer.step()?;
            optimizer.zero_grad();
            seen.push(joined.weight);
        }
        assert!(seen.len() == 3 || how == Uneven::Stop);
        let slab = fabric.all_gather_object(&seen)?;
        assert_eq!(slab[2].len(), seen.len(), "all have run as many steps");
        // The steps add up the mean over those who had a batch.
        let folder = tempfile::tempdir()?;
        let path = fabric.broadcast(folder.path().join("w"), 0)?;
        fabric.save(&path, fabric::State::new().model("m", &model))?;
        let single = Fabric::builder().devices(1).build()?;
        let read = single.launch_threads(|single| {
            let whole = single.setup_module(VecModel::new([("w", vec![0f32; 4])]))?;
            single.load(&path, fabric::State::new().model("m", &whole))?;
            Ok(whole.read("w"))
        })?;
        fabric.barrier()?;
        Ok(read.concat())
    })
}

// GAP-06: torch's join, under strategies whose ranks must all run every forward.
#[test]
fn gap_06_uneven_inputs_stop_together_or_are_shadowed() {
    for strategy in ["ddp", "zero1", "zero2", "fsdp"] {
        let first = (0.0 + 10.0 + 20.0) / 3.0;
        for values in joined(Uneven::Stop, strategy).unwrap() {
            assert!((values[0] - first).abs() < 1e-5, "{strategy}: {values:?}");
        }
        let rest = (11.0 + 21.0) / 2.0 + 22.0;
        for values in joined(Uneven::Shadow, strategy).unwrap() {
            assert!(
                (values[3] - (first + rest)).abs() < 1e-4,
                "{strategy}: {values:?}"
            );
        }
    }
}

#[test]
fn gap_06_uneven_inputs_can_be_an_error_that_names_the_ranks() {
    let said = failures(3, |fabric| {
        let batches = (0..=fabric.global_rank()).map(Ok);
        let mut joined = fabric.join_uneven(batches, Uneven::Error);
        joined.try_for_each(|joined| joined.map(drop))
    });
    all_say(&said, &["ranks [0] have no further batch"]);
    let said = failures(2, |fabric| {
        let batches = (0..fabric.global_rank()).map(Ok);
        let mut joined = fabric.join_uneven(batches, Uneven::Shadow);
        joined.try_for_each(|joined| joined.map(drop))
    });
    assert!(said[0].contains("rank 0 has no batch at all"), "{said:?}");
}

// GAP-04, EX-01's over-count: five samples on two ranks are five.
#[test]
fn gap_04_metrics_count_every_sample_once() {
    for count in [1, 5, 8] {
        let run = ddp(3).launch_threads(|fabric| {
            let loader = fabric.setup_dataloaders(loader(count).batch_size(2))?;
            let (mut seen, mut padded) = (Vec::new(), 0);
            for batch in &loader {
                let batch = batch?;
                padded += batch.len();
                seen.extend(fabric.gather_for_metrics(&loader, batch)?);
            }
            let padded = fabric.all_reduce_value(padded, ReduceOp::Sum)?;
            assert_eq!(padded, count.next_multiple_of(3));
            seen.sort_unstable();
            assert_eq!(seen, (0..count).collect::<Vec<_>>());
            Ok(())
        });
        run.unwrap();
    }
    let said = failures(2, |fabric| {
        let loader = fabric.setup_dataloaders(loader(4).batch_size(2))?;
        let _batch = loader.iter().next().unwrap()?;
        fabric.gather_for_metrics(&loader, vec![1])
    });
    all_say(&said, &["1 values for 2 samples"]);
}

// EX-03: what k-fold cross-validation needs of a dataset.
#[test]
fn folds_leave_every_sample_out_once() {
    for (count, folds) in [(10, 5), (11, 3), (3, 5)] {
        let folds = Subset::folds(count, folds);
        let mut out: Vec<_> = folds.iter().flat_map(|(_, out)| out.clone()).collect();
        out.sort_unstable();
        assert_eq!(out, (0..count).collect::<Vec<_>>());
        for (train, out) in folds {
            assert_eq!(train.len() + out.len(), count);
            assert!(train.iter().all(|sample| !out.contains(sample)));
        }
    }
    assert!(Subset::new(vec![1, 2], vec![2]).is_err());
}
