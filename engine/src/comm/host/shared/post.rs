//! Small calls: each rank posts a copy of its input where peers find it, in the flag's own cache line if it fits, all meet
//! once, and everybody works out its output alone.
//!
//! [Note: every instruction counts] Of the third of a microsecond that a call of 1 KiB takes, the way between two cores is
//! half. So nothing here is worked out that the outline can know, nothing is moved about, and no number is divided by one that
//! is not a constant; `benches/instructions` counts.

use std::ops::Range;

use fabric_kernels::{self as kernels, Combiner, Fold, KernelError, Span, SpanMut, Store};
use smallvec::SmallVec;

use super::{
    super::{
        super::{Data, ReduceOp, Spent},
        math::Math,
    },
    outline::{Outline, Posts, Work},
};
use crate::{
    buffer::Slab,
    error::{Error, Result},
    wire::{frame::Header, shm::Group},
};

/// One small call on its way.
pub(super) struct Posting<'a> {
    pub(super) group: &'a mut Group,
    pub(super) factors: &'a mut Vec<f64>, // by rank
    pub(super) header: &'a Header,
    pub(super) math: Math<'a>,
    pub(super) outline: &'a Outline,
    pub(super) posts: &'a Posts,
    pub(super) combiner: &'a Combiner,
}

impl Posting<'_> {
    /// All meet once, each with a copy of its input; says what it cost.
    #[inline(always)]
    pub(super) fn go(&mut self, data: &mut Data) -> Result<Spent> {
        let posts = self.posts;
        self.group.room(self.header)?;
        let mut words = [1f64.to_bits(), 0, 0, 0, 0, 0];
        if let ReduceOp::PreMulSum(factor) = self.math.reduce {
            words[0] = factor.to_bits();
        }
        let mut post = 0;
        // In place, what this rank keeps is overwritten before all of it was folded.
        let parts = match data {
            Data::Out { .. } => &posts.foreign[..],
            _ => &posts.whole[..],
        };
        if posts.is_inline {
            let target = bytemuck::cast_slice_mut::<u64, u8>(&mut words[1..]);
            self.input(data, &posts.whole[0], |skip, bytes| {
                target[skip..skip + bytes.len()].copy_from_slice(bytes);
            });
        } else {
            post = self.group.next_post();
            let own = self.group.own().mapping();
            for part in parts {
                self.input(data, part, |skip, bytes| own.post(post, skip, bytes));
            }
        }
        let has_words = posts.has_words || matches!(self.math.reduce, ReduceOp::PreMulSum(_));
        let words = Some(&words).filter(|_| has_words);
        let print = self.group.come(self.header, words);
        self.group.enter(&self.header.stamp); // as late as this: others wait for the step, and nobody for this
        let reduces = self.math.reduces();
        if !reduces {
            // What this rank keeps need not wait for anybody.
            for work in posts.works.iter().filter(|work| work.peers == 0) {
                self.keep(work, data);
            }
        }
        self.group.wait(self.header, print, posts.needs)?;
        for work in &posts.works {
            if reduces {
                self.fold(work, post, data)?;
            } else if work.peers > 0 {
                self.fetch(work, post, data);
            }
        }
        if !posts.is_inline {
            let own = self.group.own().mapping();
            for part in parts {
                own.expect(post.wrapping_add(1), part.clone()); // calls like to repeat
            }
        }
        Ok(posts.spent)
    }

    /// Go over these bytes of this rank's input, in order: how many came before, and bytes.
    #[inline(always)]
    fn input(&self, data: &Data, part: &Range<usize>, mut each: impl FnMut(usize, &[u8])) {
        let start = self.posts.starts_bytes.0;
        match data {
            _ if part.is_empty() => {}
            Data::None => {}
            Data::Out { from, .. } => each(part.start, &from.as_bytes()[part.clone()]),
            Data::InPlace(slab) => {
                let bytes = &slab.as_bytes()[start + part.start..start + part.end];
                each(part.start, bytes);
            }
            Data::Many(slabs) => {
                let mut skip = 0;
                for slab in slabs {
                    each(skip, slab.as_bytes()); // many are one vector, of which every rank has the whole
                    skip += slab.bytes();
                }
            }
        }
    }

    /// Go over the output of a work, in order: slabs, elements of each, and how many came before.
    #[inline(always)]
    fn output(
        &self,
        data: &mut Data,
        work: &Work,
        mut each: impl FnMut(&mut Slab, Range<usize>, usize) -> Result<()>,
    ) -> Result<()> {
        let start = match data {
            Data::InPlace(_) => self.outline.starts.1 + work.start,
            _ => work.start,
        };
        match data {
            Data::None => Ok(()),
            Data::InPlace(slab) | Data::Out { into: slab, .. } => {
                each(slab, start..start + work.elems, 0)
            }
            Data::Many(slabs) => {
                let mut before = 0;
                slabs.iter_mut().try_for_each(|slab| {
                    let (skip, numel) = (before, slab.numel());
                    before += numel;
                    each(slab, 0..numel, skip)
                })
            }
        }
    }

    /// The output of a work whose only source is this rank's own input. In place, the elements are where they belong.
    #[inline(always)]
    fn keep(&self, work: &Work, data: &mut Data) {
        if let Data::Out { from, into } = data {
            let output = work.start_bytes..work.start_bytes + work.bytes;
            let input = work.skip_bytes..work.skip_bytes + work.bytes;
            into.as_bytes_mut()[output].copy_from_slice(&from.as_bytes()[input]);
        }
    }

    /// The output of a work whose only source is a peer's input.
    #[inline(always)]
    fn fetch(&self, work: &Work, post: u32, data: &mut Data) {
        let take = |skip: usize, target: &mut [u8]| match self.posts.is_inline {
            true => {
                let words = self.inline(work.sources.start);
                target.copy_from_slice(&words[skip..skip + target.len()]);
            }
            false => {
                let memory = self.group.memory(work.sources.start);
                memory.take(post, skip, target);
            }
        };
        let start = match data {
            Data::InPlace(_) => self.posts.starts_bytes.1 + work.start_bytes,
            _ => work.start_bytes,
        };
        match data {
            Data::None => {}
            Data::InPlace(slab) | Data::Out { into: slab, .. } => take(
                work.skip_bytes,
                &mut slab.as_bytes_mut()[start..start + work.bytes],
            ),
            Data::Many(slabs) => {
                let mut skip = 0;
                for slab in slabs {
                    take(skip, slab.as_bytes_mut());
                    skip += slab.bytes();
                }
            }
        }
    }

    /// The output of a work that folds what several have posted.
    fn fold(&mut self, work: &Work, post: u32, data: &mut Data) -> Result<()> {
        if let ReduceOp::PreMulSum(_) = self.math.reduce {
            let words = self.group.words().iter();
            self.factors.clear();
            (self.factors).extend(words.map(|words| f64::from_bits(words[0])));
        }
        if let Data::Out { from, into } = data {
            let skip = work.skip_bytes / from.dtype().size();
            let own = from.part(skip..skip + work.elems);
            let target = into.part_mut(work.start..work.start + work.elems);
            return self.fold_into(work, post, work.skip_bytes, Some(own), target);
        }
        self.output(data, work, |slab, part, before| {
            let skip_bytes = work.skip_bytes + before * slab.dtype().size();
            self.fold_into(work, post, skip_bytes, None, slab.part_mut(part))
        })
    }

    /// `own`: this rank's source, where it still lies with the caller.
    #[inline(always)]
    fn fold_into(
        &self,
        work: &Work,
        post: u32,
        skip_bytes: usize,
        own: Option<Span<'_>>,
        target: SpanMut<'_>,
    ) -> Result<()> {
        let (dtype, elems) = (target.dtype(), target.len());
        let load = |source: usize| match own {
            Some(own) if source == self.math.rank => own,
            _ if self.posts.is_inline => {
                let bytes = skip_bytes..skip_bytes + target.bytes();
                Span::of_bytes(&self.inline(source)[bytes], dtype)
            }
            _ => {
                let memory = self.group.memory(source);
                memory.posted(post, skip_bytes, dtype, elems)
            }
        };
        let first = work.sources.start;
        let two = [load(first), load(work.sources.end - 1)]; // the commonest are not collected
        let mut all = SmallVec::<[_; 16]>::new();
        let sources = match work.sources.len() {
            1 => &two[..1],
            2 => &two[..],
            _ => {
                all.extend(work.sources.clone().map(load));
                &all[..]
            }
        };
        let targets = &mut [target];
        let done = match self.math.reduce {
            ReduceOp::PreMulSum(_) => {
                let factors = Some(&self.factors[work.sources.clone()]);
                let finish = self.math.finishing(sources.len());
                kernels::combine(Fold::Sum, sources, factors, finish, targets, Store::Cached)
            }
            _ => self.combiner.run(sources, targets, Store::Cached),
        };
        done.map_err(|error| self.refused(error))
    }

    /// What a rank has posted in its flag's cache line.
    fn inline(&self, rank: usize) -> &[u8] {
        bytemuck::cast_slice(&self.group.words()[rank][1..])
    }

    #[cold]
    fn refused(&self, error: KernelError) -> Error {
        Error::kernel(self.math.rank, *self.math.stamp)(error)
    }
}
