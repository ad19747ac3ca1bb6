//! The circle of a sharded parameter: a unit's are gathered before they are used, the next unit's while they are used,
//! and dropped when no one needs them until they are updated. At most `prefetch` gathers are on their way, and, in order,
//! one unit (and the last one, between its forward and its backward) is whole.

use std::ops::Range;

use super::{
    Parameters, SharedComm, UnitId,
    mains::Mains,
    plan::{Plan, Reshard},
    pool::{Pool, Rest},
};
use crate::{
    buffer::Slab,
    comm::{Data, Work},
    error::{Error, Result},
};
use fabric_kernels as kernels;

/// All units of a model.
pub(super) struct Units {
    units: Vec<Unit>,
    gather: SharedComm,
    regather: Option<SharedComm>,
    pool: Pool,
    whole: usize,
    most_whole: usize,
}

struct Unit {
    buckets: Vec<usize>,
    place: Place,
    coming: Vec<(usize, Work, Rest)>, // its gathers, by bucket
    kept: Vec<Slab>, // by bucket: this rank's slice for a second gather among neighbours
    is_kept: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Away,
    Coming,
    Here,
}

/// Which way a pass goes through the units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    Forward,
    Backward,
}

impl Units {
    pub(super) fn new(
        plan: &Plan,
        gather: SharedComm,
        regather: Option<SharedComm>,
    ) -> Result<Self> {
        let members = |unit: usize| {
            let is_member = |index: &usize| plan.buckets()[*index].unit == Some(UnitId(unit));
            (0..plan.buckets().len())
                .filter(is_member)
                .collect::<Vec<_>>()
        };
        let mut units = Vec::new();
        for unit in 0..plan.units().len() {
            let buckets = members(unit);
            let mut kept = Vec::new();
            if let Some(near) = &regather {
                for index in &buckets {
                    let bucket = &plan.buckets()[*index];
                    let numel = bucket.padded / near.size();
                    let slab = Slab::zeroed_on(near.device(), bucket.param_dtype, numel);
                    let room = "make room for a second gather";
                    kept.push(slab.map_err(Error::kernel(near.rank(), room))?);
                }
            }
            units.push(Unit {
                place: Place::Away,
                coming: Vec::with_capacity(buckets.len()),
                buckets,
                kept,
                is_kept: false,
            });
        }
        let (block_bytes, blocks) = plan.gather_blocks();
        Ok(Self {
            units,
            pool: Pool::new(gather.clone(), block_bytes, blocks)?,
            gather,
            regather,
            whole: 0,
            most_whole: 0,
        })
    }

