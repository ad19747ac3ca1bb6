//! Gradients that travel together: where they are, which have arrived in this backward, and which hold a value at all.

use std::ops::Range;

use fabric_kernels::{self as kernels, Finish, Fold, Span, SpanMut, Store};

use super::{
    plan::BucketPlan,
    pool::{Pool, Rest},
};
use crate::{
    buffer::{Buffer, Slab},
    comm::Work,
    error::{Error, Result},
};

/// A bucket of more bytes has left the caches when it goes: it is packed past them, which spares the memory a third.
const STREAMED_BYTES: usize = 8 << 20;

/// One bucket at run time.
pub struct Bucket {
    plan: BucketPlan,
    gaps: Vec<Range<usize>>, // of the layout
    own: Range<usize>,       // what this rank keeps of the reduced gradients
    whole: Place,
    pooled: bool,       // the whole is lent for a backward, and only the sum is kept
    sum: Option<Place>, // the reduced gradients of `own`, when they are not read from the whole
    summing: bool,      // the sum holds something since the last zero_grad
    arrived: Vec<bool>, // by entry: in this backward
    filled: Vec<bool>,  // by entry: holds a gradient that the next reduction takes along
    used: Vec<bool>,    // by entry: had a gradient since the ranks last compared
    held: Vec<bool>,    // by entry: has a gradient that an optimizer can read
    missing: usize,     // entries that have not arrived in this backward
}

/// Where memory is.
enum Place {
    /// Not lent at present.
    Nowhere,
    Here(Slab, Option<Rest>),
    Away(Work, Option<Rest>),
    Lost, // an operation failed and kept it
}

/// What a bucket keeps its gradients in.
pub(super) enum Memory {
    /// All of them, in a slab of its own; the reduced ones are read where they lie.
    Whole(Slab),
    /// All of them, and the reduced ones apart.
    WholeAndSum(Slab, Slab),
    /// The reduced ones only; the whole is lent by a pool.
    Sum(Slab),
    /// Nothing: frozen.
    Nothing,
}

impl Bucket {
    /// An empty bucket, of which this rank owns `own`.
    pub(super) fn new(plan: BucketPlan, own: Range<usize>, memory: Memory) -> Self {
        let entries = match plan.trainable {
            true => plan.layout.entries().len(),
            false => 0,
        };
        let here = |slab| Place::Here(slab, None);
        let pooled = matches!(memory, Memory::Sum(_) | Memory::Nothing);
        let (whole, sum) = match memory {
            Memory::Whole(whole) => (here(whole), None),
            Memory::WholeAndSum(whole, sum) => (here(whole), Some(here(sum))),
            Memory::Sum(sum) => (Place::Nowhere, Some(here(sum))),
            Memory::Nothing => (Place::Nowhere, None),
        };
        Self {
            gaps: plan.layout.gaps(plan.padded).collect(),
            plan,
            own,
            whole,
            pooled,
            sum,
            summing: false,
            arrived: vec![false; entries],
            filled: vec![false; entries],
            used: vec![false; entries],
            held: vec![false; entries],
            missing: entries,
        }
    }

    /// Forget what has arrived: a backward begins.
    pub(super) fn begin(&mut self, rank: usize) -> Result<()> {
        self.arrived.fill(false);
        self.missing = self.arrived.len();
        // What was reduced lies in the whole, and is to be added to what comes: make room for it.
        let reduced = self.plan.axis.shards_update() && self.held.contains(&true);
        if reduced && self.sum.is_none() {
            let (Place::Here(whole, _), dtype) = (&self.whole, self.plan.dtype.accumulator())
            else {
                return Err(lost(rank));
            };
            let sum = Slab::zeroed_on(whole.device(), dtype, self.own.len());
            let sum = sum.map_err(Error::kernel(rank, "make room for a sum"))?;
            self.sum = Some(Place::Here(sum, None));
            self.add_to_sum(rank)?;
        }
        Ok(())
    }

