//! What happens to a model's tensors, in order: units come and go with the passes, gradients become ready, buckets fill and
//! leave in plan order while backward goes on; at the end everything is waited for and the ranks compare which parameters
//! were used; after the update parameters return to where they stand.

mod gradients;
mod update;
mod word;

use std::sync::Arc;

use fabric_kernels::SquareBins;

use super::{
    Edge, ParamId, Parameters, SharedComm, UnitId,
    bucket::{Bucket, Memory},
    groups::Groups,
    mains::Mains,
    plan::Plan,
    pool::{Pool, Rest},
    units::{Pass, Units},
};
use crate::{
    buffer::{Buffer, Slab},
    comm::{
        Data,
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

/// What a plan needed for a moment, at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    /// Units that were whole at once.
    pub whole_units: usize,
    /// Blocks in which parameters travel.
    pub gather_blocks: usize,
    /// Blocks that gradients are lent.
    pub reduce_blocks: usize,
}

/// Runs a plan, step after step.
pub struct Sequencer {
    plan: Plan,
    groups: Groups,
    params: Arc<dyn Parameters>,
    mains: Arc<Mains>,
    rank: usize,
    world: usize,
    buckets: Vec<Bucket>,
    blocks: Pool, // lent to buckets that keep slices only
    units: Units,
    word: Option<Slab>, // the control word's memory; away while it is reduced
    norm: Option<Slab>, // the same, of what ranks say of a norm at other times
    unused: Unused,     // after the last synchronised backward
    squares: Option<SquareBins>, // of the gradients as they are, where the control word brought them
    factor: f64,                 // what gradients are still to be multiplied by
    is_mean: bool,               // sums over replicas are complete, and scaled
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

/// The parameters of a model that keeps them whole: nothing of theirs is ever asked for.
struct Untouched;

impl Parameters for Untouched {
    fn with(&self, _: ParamId, _: &mut dyn FnMut(&mut dyn Buffer) -> Result<()>) -> Result<()> {
        Err(Error::argument(
            "this sequencer was made for gradients alone",
            "Make it with Sequencer::for_model",
        ))
    }
    fn initialize(&self, _: ParamId) -> Result<()> {
        Ok(())
    }
    fn acquire(&self, _: ParamId) -> Result<()> {
        Ok(())
    }
    fn release(&self, _: ParamId) -> Result<()> {
        Ok(())
    }
}

impl Sequencer {
    /// A sequencer for the gradients of `plan` over `comm`. The ranks' plans must agree (see [`super::replicate::agree`]).
    ///
    /// # Errors
    /// When there is no memory for the gradients.
    pub fn new(plan: Plan, comm: SharedComm) -> Result<Self> {
        Self::for_model(plan, Groups::flat(comm), Arc::new(Untouched))
    }

    /// A sequencer for the gradients of `plan` and the parameters behind `params`.
    ///
    /// # Errors
    /// When there is no memory for the gradients.
    pub fn for_model(plan: Plan, groups: Groups, params: Arc<dyn Parameters>) -> Result<Self> {
        let rank = groups.world.rank();
        let buckets = (0..plan.buckets().len())
            .map(|index| {
                let memory = Self::memory(&plan, &groups, index)?;
                let own = plan.own(index, rank);
                Ok(Bucket::new(plan.buckets()[index].clone(), own, memory))
            })
            .collect::<Result<Vec<_>>>()?;
        let (block_bytes, blocks) = plan.reduce_blocks();
        let (world, trace) = (groups.world.size(), groups.world.trace());
        Ok(Self {
            mains: Arc::new(Mains::new(&plan, rank, groups.reduce.device())?),
            blocks: Pool::new(groups.reduce.clone(), block_bytes, blocks)?,
            units: Units::new(&plan, groups.gather.clone(), groups.regather.clone())?,
            plan,
            groups,
            params,
            rank,
            world,
            buckets,
            word: None,
            norm: None,
            unused: Unused::default(),
            squares: None,
            factor: 1.0,
            is_mean: false,
            phase: Phase::Idle,
            touched: false,
            failed: None,
            trace,
        })
    }

    /// What bucket `index` keeps its gradients in.
    fn memory(plan: &Plan, groups: &Groups, index: usize) -> Result<Memory> {
        let bucket = &plan.buckets()[index];
        if !bucket.trainable {
            return Ok(Memory::Nothing);
        }
        let whole = || groups.reduce.lock().alloc(bucket.dtype, bucket.padded);
        let sum = || {
            let numel = plan.own(index, groups.world.rank()).len();
            let dtype = bucket.dtype.accumulator();
            match &groups.replica {
                Some(replica) => replica.lock().alloc(dtype, numel),
                None => Slab::zeroed_on(groups.reduce.device(), dtype, numel).map_err(
                    Error::kernel(groups.world.rank(), "make room for gradients"),
                ),
            }
        };
        Ok(if plan.reduces_each(index) {
            Memory::Sum(sum()?)
        } else if plan.has_replicas() {
            Memory::WholeAndSum(whole()?, sum()?)
        } else {
            Memory::Whole(whole()?)
        })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The communicators.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// The values that are updated, where the model does not hold them.
    pub fn mains(&self) -> Arc<Mains> {
        self.mains.clone()
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// A pass crosses the border of a unit. On entrance its parameters are brought here.
    ///
    /// # Errors
    /// When a rank is gone, or the library refuses. The error is also kept, for [`Sequencer::finish`].
    pub fn unit(&mut self, unit: UnitId, edge: Edge) -> Result<()> {
        let result = self.cross(unit, edge);
        self.keep(&result);
        result
    }

    fn cross(&mut self, unit: UnitId, edge: Edge) -> Result<()> {
        self.check()?;
        if unit.0 >= self.plan.units().len() {
            return Err(self.error(
                &format!("unit {} of {}", unit.0, self.plan.units().len()),
                "Number the units as Model::units lists them",
            ));
        }
        let (plan, mains, params) = (&self.plan, &self.mains, &*self.params);
        match edge {
            Edge::ForwardEnter => {
                let last = UnitId(plan.units().len() - 1);
                if unit != last && self.phase == Phase::Idle {
                    // It waited for a backward that did not come.
                    self.units.leave_backward(last, plan, params)?;
                }
                self.units.enter(unit, Pass::Forward, plan, mains, params)
            }
            Edge::ForwardLeave => self.units.leave_forward(unit, plan, params),
            Edge::BackwardEnter => self.units.enter(unit, Pass::Backward, plan, mains, params),
            Edge::BackwardLeave => self.leave_backward(unit),
        }
    }

    /// A unit's backward is over: its memory is free, unless it is to stay.
    fn leave_backward(&mut self, unit: UnitId) -> Result<()> {
        self.units.leave_backward(unit, &self.plan, &*self.params)
    }

    /// A backward begins; `sync`: it is the last micro-batch, its end makes the gradients whole.
    ///
    /// # Errors
    /// When one is under way already, or an earlier one failed.
    pub fn begin(&mut self, sync: bool) -> Result<()> {
        self.begin_scaled(sync, 1.0)
    }

    /// The same, of a loss that was multiplied by `loss_scale`: gradients are divided by it again by whoever reads them.
    ///
    /// # Errors
    /// As [`Sequencer::begin`].
    pub fn begin_scaled(&mut self, sync: bool, loss_scale: f64) -> Result<()> {
        self.check()?;
        if self.phase != Phase::Idle {
            return Err(self.error(
                "backward was called inside backward",
                "Call fabric.backward once for each loss",
            ));
        }
        // What is held goes on in the scale of what comes.
        self.multiply(loss_scale);
        self.apply_scale()?;
        self.factor = 1.0 / loss_scale;
        for bucket in &mut self.buckets {
            bucket.begin(self.rank)?;
        }
        self.squares = None;
        self.touched = false;
        self.phase = Phase::Backward {
            sync: sync && self.plan.reduces(),
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
        self.keep(&result);
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
        if self.phase == Phase::Idle {
            return Err(self.error(
                &format!("the gradient of '{name}' became ready outside fabric.backward"),
                "Call fabric.backward(loss) instead of the library's own backward",
            ));
        }
        let Some((bucket, entry)) = self.plan.grad_place(param) else {
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
        self.share_mean()?;
        if self.buckets[bucket].wants_memory() {
            let memory = self.borrow_block(bucket)?;
            self.buckets[bucket].lend(memory);
        }
        self.buckets[bucket].take(self.rank, entry, grad)?;
        self.launch_full()?;
        if let Some(unit) = self.plan.buckets()[bucket].unit
            && self.units.is_here(unit)
            && self.is_done(unit)
        {
            self.leave_backward(unit)?;
        }
        Ok(Keep::Drop)
    }

    /// A mean over replicas stands for every rank's share of the sum that is taken next. Not before there is something to
    /// add: a backward may turn out to concern another model.
    fn share_mean(&mut self) -> Result<()> {
        if std::mem::take(&mut self.is_mean) {
            let factor = self.plan.mesh().shards as f64;
            for bucket in self.buckets.iter_mut().filter(|bucket| bucket.holds()) {
                bucket.scale(self.rank, factor)?;
            }
        }
        Ok(())
    }

    /// Whether all gradients of a unit have arrived.
    fn is_done(&self, unit: UnitId) -> bool {
        let buckets = self.units.buckets(unit);
        buckets.iter().all(|index| self.buckets[*index].is_full())
    }

    /// Memory for the gradients of bucket `index`: a free block, or that of the reduction that was launched first.
    fn borrow_block(&mut self, index: usize) -> Result<(Slab, Rest)> {
        if !self.blocks.has_free()
            && let Some(oldest) = self.buckets.iter_mut().find(|bucket| bucket.owes_memory())
        {
            oldest.land(self.rank, &mut self.blocks)?;
        }
        let bucket = &self.plan.buckets()[index];
        self.blocks.take(bucket.dtype, bucket.padded)
    }

    /// Whether this backward reduces bucket `index`.
    fn launches(&self, index: usize) -> bool {
        let sync = matches!(self.phase, Phase::Backward { sync: true, .. });
        self.plan.reduce_call(index).is_some() && (sync || self.plan.reduces_each(index))
    }

    /// Launch every full bucket whose predecessors are all launched: the order of the plan, whatever the order of
    /// readiness, because all ranks must submit alike.
    fn launch_full(&mut self) -> Result<()> {
        while let Phase::Backward { launched, .. } = self.phase
            && launched < self.buckets.len()
            && (!self.launches(launched) || self.buckets[launched].is_full())
        {
            self.launch(launched)?;
        }
        Ok(())
    }

    /// Launch bucket `index`, the next in order, if this backward reduces it.
    fn launch(&mut self, index: usize) -> Result<()> {
        if let (true, Some(call)) = (self.launches(index), self.plan.reduce_call(index)) {
            if self.buckets[index].wants_memory() {
                let memory = self.borrow_block(index)?;
                self.buckets[index].lend(memory);
            }
            self.buckets[index].fill_gaps(self.rank)?;
            let mut comm = self.groups.reduce.lock();
            self.buckets[index].launch(self.rank, |slab| comm.submit(call, Data::InPlace(slab)))?;
            self.buckets[index].spend();
        }
        if let Phase::Backward { launched, .. } = &mut self.phase {
            *launched = index + 1;
        }
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
    pub fn finish(&mut self) -> Result<Option<&Unused>> {
        let result = match self.failed.take() {
            Some(error) => Err(error),
            None => self.complete(),
        };
        self.phase = Phase::Idle;
        self.keep(&result);
        result.map(|compared| compared.then_some(&self.unused))
    }

    /// Says whether the ranks have compared.
    fn complete(&mut self) -> Result<bool> {
        let Phase::Backward { sync, launched } = self.phase else {
            return Err(self.error("the end of a backward that never began", "Call begin first"));
        };
        self.share_mean()?;
        for index in launched..self.buckets.len() {
            self.launch(index)?;
        }
        for bucket in self.buckets.iter_mut().filter(|bucket| bucket.is_away()) {
            bucket.land(self.rank, &mut self.blocks)?;
        }
        self.units.finish(&self.plan, &*self.params)?;
        if let Some(device) = self.groups.reduce.device() {
            device.flush()?; // gradients that wait to be packed are not kept any longer
        }
        if !sync {
            // Replicated gradients may be looked at before they are averaged.
            let buckets = self.buckets.iter_mut().zip(self.plan.buckets());
            buckets
                .filter(|(_, plan)| !plan.axis.shards_update() && !self.plan.has_replicas())
                .for_each(|(bucket, _)| bucket.hold_filled());
            return Ok(false);
        }
        self.add_replicas()?;
        self.compare()?;
        Ok(true)
    }

    /// Add up the sums of all replicas, and take the mean.
    fn add_replicas(&mut self) -> Result<()> {
        let Some(replica) = &self.groups.replica else {
            return Ok(());
        };
        let mut comm = replica.lock();
        for (index, bucket) in self.buckets.iter_mut().enumerate() {
            if let Some(call) = self.plan.replica_call(index) {
                bucket.launch_sum(|slab| comm.submit(call, Data::InPlace(slab)))?;
            }
        }
        drop(comm);
        for (index, bucket) in self.buckets.iter_mut().enumerate() {
            if self.plan.replica_call(index).is_some() {
                bucket.land_sum(self.rank, 1.0 / self.world as f64)?;
            }
        }
        self.is_mean = true;
        Ok(())
    }

    /// Whether ranks need each other in a backward, which may be synchronised: one that fails leaves the others waiting.
    pub fn meets(&self, sync: bool) -> bool {
        let each = |index: usize| {
            let bucket = &self.plan.buckets()[index];
            bucket.unit.is_some() || (bucket.trainable && self.plan.reduces_each(index))
        };
        (sync && self.plan.reduces()) || (0..self.buckets.len()).any(each)
    }

    /// What was needed for a moment, at most, so far.
    pub fn working_set(&mut self) -> WorkingSet {
        WorkingSet {
            whole_units: self.units.most_whole(),
            gather_blocks: self.units.pool().blocks(),
            reduce_blocks: self.blocks.blocks(),
        }
    }

    fn keep<T>(&mut self, result: &Result<T>) {
        if let Err(error) = result {
            self.failed.get_or_insert_with(|| error.clone());
        }
    }

    fn check(&self) -> Result<()> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn error(&self, what: &str, hint: &str) -> Error {
        Error::model(self.rank, what, hint)
    }
}
