//! What ranks tell each other about gradients: the control word at the end of a synchronised backward (who had a gradient
//! for what, and the squares of what each rank alone holds), and norms at other times.

use fabric_kernels::{Dtype, Span, SquareBins};

use super::{Sequencer, Unused};
use crate::{
    buffer::Slab,
    comm::{Call, Communicator, Data, Op, ReduceOp, Work},
    error::{Error, Result},
    shard::ParamId,
};

impl Sequencer {
    /// The control word: how many ranks had a gradient for each parameter, and the squares of the gradients that this
    /// rank alone answers for.
    pub(super) fn compare(&mut self) -> Result<()> {
        let (dtype, numel) = self.plan.control_word();
        // On a device this thread would wait for them: they are asked for when a norm is.
        let carries = self.groups.reduce.device().is_none();
        let mut comm = self.groups.world.lock();
        let mut word = match self.word.take() {
            Some(word) => word,
            None => comm.alloc_host(dtype, numel)?,
        };
        let count = self.plan.params().len();
        let is_used = |param: usize| {
            let place = self.plan.grad_place(ParamId(param));
            place.is_some_and(|(bucket, entry)| self.buckets[bucket].is_used(entry))
        };
        match dtype {
            Dtype::I64 => {
                let word = word.as_mut_slice::<i64>();
                for (param, used) in word[..count].iter_mut().enumerate() {
                    *used = is_used(param).into();
                }
                if carries {
                    word[count..].copy_from_slice(&self.own_squares()?.words());
                }
            }
            _ => {
                let word = word.as_mut_slice::<i32>();
                for (param, used) in word.iter_mut().enumerate() {
                    *used = is_used(param).into();
                }
            }
        }
        let word = reduced(&mut **comm, self.plan.control_call(), word)?;
        drop(comm);
        let ranks = |param: usize| match dtype {
            Dtype::I64 => word.as_slice::<i64>()[param] as usize,
            _ => word.as_slice::<i32>()[param] as usize,
        };
        self.unused.clear();
        for param in 0..count {
            let Some((bucket, entry)) = self.plan.grad_place(ParamId(param)) else {
                continue;
            };
            let ranks = ranks(param);
            self.buckets[bucket].set_used(entry, ranks > 0);
            if ranks == 0 {
                self.unused.everywhere.push(ParamId(param));
            } else if ranks < self.world {
                self.unused.somewhere.push(ParamId(param));
            }
        }
        if dtype == Dtype::I64 && carries {
            let words = word.as_slice::<i64>()[count..].try_into();
            self.squares = words.ok().map(SquareBins::from_words);
        }
        self.word = Some(word);
        Ok(())
    }

    /// The squares of the gradients that this rank answers for. Those that nobody used are zeros here.
    fn own_squares(&self) -> Result<SquareBins> {
        let counts =
            |index: &usize| self.plan.buckets()[*index].trainable && self.answers_for(*index);
        let counted = (0..self.buckets.len()).filter(counts);
        self.bins(counted.filter_map(|index| self.buckets[index].owned()))
    }

    /// The squares of all gradients, added exactly: of those that the last synchronised backward left, unless something
    /// has changed them since. All ranks get the same; where ranks hold different gradients and the control word did not
    /// bring the sum, all must ask.
    ///
    /// # Errors
    /// When a rank is gone.
    pub fn squares(&mut self) -> Result<SquareBins> {
        if let Some(squares) = &self.squares {
            return Ok(squares.clone());
        }
        if !self.plan.shards_norm() {
            return self.held_squares(|_| true);
        }
        let own = self.held_squares(|index| self.answers_for(index))?;
        let word = self.say(Dtype::I64, ReduceOp::Sum, |word| {
            word.as_mut_slice::<i64>().copy_from_slice(&own.words());
        })?;
        let words = word.as_slice::<i64>().try_into();
        Ok(SquareBins::from_words(words.expect("as many as were sent")))
    }

    /// The largest of all ranks' `value`, where they hold different gradients; NaN when one is.
    ///
    /// # Errors
    /// When a rank is gone.
    pub fn largest(&mut self, value: f64) -> Result<f64> {
        if !self.plan.updates_pieces() {
            return Ok(value);
        }
        let word = self.say(Dtype::F64, ReduceOp::Max, |word| {
            word.as_mut_slice::<f64>().fill(value);
        })?;
        Ok(word.as_slice::<f64>()[0])
    }

    /// Reduce as many numbers as a sum of squares has over all ranks, in memory that is kept for the next time.
    fn say(&mut self, dtype: Dtype, op: ReduceOp, fill: impl FnOnce(&mut Slab)) -> Result<&Slab> {
        let mut comm = self.groups.world.lock();
        let mut word = match self.norm.take() {
            Some(word) => word.recast(dtype), // all are of eight bytes
            None => comm.alloc_host(dtype, SquareBins::WORDS)?,
        };
        fill(&mut word);
        let call = Call::new(Op::AllReduce(op)).blocking();
        Ok(self.norm.insert(reduced(&mut **comm, call, word)?))
    }

    fn held_squares(&self, counts: impl Fn(usize) -> bool) -> Result<SquareBins> {
        let pieces = self.plan.each_piece(self.rank);
        let counted = pieces.filter(|piece| counts(piece.bucket));
        self.bins(counted.filter_map(|piece| self.piece(&piece)))
    }

    /// The squares of spans; those that lie on a device are read in one pass.
    fn bins<'a>(&self, spans: impl Iterator<Item = Span<'a>>) -> Result<SquareBins> {
        let mut bins = SquareBins::new();
        let mut away = Vec::new();
        for span in spans {
            match span.device() {
                Some(_) => away.push(span),
                None => bins
                    .add(span)
                    .map_err(Error::kernel(self.rank, "take a norm"))?,
            }
        }
        bins.add_all(&away)
            .map_err(Error::kernel(self.rank, "take a norm"))?;
        Ok(bins)
    }

    /// Whether this rank counts the gradients of bucket `index`: its slices in the first replica, and, on rank 0, what all
    /// ranks hold alike.
    fn answers_for(&self, index: usize) -> bool {
        match self.plan.buckets()[index].axis.shards_update() {
            true => self.plan.mesh().replica(self.rank) == 0,
            false => self.rank == 0,
        }
    }

    /// Parameters without a gradient on this rank: what a strategy without reductions can say by itself.
    pub fn unfilled(&mut self) -> &Unused {
        self.unused.clear();
        for param in (0..self.plan.params().len()).map(ParamId) {
            if let Some((bucket, entry)) = self.plan.grad_place(param)
                && !self.buckets[bucket].is_held(entry)
            {
                self.unused.everywhere.push(param);
            }
        }
        &self.unused
    }
}

impl Unused {
    fn clear(&mut self) {
        self.everywhere.clear();
        self.somewhere.clear();
    }
}

fn reduced(comm: &mut dyn Communicator, call: Call, word: Slab) -> Result<Slab> {
    let work = comm.submit(call, Data::InPlace(word));
    Ok(work.and_then(Work::wait)?.into_output())
}