    /// Whether every gradient has arrived.
    pub(super) fn is_full(&self) -> bool {
        self.missing == 0
    }

    /// Whether entry `entry` has arrived in this backward.
    pub(super) fn has(&self, entry: usize) -> bool {
        self.arrived[entry]
    }

    /// Whether entry `entry` had a gradient on this rank since the ranks last compared.
    pub(super) fn is_used(&self, entry: usize) -> bool {
        self.used[entry] || self.filled[entry]
    }

    /// Whether entry `entry` has a gradient that an optimizer can read.
    pub(super) fn is_held(&self, entry: usize) -> bool {
        self.held[entry]
    }

    /// Whether any has.
    pub(super) fn holds(&self) -> bool {
        self.held.contains(&true)
    }

    /// Whether the memory of the whole is on its way.
    pub(super) fn is_away(&self) -> bool {
        matches!(self.whole, Place::Away(..))
    }

    /// Whether what is on its way is a pool's.
    pub(super) fn owes_memory(&self) -> bool {
        self.pooled && self.is_away()
    }

    /// Whether taking a gradient in needs memory that a pool lends.
    pub(super) fn wants_memory(&self) -> bool {
        matches!(self.whole, Place::Nowhere)
    }

    /// Memory for the whole.
    pub(super) fn lend(&mut self, (slab, rest): (Slab, Rest)) {
        self.whole = Place::Here(slab, Some(rest));
    }

    /// Take a gradient in: copied on the first micro-batch, added on the next, cast on the way.
    pub(super) fn take(&mut self, rank: usize, entry: usize, grad: &dyn Buffer) -> Result<()> {
        // A device packs many gradients in one launch, where the library lets go of none before.
        let is_away = grad.span().is_some_and(|span| span.device().is_some());
        match grad.hold().filter(|_| is_away) {
            Some(hold) => kernels::put_off(hold, || self.copy_or_add(rank, entry, grad))?,
            None => self.copy_or_add(rank, entry, grad)?,
        }
        self.arrived[entry] = true;
        self.filled[entry] = true;
        self.used[entry] = true;
        self.missing -= 1;
        Ok(())
    }

    fn copy_or_add(&mut self, rank: usize, entry: usize, grad: &dyn Buffer) -> Result<()> {
        let range = self.plan.layout.entries()[entry].1.clone();
        let filled = self.filled[entry];
        let slab = self.here(rank)?;
        if !filled {
            let is_long = slab.bytes() > STREAMED_BYTES;
            let plain = grad.span().filter(|span| {
                let is_on_host = span.device().is_none() && slab.device().is_none();
                is_long && is_on_host && span.dtype() == slab.dtype()
            });
            return match plain {
                Some(span) => {
                    let (from, into) = (&[span], &mut [slab.part_mut(range)]);
                    kernels::combine(Fold::Sum, from, None, Finish::Cast, into, Store::Streaming)
                        .map_err(Error::kernel(rank, "pack a gradient"))
                }
                None => grad.read(0..range.len(), slab.part_mut(range)),
            };
        }
        if let Some(span) = grad.span() {
            return kernels::fold(Fold::Sum, slab.part_mut(range), span)
                .map_err(Error::kernel(rank, "add a gradient"));
        }
        let all = 0..range.len();
        let copy = Slab::zeroed_on(slab.device(), slab.dtype(), range.len());
        let mut copy = copy.map_err(Error::kernel(rank, "make room for a gradient"))?;
        grad.read(all.clone(), copy.part_mut(all.clone()))?;
        kernels::fold(Fold::Sum, slab.part_mut(range), copy.part(all))
            .map_err(Error::kernel(rank, "add a gradient"))
    }

    /// Put zeros where no gradient is: what a rank that did not use a parameter adds to the sum.
    pub(super) fn fill_gaps(&mut self, rank: usize) -> Result<()> {
        kernels::batch(|| self.clear_gaps(rank))
    }

