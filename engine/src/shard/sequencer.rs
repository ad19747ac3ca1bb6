//! What happens to gradients, in order: they become ready, buckets fill and leave in plan order while backward goes on,
//! and at the end everything is waited for and the ranks compare which parameters were used.

use fabric_kernels::{Dtype, Span, SpanMut};

use super::{
    ParamId, SharedComm,
    bucket::Bucket,
    plan::{Piece, Plan},
    replicate::WithParam,
};
use crate::{
    buffer::{Buffer, Slab},
    comm::{
        Data, ReduceOp, Work,
        trace::{Event, Trace},
    },
    error::{Error, Result},
};

/// May the library drop its copy of a gradient that was handed over?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Yes: the engine holds it.
    Drop,
    /// No: the engine did not take it (a frozen parameter).
    Keep,
}

/// Which parameters got no gradient, after a synchronised backward.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unused {
    /// On no rank: they have no gradient.
    pub everywhere: Vec<ParamId>,
    /// On some ranks only, this one or others: there they counted as zero.
    pub somewhere: Vec<ParamId>,
}

/// Runs a plan, step after step.
pub struct Sequencer {
    plan: Plan,
    comm: SharedComm,
    rank: usize,
    world: usize,
    buckets: Vec<Bucket>,
    word: Option<Slab>, // the control word's memory; away while it is reduced
    phase: Phase,
    touched: bool,
    failed: Option<Error>,
    trace: Trace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Backward { sync: bool, launched: usize },
}

impl Sequencer {
    /// A sequencer for `plan` over `comm`. The ranks' plans must agree (see [`super::replicate::agree`]).
    ///
    /// # Errors
    /// When there is no memory for the gradients.
    pub fn new(plan: Plan, comm: SharedComm) -> Result<Self> {
        let guard = comm.lock();
        let buckets = plan
            .buckets()
            .iter()
            .map(|bucket| {
                let slab = guard.alloc(bucket.dtype, bucket.padded)?;
                let shards = plan.row().shards_update();
                let own = shards.then(|| bucket.slice(guard.rank(), guard.size()));
                Ok(Bucket::new(bucket.clone(), slab, own))
            })
            .collect::<Result<Vec<_>>>()?;
        drop(guard);
        let (rank, world, trace) = (comm.rank(), comm.size(), comm.trace());
        Ok(Self {
            plan,
            comm,
            rank,
            world,
            buckets,
            word: None,
            phase: Phase::Idle,
            touched: false,
            failed: None,
            trace,
        })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// A backward begins; `sync`: it is the last micro-batch, its end makes the gradients whole.
    ///
    /// # Errors
    /// When one is under way already, or an earlier one failed.
    pub fn begin(&mut self, sync: bool) -> Result<()> {
        self.check()?;
        if self.phase != Phase::Idle {
            return Err(self.error(
                "backward was called inside backward",
                "Call fabric.backward once for each loss",
            ));
        }
        self.buckets.iter_mut().for_each(Bucket::begin);
        self.touched = false;
        self.phase = Phase::Backward {
            sync: sync && self.plan.reduction().is_some(),
            launched: 0,
        };
        self.trace.note(Event::Backward { sync });
        Ok(())
    }

    /// The gradient of `param` is ready. Called from the library's own backward, or afterwards, last parameter first.
    ///
    /// # Errors
    /// Outside a backward, for an unknown parameter, a second time in one backward, with the wrong number of elements,
    /// or when a reduction failed. The error is also kept, for [`Sequencer::finish`].
    pub fn ready(&mut self, param: ParamId, grad: &dyn Buffer) -> Result<Keep> {
        let result = self.take(param, grad);
        if let (Err(error), None) = (&result, &self.failed) {
            self.failed = Some(error.clone());
        }
        result
    }

    fn take(&mut self, param: ParamId, grad: &dyn Buffer) -> Result<Keep> {
        self.check()?;
        let Some(meta) = self.plan.params().get(param.0) else {
            return Err(self.error(
                &format!(
                    "a gradient for parameter {} of {}",
                    param.0,
                    self.plan.params().len()
                ),
                "Number the parameters as Model::params lists them",
            ));
        };
        let (name, numel) = (&meta.name, meta.numel());
        let Phase::Backward { sync, .. } = self.phase else {
            return Err(self.error(
                &format!("the gradient of '{name}' became ready outside fabric.backward"),
                "Call fabric.backward(loss) instead of the library's own backward",
            ));
        };
        let Some((bucket, entry)) = self.plan.place(param) else {
            return Ok(Keep::Keep);
        };
        if self.buckets[bucket].has(entry) {
            return Err(self.error(
                &format!("the gradient of '{name}' became ready twice in one backward"),
                "Hook each parameter once (a tied weight has one hook, shared by all its uses), and call \
                 fabric.backward once for each loss",
            ));
        }
        if grad.numel() != numel {
            return Err(self.error(
                &format!(
                    "the gradient of '{name}' has {} elements, the parameter {numel}",
                    grad.numel()
                ),
                "Hand over the whole gradient of the parameter",
            ));
        }
        self.trace.note(Event::Ready { param: param.0 });
        self.touched = true;
        self.buckets[bucket].take(self.rank, entry, grad)?;
        if sync {
            self.launch_full()?;
        }
        Ok(Keep::Drop)
    }

    /// Launch every full bucket whose predecessors are all launched: the order of the plan, whatever the order of
    /// readiness, because all ranks must submit alike.
    fn launch_full(&mut self) -> Result<()> {
        while let Phase::Backward {
            sync: true,
            launched,
        } = self.phase
        {
            if self
                .buckets
                .get(launched)
                .is_none_or(|bucket| !bucket.is_full())
            {
                break;
            }
            self.launch(launched)?;
        }
        Ok(())
    }

    fn launch(&mut self, index: usize) -> Result<()> {
        let Some(op) = self.plan.reduction() else {
            return Ok(());
        };
        let call = self.plan.bucket_call(index, op);
        self.buckets[index].fill_gaps(self.rank)?;
        let mut comm = self.comm.lock();
        self.buckets[index].launch(self.rank, |slab| comm.submit(call, Data::InPlace(slab)))?;
        self.phase = Phase::Backward {
            sync: true,
            launched: index + 1,
        };
        Ok(())
    }

    /// Whether a gradient became ready since [`Sequencer::begin`].
    pub fn is_touched(&self) -> bool {
        self.touched
    }

    /// The backward that began did not concern this model after all.
    pub fn cancel(&mut self) {
        self.phase = Phase::Idle;
    }

    /// The backward failed on this rank and cannot be completed: every later call returns `error`.
    pub fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
        self.phase = Phase::Idle;
    }

