//! One epoch of one rank, as data: which samples make which batch, and which of them only fill up the last turn.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{BatchSampler, Sampler};
use crate::{Error, Result};

/// How far a loader is, in terms that do not depend on the number of ranks: save it on rank 0 with
/// `State::value("loader", &mut loader.state())`, and go on from it with [`crate::data::DataLoader::resume`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderState {
    /// The epoch.
    pub epoch: u64,
    /// How much of the epoch's common order all ranks have taken together: samples; batches, where a batch sampler makes them.
    pub consumed: usize,
}

/// One rank's share of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) rank: usize,
    pub(super) world: usize,
}

pub(super) const ALL: Share = Share { rank: 0, world: 1 };

impl Share {
    /// `rank`'s of `world`, for a loader that has the share `before`, if any.
    pub(super) fn new(rank: usize, world: usize, before: Option<Self>) -> Result<Self> {
        if rank >= world {
            return Err(Error::argument(
                format!("a loader's share {rank} of {world}"),
                "Ranks are numbered from 0 to world size - 1",
            ));
        }
        match before {
            Some(share) => Err(Error::argument(
                format!(
                    "this loader already loads the share of rank {} of {}",
                    share.rank, share.world
                ),
                "Set up each loader once",
            )),
            None => Ok(Self { rank, world }),
        }
    }

    /// How many things of `count` it has: as many as any other share.
    fn of(self, count: usize) -> usize {
        count.div_ceil(self.world)
    }
}

/// How batches are made.
#[derive(Clone)]
pub(super) enum Batching {
    /// So many samples each.
    Sized { size: usize, drop_last: bool },
    /// As it says.
    Custom(Arc<dyn BatchSampler>),
}

/// The batches of one rank in one epoch.
pub(super) struct Epoch {
    order: Vec<usize>, // what all ranks share
    custom: Option<Vec<Vec<usize>>>,
    share: Share,
    size: usize,
    pub(super) count: usize, // batches
    start: LoaderState,
}

impl Epoch {
    pub(super) fn new(
        sampler: &dyn Sampler,
        samples: usize,
        batching: &Batching,
        share: Share,
        start: LoaderState,
    ) -> Self {
        let order = sampler.indices(samples, start.epoch);
        let (custom, size, count) = match batching {
            Batching::Sized { size, drop_last } => {
                let mine = share.of(order.len().saturating_sub(start.consumed));
                let count = match drop_last {
                    true => mine / size,
                    false => mine.div_ceil(*size),
                };
                (None, *size, count)
            }
            Batching::Custom(sampler) => {
                let batches = sampler.batches(&order, start.epoch);
                let count = share.of(batches.len().saturating_sub(start.consumed));
                (Some(batches), 1, count)
            }
        };
        Self {
            order,
            custom,
            share,
            size,
            count,
            start,
        }
    }

    /// The samples of this rank's batch `number`.
    pub(super) fn batch(&self, number: usize) -> Vec<usize> {
        match &self.custom {
            Some(batches) => batches[self.place(number) % batches.len()].clone(),
            None => self
                .turns(number)
                .map(|turn| self.order[self.place(turn) % self.order.len()])
                .collect(),
        }
    }

    /// How many of them, from its first, no other rank has too: those after only fill up the last turn.
    pub(super) fn real(&self, number: usize) -> usize {
        match &self.custom {
            Some(batches) if self.place(number) < batches.len() => {
                batches[self.place(number)].len()
            }
            Some(_) => 0,
            None => self
                .turns(number)
                .filter(|turn| self.place(*turn) < self.order.len())
                .count(),
        }
    }

    /// How far all ranks are together when each has taken `batches` of its batches.
    pub(super) fn after(&self, batches: usize) -> LoaderState {
        let units = self.custom.as_ref().map_or(self.order.len(), Vec::len);
        let taken = batches * self.size * self.share.world;
        LoaderState {
            consumed: (self.start.consumed + taken).min(units),
            ..self.start
        }
    }

    /// This rank's samples of batch `number`, counted from where it has started.
    fn turns(&self, number: usize) -> std::ops::Range<usize> {
        let mine = self.share.of(self.order.len() - self.start.consumed);
        number * self.size..((number + 1) * self.size).min(mine)
    }

    /// Where this rank's turn is in the common order.
    fn place(&self, turn: usize) -> usize {
        self.start.consumed + turn * self.share.world + self.share.rank
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{RandomSampler, SequentialSampler};

    fn sized(size: usize, drop_last: bool) -> Batching {
        Batching::Sized { size, drop_last }
    }

    /// What all ranks take from `start` on, in order of time, without what fills up; and where they are after `batches`.
    fn take(
        samples: usize,
        batching: &Batching,
        world: usize,
        start: LoaderState,
        batches: usize,
    ) -> (Vec<usize>, LoaderState) {
        let sampler = RandomSampler { seed: 3 };
        let share = |rank| Share { rank, world };
        let epochs: Vec<_> = (0..world)
            .map(|rank| Epoch::new(&sampler, samples, batching, share(rank), start))
            .collect();
        let batches = batches.min(epochs[0].count);
        let mut taken = Vec::new();
        for number in 0..batches {
            for epoch in &epochs {
                taken.extend(&epoch.batch(number)[..epoch.real(number)]);
            }
        }
        assert!(epochs.iter().all(|epoch| epoch.count == epochs[0].count));
        (taken, epochs[0].after(batches))
    }

    // GAP-08: what was taken before and after an interruption is an epoch, whatever the number of ranks is then.
    #[test]
    fn an_epoch_goes_on_where_it_was_with_another_number_of_ranks() {
        let custom = |order: &[usize], _: u64| order.chunks(3).map(<[usize]>::to_vec).collect();
        let custom = Batching::Custom(Arc::new(custom));
        for batching in [&sized(4, false), &custom] {
            for (before, after) in [(1, 3), (2, 2), (3, 1), (2, 5)] {
                for cut in 0..9 {
                    let start = LoaderState {
                        epoch: 7,
                        consumed: 0,
                    };
                    let (mut taken, state) = take(41, batching, before, start, cut);
                    let (rest, end) = take(41, batching, after, state, usize::MAX);
                    taken.extend(rest);
                    taken.sort_unstable();
                    assert_eq!(taken, (0..41).collect::<Vec<_>>());
                    let units = if matches!(batching, Batching::Custom(_)) {
                        14
                    } else {
                        41
                    };
                    assert_eq!((end.epoch, end.consumed), (7, units));
                }
            }
        }
    }

    #[test]
    fn what_fills_up_is_the_beginning_and_counts_as_nothing() {
        let share = Share { rank: 1, world: 2 };
        let start = LoaderState::default();
        let epoch = Epoch::new(&SequentialSampler, 5, &sized(2, false), share, start);
        assert_eq!(
            (epoch.count, epoch.batch(1), epoch.real(1)),
            (2, vec![0], 0)
        );
        let cut = Epoch::new(&SequentialSampler, 5, &sized(2, true), share, start);
        assert_eq!((cut.count, cut.batch(0), cut.real(0)), (1, vec![1, 3], 2));
        let none = Epoch::new(&SequentialSampler, 0, &sized(2, false), share, start);
        assert_eq!(none.count, 0);
    }
}
