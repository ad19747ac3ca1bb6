//! Uneven inputs: ranks that have different numbers of batches would wait for one another. Here they agree, before each batch,
//! on who still has one.

use fabric_engine::comm::ReduceOp;

use crate::{Error, Fabric, Result};

/// What happens when one rank has no further batch, and another has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uneven {
    /// The epoch ends for all; batches that others have left are not used.
    Stop,
    /// The epoch goes on until nobody has one: whoever has none runs its last batch again with weight 0, so that it takes
    /// part in every collective, and the others' weigh as much more (torch's `join`, for any strategy).
    Shadow,
    /// That is an error, which names the ranks.
    Error,
}

/// A batch, and what its loss is to be multiplied by: `fabric.backward_scaled(loss, joined.weight)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Joined<B> {
    /// The batch.
    pub batch: B,
    /// 0 for a shadow, and more than 1 for the others then, so that the mean over ranks is the mean over batches.
    pub weight: f32,
}

impl<B> Joined<B> {
    /// Whether this is a batch that was seen before, run again to keep the others company.
    pub fn is_shadow(&self) -> bool {
        self.weight == 0.0
    }
}

impl Fabric {
    /// The batches of ranks that may have different numbers of them. It costs one all_reduce of a number a batch.
    ///
    /// ```
    /// use fabric::{Fabric, data::Uneven};
    ///
    /// let fabric = Fabric::builder().devices(2).build()?;
    /// fabric.launch_threads(|fabric| {
    ///     let batches = (0..2 + fabric.global_rank()).map(Ok); // rank 0 has two, rank 1 three
    ///     let weights = fabric.join_uneven(batches, Uneven::Shadow).map(|joined| Ok(joined?.weight));
    ///     let expected = if fabric.global_rank() == 0 { [1.0, 1.0, 0.0] } else { [1.0, 1.0, 2.0] };
    ///     assert_eq!(weights.collect::<fabric::Result<Vec<f32>>>()?, expected);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), fabric::Error>(())
    /// ```
    pub fn join_uneven<'a, B: Clone + 'a>(
        &'a self,
        batches: impl IntoIterator<Item = Result<B>> + 'a,
        how: Uneven,
    ) -> impl Iterator<Item = Result<Joined<B>>> + 'a {
        let mut batches = batches.into_iter().fuse();
        let (mut last, mut ended) = (None, false);
        std::iter::from_fn(move || {
            if ended {
                return None;
            }
            let next = match batches.next().transpose() {
                Ok(next) => self.agree_on_batch(next, &mut last, how),
                Err(error) => Err(error),
            };
            ended = !matches!(next, Ok(Some(_)));
            next.transpose()
        })
    }

    fn agree_on_batch<B: Clone>(
        &self,
        next: Option<B>,
        last: &mut Option<B>,
        how: Uneven,
    ) -> Result<Option<Joined<B>>> {
        let world = self.world_size();
        let have = self.all_reduce_value(u64::from(next.is_some()), ReduceOp::Sum)? as usize;
        if have == 0 {
            return Ok(None);
        }
        if have < world && how != Uneven::Shadow {
            if how == Uneven::Stop {
                return Ok(None);
            }
            let all = self.all_gather_object(&next.is_some())?;
            let out: Vec<_> = (0..world).filter(|rank| !all[*rank]).collect();
            return Err(Error::argument(
                format!("ranks {out:?} have no further batch, and the others have"),
                "Give all ranks as many batches, or join_uneven with Uneven::Stop or Uneven::Shadow",
            ));
        }
        let weight = match &next {
            Some(_) => world as f32 / have as f32,
            None => 0.0,
        };
        if how == Uneven::Shadow && next.is_some() {
            last.clone_from(&next);
        }
        let batch = next.or_else(|| last.clone()).ok_or_else(|| {
            Error::argument(
                format!(
                    "rank {} has no batch at all, and cannot keep the others company",
                    self.global_rank()
                ),
                "Give every rank at least one batch",
            )
        })?;
        Ok(Some(Joined { batch, weight }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // An iterator may go on after its end, as one over what a channel has just now does: an epoch does not.
    #[test]
    fn an_epoch_ends_at_its_first_end() {
        let fabric = Fabric::builder().devices(2).build().unwrap();
        let seen = fabric.launch_threads(|fabric| {
            let rank = fabric.global_rank();
            let (mut polled, of) = (0, [3, 2][rank]); // every third poll, and every second, is an end
            let batches = std::iter::from_fn(move || {
                polled += 1;
                (polled % of != 0 && polled < 20).then_some(Ok(polled))
            });
            let joined = fabric.join_uneven(batches, Uneven::Shadow);
            joined
                .map(|joined| Ok(joined?.weight))
                .collect::<Result<Vec<_>>>()
        });
        assert_eq!(seen.unwrap(), [vec![1.0, 2.0], vec![1.0, 0.0]]);
        let fabric = Fabric::builder().devices(1).build().unwrap();
        let micros = fabric.launch(|fabric| {
            let mut polled = 0;
            let batches = std::iter::from_fn(move || {
                polled += 1;
                (polled % 4 != 0 && polled < 20).then_some(Ok(polled))
            });
            Ok(fabric.accumulate(2).over(batches).count())
        });
        assert_eq!(micros.unwrap(), Some(3));
    }
}