    /// The first error: a hook's, or a reduction's.
    pub fn failure(&self) -> Option<Error> {
        self.failed.clone()
    }

    /// The backward is over: launch what is left, wait for everything, compare which parameters were used.
    ///
    /// # Errors
    /// The first error of a hook, or of a reduction.
    pub fn finish(&mut self) -> Result<Option<Unused>> {
        let result = match self.failed.take() {
            Some(error) => Err(error),
            None => self.complete(),
        };
        self.phase = Phase::Idle;
        if let Err(error) = &result {
            self.failed = Some(error.clone());
        }
        result
    }

    fn complete(&mut self) -> Result<Option<Unused>> {
        let Phase::Backward { sync, launched } = self.phase else {
            return Err(self.error("the end of a backward that never began", "Call begin first"));
        };
        if !sync {
            return Ok(None);
        }
        for index in launched..self.buckets.len() {
            self.launch(index)?;
        }
        let rank = self.rank;
        self.buckets
            .iter_mut()
            .try_for_each(|bucket| bucket.land(rank))?;
        self.compare_use().map(Some)
    }

    /// The control word: how many ranks hold a gradient for each parameter.
    fn compare_use(&mut self) -> Result<Unused> {
        let mut comm = self.comm.lock();
        let mut word = match self.word.take() {
            Some(word) => word,
            None => comm.alloc(Dtype::I32, self.plan.params().len())?,
        };
        for (param, used) in word.as_mut_slice::<i32>().iter_mut().enumerate() {
            let place = self.plan.place(ParamId(param));
            *used = place
                .is_some_and(|(bucket, entry)| self.buckets[bucket].is_filled(entry))
                .into();
        }
        let word = comm
            .submit(self.plan.control_call(), Data::InPlace(word))
            .and_then(Work::wait)?
            .into_output();
        drop(comm);
        let mut unused = Unused::default();
        for (param, used) in word.as_slice::<i32>().iter().enumerate() {
            let Some((bucket, entry)) = self.plan.place(ParamId(param)) else {
                continue;
            };
            self.buckets[bucket].set_used(entry, *used > 0);
            if *used == 0 {
                unused.everywhere.push(ParamId(param));
            } else if (*used as usize) < self.world {
                unused.somewhere.push(ParamId(param));
            }
        }
        self.word = Some(word);
        Ok(unused)
    }