    /// The blocks in which parameters travel.
    pub(super) fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }

    /// How many units were whole at once, at most.
    pub(super) fn most_whole(&self) -> usize {
        self.most_whole
    }

    /// Bring a unit here, and send for those that come next.
    pub(super) fn enter(
        &mut self,
        unit: UnitId,
        pass: Pass,
        plan: &Plan,
        mains: &Mains,
        params: &dyn Parameters,
    ) -> Result<()> {
        if self.units[unit.0].place == Place::Away {
            self.send_for(unit.0, pass, plan, mains)?;
        }
        if self.units[unit.0].place == Place::Coming {
            self.land(unit.0, plan, params)?;
        }
        for next in self.next(unit.0, pass, plan.options().prefetch) {
            if self.units[next].place == Place::Away && !self.units[next].buckets.is_empty() {
                self.send_for(next, pass, plan, mains)?;
            }
        }
        Ok(())
    }

    /// The units that follow `unit`, nearest first.
    fn next(&self, unit: usize, pass: Pass, count: usize) -> impl Iterator<Item = usize> + use<> {
        let range: Range<usize> = match pass {
            Pass::Forward => unit + 1..self.units.len().min((unit + 1).saturating_add(count)),
            Pass::Backward => unit.saturating_sub(count)..unit,
        };
        let (mut forward, mut backward) = match pass {
            Pass::Forward => (Some(range), None),
            Pass::Backward => (None, Some(range.rev())),
        };
        std::iter::from_fn(move || {
            forward
                .as_mut()
                .and_then(Iterator::next)
                .or_else(|| backward.as_mut().and_then(Iterator::next))
        })
    }

    fn send_for(&mut self, index: usize, pass: Pass, plan: &Plan, mains: &Mains) -> Result<()> {
        let unit = &mut self.units[index];
        let near = self
            .regather
            .as_ref()
            .filter(|_| pass == Pass::Backward && unit.is_kept);
        for (position, bucket) in unit.buckets.iter().enumerate() {
            let shape = &plan.buckets()[*bucket];
            let (mut slab, rest) = self.pool.take(shape.param_dtype, shape.padded)?;
            let comm = match near {
                Some(near) => {
                    let kept = &unit.kept[position];
                    let own = near.rank() * kept.numel()..(near.rank() + 1) * kept.numel();
                    copy(kept, 0..kept.numel(), &mut slab, own);
                    near
                }
                None => {
                    mains.copy_into(plan, *bucket, &mut slab)?;
                    &self.gather
                }
            };
            let call = plan.gather_call(*bucket);
            let work = comm.lock().submit(call, Data::InPlace(slab))?;
            unit.coming.push((*bucket, work, rest));
        }
        unit.place = Place::Coming;
        Ok(())
    }

    fn land(&mut self, index: usize, plan: &Plan, params: &dyn Parameters) -> Result<()> {
        let unit = &mut self.units[index];
        for (position, (bucket, work, rest)) in unit.coming.drain(..).enumerate() {
            let slab = work.wait()?.into_output();
            // The library's forward comes next: what is put off ends here.
            kernels::batch(|| {
                let mut entries = plan.buckets()[bucket].layout.entries().iter();
                entries.try_for_each(|(param, range)| {
                    params.acquire(*param)?;
                    params.with(*param, &mut |buffer| {
                        buffer.write(0..range.len(), slab.part(range.clone()))
                    })
                })
            })?;
            if let Some(near) = self.regather.as_ref().filter(|_| !unit.is_kept) {
                let kept = &mut unit.kept[position];
                let all = 0..kept.numel();
                let own = near.rank() * kept.numel()..(near.rank() + 1) * kept.numel();
                copy(&slab, own, kept, all);
            }
            self.pool.give(slab, rest);
        }
        unit.is_kept = self.regather.is_some();
        unit.place = Place::Here;
        self.whole += 1;
        self.most_whole = self.most_whole.max(self.whole);
        Ok(())
    }

    /// A forward has left a unit: drop it, unless backward begins with it.
    pub(super) fn leave_forward(
        &mut self,
        unit: UnitId,
        plan: &Plan,
        params: &dyn Parameters,
    ) -> Result<()> {
        let last = unit.0 + 1 == self.units.len();
        if last || plan.options().reshard_after_forward == Reshard::No {
            return Ok(());
        }
        self.drop_unit(unit, plan, params)
    }

    /// A backward has left a unit: drop it, unless it is to stay until the update.
    pub(super) fn leave_backward(
        &mut self,
        unit: UnitId,
        plan: &Plan,
        params: &dyn Parameters,
    ) -> Result<()> {
        match plan.options().reshard_after_forward {
            Reshard::No => Ok(()),
            _ => self.drop_unit(unit, plan, params),
        }
    }

    /// Give up a unit's memory, when it has any.
    pub(super) fn drop_unit(
        &mut self,
        unit: UnitId,
        plan: &Plan,
        params: &dyn Parameters,
    ) -> Result<()> {
        let unit = &mut self.units[unit.0];
        if unit.place != Place::Here {
            return Ok(());
        }
        for bucket in &unit.buckets {
            for (param, _) in plan.buckets()[*bucket].layout.entries() {
                params.release(*param)?;
            }
        }
        unit.place = Place::Away;
        self.whole -= 1;
        Ok(())
    }

    /// Whether a unit is here.
    pub(super) fn is_here(&self, unit: UnitId) -> bool {
        self.units[unit.0].place == Place::Here
    }

    /// The buckets of a unit.
    pub(super) fn buckets(&self, unit: UnitId) -> &[usize] {
        &self.units[unit.0].buckets
    }

    /// A backward is over: drop what is here, unless it is to stay until the update.
    pub(super) fn finish(&mut self, plan: &Plan, params: &dyn Parameters) -> Result<()> {
        (0..self.units.len()).try_for_each(|unit| self.leave_backward(UnitId(unit), plan, params))
    }

    /// Parameters have changed: everything that was gathered is stale.
    pub(super) fn renew(&mut self, plan: &Plan, params: &dyn Parameters) -> Result<()> {
        for index in 0..self.units.len() {
            self.drop_unit(UnitId(index), plan, params)?;
            let unit = &mut self.units[index];
            unit.is_kept = false;
            if unit.place == Place::Coming {
                for (_, work, rest) in unit.coming.drain(..) {
                    self.pool.give(work.wait()?.into_output(), rest);
                }
                unit.place = Place::Away;
            }
        }
        Ok(())
    }
}

fn copy(from: &Slab, source: Range<usize>, into: &mut Slab, target: Range<usize>) {
    kernels::cast(from.part(source), into.part_mut(target)).expect("a copy within one dtype");
}
