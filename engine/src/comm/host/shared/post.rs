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
    hand::Hand,
    outline::{Outline, Posts, Work},
};
use crate::{
    error::{Error, Result},
    wire::{
        frame::{Header, ReduceCode},
        shm::{Group, WORDS},
    },
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
    pub(super) fn go(&mut self, data: &mut Data) -> Result<Spent> {
        let posts = self.posts;
        let hand = Hand::new(self.outline, data);
        self.group.room(self.header)?;
        let mut words = [0; WORDS];
        words[0] = match self.math.reduce {
            ReduceOp::PreMulSum(factor) => factor.to_bits(),
            _ => 1f64.to_bits(),
        };
        let elems = self.outline.lengths.0;
        let mut post = 0;
        let mut parts = [0..0, 0..elems];
        if posts.is_inline {
            let mut filled = 0;
            let target = bytemuck::cast_slice_mut::<u64, u8>(&mut words[1..]);
            hand.read(data, 0..elems, |slab, range| {
                let part = slab.bytes_of(&range);
                target[filled..filled + part.len()].copy_from_slice(part);
                filled += part.len();
                Ok(())
            })?;
        } else {
            post = self.group.next_post();
            if let Data::Out { .. } = data {
                parts = [0..posts.own.start, posts.own.end..elems]; // in place, the rest is overwritten
            }
            for part in parts.iter().filter(|part| !part.is_empty()) {
                self.post(post, part, &hand, data)?;
            }
        }
        let print = self.group.come(self.header, &words);
        let reduces = self.math.stamp.reduce != ReduceCode::None;
        if !reduces {
            // What this rank keeps need not wait for anybody.
            for work in posts.works.iter().filter(|work| work.peers == 0) {
                self.keep(work, &hand, data)?;
            }
        }
        self.group.wait(self.header, print, posts.needs)?;
        if let ReduceOp::PreMulSum(_) = self.math.reduce {
            let words = self.group.words().iter();
            self.factors.clear();
            (self.factors).extend(words.map(|words| f64::from_bits(words[0])));
        }
        let mut spent = Spent {
            collectives: 1,
            ..Spent::default()
        };
        for work in &posts.works {
            let bytes = work.peers * work.elems * self.math.stamp.dtype.size();
            spent.bytes += bytes as u64;
            spent.messages += u64::from(work.peers > 0);
            if reduces {
                self.fold(work, post, &hand, data)?;
            } else if work.peers > 0 {
                self.fetch(work, post, &hand, data)?;
            }
        }
        if !posts.is_inline {
            let (own, size) = (self.group.own().mapping(), self.math.stamp.dtype.size());
            for part in parts.iter().filter(|part| !part.is_empty()) {
                // Calls like to repeat.
                own.expect(post.wrapping_add(1), part.start * size..part.end * size);
            }
        }
        Ok(spent)
    }

    /// Leave a copy of elements of this rank's input where peers find it.
    fn post(&self, post: u32, part: &Range<usize>, hand: &Hand, data: &Data) -> Result<()> {
        let own = self.group.own().mapping();
        let mut skip = part.start * self.math.stamp.dtype.size();
        hand.read(data, part.clone(), |slab, range| {
            let bytes = slab.bytes_of(&range);
            own.post(post, skip, bytes);
            skip += bytes.len();
            Ok(())
        })
    }

    /// The output of a work whose only source is this rank's own input.
    fn keep(&self, work: &Work, hand: &Hand, data: &mut Data) -> Result<()> {
        let Data::Out { from, into } = data else {
            return Ok(()); // in place, the elements are where they belong
        };
        let skip = work.skip_bytes / from.dtype().size();
        let (input, output) = (hand.input.start + skip, hand.output.start + work.start);
        kernels::cast(
            from.part(input..input + work.elems),
            into.part_mut(output..output + work.elems),
        )
        .map_err(self.refused())
    }

    /// The output of a work whose only source is a peer's input.
    fn fetch(&self, work: &Work, post: u32, hand: &Hand, data: &mut Data) -> Result<()> {
        let peer = work.sources.start;
        let elems = work.start..work.start + work.elems;
        hand.write(data, elems, |slab, part, before| {
            let skip = work.skip_bytes + before * slab.dtype().size();
            let target = slab.bytes_of_mut(&part);
            match self.posts.is_inline {
                true => target.copy_from_slice(&self.inline(peer)[skip..skip + target.len()]),
                false => self.group.memory(peer).take(post, skip, target),
            }
            Ok(())
        })
    }

    /// The output of a work that folds what several have posted.
    fn fold(&self, work: &Work, post: u32, hand: &Hand, data: &mut Data) -> Result<()> {
        let elems = work.start..work.start + work.elems;
        if let Data::Out { from, into } = data {
            let skip = hand.input.start + work.skip_bytes / from.dtype().size();
            let own = from.part(skip..skip + work.elems);
            let output = hand.output.start;
            let target = into.part_mut(output + elems.start..output + elems.end);
            return self.fold_into(work, post, work.skip_bytes, Some(own), target);
        }
        hand.write(data, elems, |slab, part, before| {
            let skip_bytes = work.skip_bytes + before * slab.dtype().size();
            self.fold_into(work, post, skip_bytes, None, slab.part_mut(part))
        })
    }

    /// `own`: this rank's source, where it still lies with the caller.
    #[inline]
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
        done.map_err(self.refused())
    }

    /// What a rank has posted in its flag's cache line.
    fn inline(&self, rank: usize) -> &[u8] {
        bytemuck::cast_slice(&self.group.words()[rank][1..])
    }

    fn refused(&self) -> impl FnOnce(KernelError) -> Error + use<> {
        Error::kernel(self.math.rank, *self.math.stamp)
    }
}