    /// Parameters without a gradient on this rank: what a strategy without reductions can say by itself.
    pub fn unfilled(&self) -> Vec<ParamId> {
        let places = (0..self.plan.params().len())
            .map(|param| (ParamId(param), self.plan.place(ParamId(param))));
        let empty = |place: Option<(usize, usize)>| {
            place.is_some_and(|(bucket, entry)| !self.buckets[bucket].is_held(entry))
        };
        places
            .filter(|(_, place)| empty(*place))
            .map(|(param, _)| param)
            .collect()
    }

    /// The gradient of `param`, in the reduce dtype; `None` when it has none.
    pub fn grad(&self, param: ParamId) -> Option<Span<'_>> {
        let (bucket, entry) = self.plan.place(param)?;
        self.buckets[bucket].grad(entry)
    }

    /// The gradient of a piece that this rank updates, in the reduce dtype; `None` when its parameter has none.
    pub fn piece(&self, piece: &Piece) -> Option<Span<'_>> {
        let (bucket, entry) = self.plan.place(piece.param)?;
        self.buckets[bucket].piece(entry, piece.place.clone())
    }

    /// The same, to change (to clip it, say).
    pub fn piece_mut(&mut self, piece: &Piece) -> Option<SpanMut<'_>> {
        let (bucket, entry) = self.plan.place(piece.param)?;
        self.buckets[bucket].piece_mut(entry, piece.place.clone())
    }

    /// After an update of pieces: bring every rank's to all, where each updates its own. `with` reaches the parameters.
    ///
    /// # Errors
    /// When a rank is gone, or a parameter refuses to be read or written.
    pub fn gather(&mut self, with: &mut WithParam<'_>) -> Result<()> {
        self.check()?;
        let result = self.gather_buckets(with);
        if let Err(error) = &result {
            self.failed.get_or_insert(error.clone());
        }
        result
    }

    /// The buckets' memory is free between the end of a backward and the next: parameters travel in it. The next bucket is
    /// filled while the last one travels.
    fn gather_buckets(&mut self, with: &mut WithParam<'_>) -> Result<()> {
        let pieces = self.plan.pieces(self.rank);
        let mut before = None;
        for index in 0..self.buckets.len() {
            let Some(call) = self.plan.gather_call(index) else {
                return Ok(());
            };
            let slab = self.buckets[index].memory(self.rank)?;
            for piece in pieces.iter().filter(|piece| piece.bucket == index) {
                with(piece.param, &mut |buffer| {
                    buffer.read(piece.range.clone(), slab.part_mut(piece.place.clone()))
                })?;
            }
            let mut comm = self.comm.lock();
            self.buckets[index].launch(self.rank, |slab| comm.submit(call, Data::InPlace(slab)))?;
            drop(comm);
            if let Some(before) = before.replace(index) {
                self.scatter(before, with)?;
            }
        }
        before.map_or(Ok(()), |last| self.scatter(last, with))
    }

    /// Write a gathered bucket's parameters.
    fn scatter(&mut self, index: usize, with: &mut WithParam<'_>) -> Result<()> {
        self.buckets[index].settle()?;
        let slab = self.buckets[index].memory(self.rank)?;
        for (param, range) in self.plan.buckets()[index].layout.entries() {
            with(*param, &mut |buffer| {
                buffer.write(0..range.len(), slab.part(range.clone()))
            })?;
        }
        Ok(())
    }

    /// Forget all gradients.
    pub fn zero_grad(&mut self) {
        self.buckets.iter_mut().for_each(Bucket::clear);
    }

    /// The reduction that a synchronised backward applies, if any.
    pub fn reduction(&self) -> Option<ReduceOp> {
        self.plan.reduction()
    }

    fn check(&self) -> Result<()> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn error(&self, what: &str, hint: &str) -> Error {
        Error::model(self.rank, what, hint)
    }
}