    fn clear_gaps(&mut self, rank: usize) -> Result<()> {
        for index in 0..self.gaps.len() {
            let gap = self.gaps[index].clone();
            let part = self.here(rank)?.part_mut(gap);
            kernels::fill(part, 0.0).map_err(Error::kernel(rank, "clear the padding"))?;
        }
        for entry in 0..self.filled.len() {
            if !self.filled[entry] {
                let range = self.plan.layout.entries()[entry].1.clone();
                let part = self.here(rank)?.part_mut(range);
                kernels::fill(part, 0.0).map_err(Error::kernel(rank, "clear a gradient"))?;
            }
        }
        Ok(())
    }

    /// Send the whole away with `submit`.
    pub(super) fn launch(
        &mut self,
        rank: usize,
        submit: impl FnOnce(Slab) -> Result<Work>,
    ) -> Result<()> {
        self.here(rank)?;
        if let Place::Here(slab, rest) = std::mem::replace(&mut self.whole, Place::Lost) {
            self.whole = Place::Away(submit(slab)?, rest);
        }
        Ok(())
    }

    /// Wait until the whole is back from its reduction, and add what this rank owns to the sum, where there is one. A
    /// block of `pool` goes back to it.
    pub(super) fn land(&mut self, rank: usize, pool: &mut Pool) -> Result<()> {
        self.whole.settle()?;
        if self.sum.is_some() {
            self.add_to_sum(rank)?;
        }
        if self.pooled
            && let Place::Here(slab, Some(rest)) =
                std::mem::replace(&mut self.whole, Place::Nowhere)
        {
            pool.give(slab, rest);
        }
        Ok(())
    }

    fn add_to_sum(&mut self, rank: usize) -> Result<()> {
        let (Some(Place::Here(sum, _)), Place::Here(whole, _)) = (&mut self.sum, &self.whole)
        else {
            return Err(lost(rank));
        };
        let (from, all) = (whole.part(self.own.clone()), 0..self.own.len());
        let into = sum.part_mut(all);
        let added = match self.summing {
            true => kernels::fold(Fold::Sum, into, from),
            false => kernels::cast(from, into),
        };
        self.summing = true;
        added.map_err(Error::kernel(rank, "add a reduced gradient"))
    }

    /// Send the sum away with `submit`: to be added up over replicas.
    pub(super) fn launch_sum(&mut self, submit: impl FnOnce(Slab) -> Result<Work>) -> Result<()> {
        if let Some(sum) = &mut self.sum
            && let Place::Here(slab, _) = std::mem::replace(sum, Place::Lost)
        {
            *sum = Place::Away(submit(slab)?, None);
        }
        Ok(())
    }

    /// Wait until the sum is back, and scale it.
    pub(super) fn land_sum(&mut self, rank: usize, factor: f64) -> Result<()> {
        if let Some(sum) = &mut self.sum {
            sum.settle()?;
        }
        self.scale(rank, factor)
    }

    /// Multiply what an optimizer reads.
    pub(super) fn scale(&mut self, rank: usize, factor: f64) -> Result<()> {
        match self.reduced_mut() {
            Some(span) => {
                kernels::scale(span, factor).map_err(Error::kernel(rank, "scale gradients"))
            }
            None => Ok(()),
        }
    }

    /// Multiply everything: what an optimizer reads, and what the next reduction takes along.
    pub(super) fn scale_all(&mut self, rank: usize, factor: f64) -> Result<()> {
        let scale = |span: SpanMut<'_>| {
            kernels::scale(span, factor).map_err(Error::kernel(rank, "scale gradients"))
        };
        if let (Some(Place::Here(sum, _)), true) = (&mut self.sum, self.summing) {
            scale(sum.part_mut(0..self.own.len()))?;
        }
        let range = if self.filled.contains(&true) {
            0..self.plan.padded
        } else if self.sum.is_none() && self.holds() {
            self.own.clone()
        } else {
            return Ok(());
        };
        match &mut self.whole {
            Place::Here(whole, _) => scale(whole.part_mut(range)),
            _ => Ok(()),
        }
    }

    /// All reduced gradients that this rank holds.
    pub(super) fn owned(&self) -> Option<Span<'_>> {
        self.reduced(0..self.own.len())
    }

    /// The reduction is over: say whether any rank had a gradient for `entry`.
    pub(super) fn set_used(&mut self, entry: usize, used: bool) {
        let adds = self.plan.axis.shards_update() || self.sum.is_some();
        self.held[entry] = used || (adds && self.held[entry]);
        // A replicated gradient that was averaged is what the next micro-batch is added to.
        self.filled[entry] = used && !adds;
        self.used[entry] = false;
    }

    /// The whole was handed over for reduction: it holds nothing of this rank's any more.
    pub(super) fn spend(&mut self) {
        self.filled.fill(false);
    }

    /// There is no reduction: what arrived is what an optimizer reads.
    pub(super) fn hold_filled(&mut self) {
        self.held.copy_from_slice(&self.filled);
    }

    /// Forget all gradients.
    pub(super) fn clear(&mut self) {
        self.filled.fill(false);
        self.used.fill(false);
        self.held.fill(false);
        self.summing = false;
    }

    /// The gradient at `place` in the bucket, of entry `entry`, if there is one that an optimizer can read.
    pub(super) fn piece(&self, entry: usize, place: Range<usize>) -> Option<Span<'_>> {
        let start = self.own.start;
        self.reduced(place.start - start..place.end - start)
            .filter(|_| self.held[entry])
    }

    /// The same, to change.
    pub(super) fn piece_mut(&mut self, entry: usize, place: Range<usize>) -> Option<SpanMut<'_>> {
        if !self.held[entry] {
            return None;
        }
        let start = self.own.start;
        let span = self.reduced_mut()?;
        Some(span.into_slice(place.start - start..place.end - start))
    }

    /// Elements `range` of this rank's own, reduced.
    fn reduced(&self, range: Range<usize>) -> Option<Span<'_>> {
        let start = self.own.start;
        match (&self.sum, &self.whole) {
            (Some(Place::Here(sum, _)), _) => Some(sum.part(range)),
            (None, Place::Here(whole, _)) => {
                Some(whole.part(start + range.start..start + range.end))
            }
            _ => None,
        }
    }

    fn reduced_mut(&mut self) -> Option<SpanMut<'_>> {
        let own = self.own.clone();
        match (&mut self.sum, &mut self.whole) {
            (Some(Place::Here(sum, _)), _) => Some(sum.part_mut(0..own.len())),
            (None, Place::Here(whole, _)) => Some(whole.part_mut(own)),
            _ => None,
        }
    }

    fn here(&mut self, rank: usize) -> Result<&mut Slab> {
        match &mut self.whole {
            Place::Here(slab, _) => Ok(slab),
            Place::Away(..) => Err(Error::model(
                rank,
                "a gradient became ready while its bucket is being reduced",
                "Call fabric.backward once for each loss, and let it return before the next",
            )),
            Place::Nowhere | Place::Lost => Err(lost(rank)),
        }
    }
}

impl Place {
    /// Wait until the memory is back.
    fn settle(&mut self) -> Result<()> {
        match std::mem::replace(self, Self::Lost) {
            Self::Away(work, rest) => {
                *self = Self::Here(work.wait()?.into_output(), rest);
                Ok(())
            }
            _ => unreachable!("only what was launched lands"),
        }
    }
}

fn lost(rank: usize) -> Error {
    Error::model(
        rank,
        "the gradients were lost with a failed reduction",
        "See the first error; a job continues from its last checkpoint",
    )
}
