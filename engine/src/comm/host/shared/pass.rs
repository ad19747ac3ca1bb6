//! One call on its way through shared memory.
//!
//! Small inputs are posted: each rank copies its own where peers find it, into the flag's own cache line if it fits, all
//! meet once, and everybody works out its output alone. Large ones are loaded where they lie and results stored into all
//! outputs, between two meetings.

use std::ops::Range;

use fabric_kernels::{self as kernels, Dtype, KernelError, Store};
use smallvec::SmallVec;

use super::{
    super::{
        super::{Data, ReduceOp, Spent},
        math::Math,
        recent::Recent,
        script::cut,
    },
    Place,
    outline::{Key, Outline, Posts, Work, members},
};
use crate::{
    buffer::Slab,
    error::{Error, Result},
    schedule::{Problem, Ranks, Shared, choose::Tuning},
    wire::{
        frame::{Header, ReduceCode},
        shm::{Group, PRIVATE, STAGE_IN, post},
    },
};

/// Bytes of an input that fit a flag's cache line, beside the factor.
pub(super) const INLINE_BYTES: usize = 40;

/// One call on its way.
pub(super) struct Pass<'a> {
    pub(super) group: &'a mut Group,
    pub(super) outlines: &'a mut Recent<Key, Outline>,
    pub(super) tuning: &'a Tuning,
    pub(super) inline: &'a mut Slab,
    pub(super) factors: &'a mut Vec<f64>,  // by rank
    pub(super) places: &'a mut Vec<Place>, // by rank
    pub(super) math: Math<'a>,
    pub(super) header: Header,
    pub(super) cache_bytes: usize,
    pub(super) spent: Spent,
}

impl Pass<'_> {
    pub(super) fn go(&mut self, outline: &Outline, data: &mut Data) -> Result<()> {
        match &outline.posts {
            Some(posts) => self.post(outline, posts, data),
            None => self.load(outline, data),
        }
    }

    /// All meet once, each with a copy of its input.
    fn post(&mut self, outline: &Outline, posts: &Posts, data: &mut Data) -> Result<()> {
        let dtype = self.math.stamp.dtype;
        let is_inline = posts.longest * dtype.size() <= INLINE_BYTES;
        let hand = Hand::new(outline, data);
        let step = self.group.room(&self.header)?;
        let mut words = [0; 6];
        words[0] = self.factor().to_bits();
        let mut filled = 0;
        if is_inline {
            let target = bytemuck::cast_slice_mut::<u64, u8>(&mut words[1..]);
            hand.read(data, |slab, range| {
                let part = slab.bytes_of(&range);
                target[filled..filled + part.len()].copy_from_slice(part);
                filled += part.len();
                Ok(())
            })?;
        } else {
            let own = self.group.own().mapping();
            hand.read(data, |slab, range| {
                let part = slab.bytes_of(&range);
                own.post(step, filled, part);
                filled += part.len();
                Ok(())
            })?;
        }
        let print = self.group.come(&self.header, words);
        let rank = self.math.rank;
        if self.math.stamp.reduce == ReduceCode::None {
            // What this rank keeps need not wait for anybody.
            for work in posts.works.iter().filter(|work| work.sources.start == rank) {
                hand.keep(work, data).map_err(self.refused())?;
            }
        }
        self.group.wait(&self.header, print, posts.needs)?;
        self.learn_factors();
        if is_inline && !posts.works.is_empty() {
            self.inline.retype(Dtype::U8);
            let all = self.inline.as_bytes_mut().chunks_exact_mut(INLINE_BYTES);
            for (target, words) in all.zip(self.group.words()) {
                target.copy_from_slice(bytemuck::cast_slice(&words[1..]));
            }
            self.inline.retype(dtype);
        }
        for work in &posts.works {
            let is_own = work.sources.contains(&rank);
            let from_peers = work.sources.len() - usize::from(is_own);
            self.spent.bytes += (from_peers * work.elems * dtype.size()) as u64;
            self.spent.messages += u64::from(from_peers > 0);
            if from_peers > 0 || self.math.stamp.reduce != ReduceCode::None {
                self.work_out(work, is_inline, step, &hand, data)?;
            }
        }
        Ok(())
    }

    /// Elements of this rank's own output, from what everybody has posted.
    fn work_out(
        &self,
        work: &Work,
        is_inline: bool,
        step: u32,
        hand: &Hand,
        data: &mut Data,
    ) -> Result<()> {
        let dtype = self.math.stamp.dtype;
        let (group, inline) = (&*self.group, &*self.inline);
        let (finish, fold) = (
            self.math.finishing(work.sources.len()),
            self.math.reduce.fold(),
        );
        let factors = self.factors_for(&work.sources);
        hand.write(
            data,
            work.start..work.start + work.elems,
            |slab, part, before| {
                let (skip, elems) = (work.skip + before, part.len());
                let load = |source: usize| {
                    if is_inline {
                        let first = source * INLINE_BYTES / dtype.size() + skip;
                        return inline.part(first..first + elems);
                    }
                    let at = post(step) + (skip * dtype.size()) as u64;
                    group.memory(source).span(at, dtype, elems)
                };
                let target = slab.part_mut(part);
                let done = match (work.sources.len(), factors) {
                    (1, None) => kernels::cast(load(work.sources.start), target),
                    (2, _) => {
                        let pair = [load(0), load(1)]; // the commonest case, without a list
                        kernels::combine(fold, &pair, factors, finish, &mut [target], Store::Cached)
                    }
                    _ => {
                        let sources: SmallVec<[_; 16]> = work.sources.clone().map(load).collect();
                        kernels::combine(
                            fold,
                            &sources,
                            factors,
                            finish,
                            &mut [target],
                            Store::Cached,
                        )
                    }
                };
                done.map_err(self.refused())
            },
        )
    }

    /// All meet twice, and between load from inputs and store into outputs where they lie.
    fn load(&mut self, outline: &Outline, data: &mut Data) -> Result<()> {
        let (problem, dtype) = (&outline.problem, self.math.stamp.dtype);
        let own = Hand::new(outline, data).announce(self.group, data);
        let words = [self.factor().to_bits(), own.input, own.output, 0, 0, 0];
        self.meet(words)?;
        if outline.steps.len() == 1 {
            return Ok(()); // a barrier
        }
        self.learn_factors();
        self.places.clear();
        let words = self.group.words();
        if words
            .iter()
            .any(|words| words[1] == PRIVATE || words[2] == PRIVATE)
        {
            return self.windows(outline, data);
        }
        let places = words.iter().map(|words| Place {
            input: words[1],
            output: words[2],
        });
        self.places.extend(places);
        for (peer, place) in self.places.iter().enumerate() {
            let (input, output) = (problem.input(peer).len(), problem.output_elems(peer));
            self.group.admit(peer, place.input, dtype, input)?;
            self.group.admit(peer, place.output, dtype, output)?;
        }
        self.steps(outline, &outline.steps[1..]) // the first is the meeting behind us
    }

    pub(super) fn meet(&mut self, words: [u64; 6]) -> Result<()> {
        self.group.meet(&self.header, words)?;
        self.header.round = self.header.round.wrapping_add(1);
        Ok(())
    }

    pub(super) fn steps(&mut self, outline: &Outline, steps: &[Shared]) -> Result<()> {
        let bytes = outline.touched_elems * self.math.stamp.dtype.size();
        let store = if bytes > self.cache_bytes / 4 * 3 {
            Store::Streaming
        } else {
            Store::Cached
        };
        for step in steps {
            match step {
                Shared::Post => unreachable!("what is posted is not loaded where it lies"),
                Shared::Sync => self.meet([0; 6])?,
                Shared::LoadFoldStore { ranges, from, into } => {
                    let before = self.spent.bytes;
                    for range in ranges {
                        self.load_fold_store(&outline.problem, range, *from, *into, store)?;
                    }
                    self.spent.messages += u64::from(self.spent.bytes > before);
                }
            }
        }
        Ok(())
    }

    fn load_fold_store(
        &mut self,
        problem: &Problem,
        range: &Range<usize>,
        from: Ranks,
        into: Ranks,
        store: Store,
    ) -> Result<()> {
        let (rank, size, dtype) = (self.math.rank, self.math.size, self.math.stamp.dtype);
        let sources = members(problem, from);
        // Everybody begins with its own output, so that not all store to one rank at once.
        let targets = match into {
            Ranks::All => rank..rank + size,
            Ranks::One(target) => target..target + 1,
        };
        let targets = targets.map(|target| target % size);
        let group = &*self.group;
        let load = |source: usize| {
            let skip = (range.start - problem.input(source).start) * dtype.size();
            let at = self.places[source].input + skip as u64;
            group.memory(source).span(at, dtype, range.len())
        };
        let peers =
            |ranks: &mut dyn Iterator<Item = usize>| ranks.filter(|one| *one != rank).count();
        let moved = peers(&mut sources.clone()) + peers(&mut targets.clone());
        self.spent.bytes += (moved * range.len() * dtype.size()) as u64;
        let loads: SmallVec<[_; 16]> = sources.clone().map(load).collect();
        let (finish, fold) = (self.math.finishing(sources.len()), self.math.reduce.fold());
        let factors = self.factors_for(&sources);
        let in_place =
            |at: *const u8| loads.len() == 1 && factors.is_none() && loads[0].as_ptr() == at;
        let stores = targets.filter_map(|target| {
            let index = problem.output_index(target, range.start);
            let index = index.expect("the checker proves that outputs hold what is stored");
            let at = self.places[target].output + (index * dtype.size()) as u64;
            let span = group.memory(target).span_mut(at, dtype, range.len());
            (!in_place(span.as_ptr())).then_some(span) // or the elements are where they belong
        });
        let mut stores: SmallVec<[_; 16]> = stores.collect();
        kernels::combine(fold, &loads, factors, finish, &mut stores, store)
            .map_err(Error::kernel(rank, *self.math.stamp))
    }

    fn factor(&self) -> f64 {
        match self.math.reduce {
            ReduceOp::PreMulSum(factor) => factor,
            _ => 1.0,
        }
    }

    fn learn_factors(&mut self) {
        self.factors.clear();
        if matches!(self.math.reduce, ReduceOp::PreMulSum(_)) {
            let words = self.group.words().iter();
            self.factors
                .extend(words.map(|words| f64::from_bits(words[0])));
        }
    }

    fn factors_for(&self, sources: &Range<usize>) -> Option<&[f64]> {
        (!self.factors.is_empty()).then(|| &self.factors[sources.clone()])
    }

    pub(super) fn refused(&self) -> impl FnOnce(KernelError) -> Error + use<> {
        Error::kernel(self.math.rank, *self.math.stamp)
    }
}

/// Where this rank's input and output lie in the caller's slabs.
pub(super) struct Hand {
    pub(super) input: Range<usize>, // elements of the slab, or of the vector that several make up
    pub(super) output: Range<usize>,
    lengths: SmallVec<[usize; 2]>, // of several
}

impl Hand {
    pub(super) fn new(outline: &Outline, data: &Data) -> Self {
        let (input, output) = match data {
            Data::InPlace(_) => outline.starts,
            _ => (0, 0),
        };
        let lengths = match data {
            Data::Many(slabs) => slabs.iter().map(Slab::numel).collect(),
            _ => SmallVec::new(),
        };
        Self {
            input: input..input + outline.lengths.0,
            output: output..output + outline.lengths.1,
            lengths,
        }
    }

    /// Where peers find them.
    fn announce(&self, group: &Group, data: &Data) -> Place {
        let place = |slab: Option<&Slab>, range: &Range<usize>| {
            if range.is_empty() {
                return STAGE_IN; // no elements: any place will do
            }
            let Some(slab) = slab else { return PRIVATE };
            let size = slab.dtype().size();
            let (start, bytes) = (slab.address() + range.start * size, range.len() * size);
            group.own().place(start, bytes).unwrap_or(PRIVATE)
        };
        let (input, output) = match data {
            Data::None | Data::Many(_) => (None, None),
            Data::InPlace(slab) => (Some(slab), Some(slab)),
            Data::Out { from, into } => (Some(from), Some(into)),
        };
        Place {
            input: place(input, &self.input),
            output: place(output, &self.output),
        }
    }

    /// The output of a work whose only source is this rank's own input.
    fn keep(&self, work: &Work, data: &mut Data) -> Result<(), KernelError> {
        let (input, output) = (self.input.start + work.skip, self.output.start + work.start);
        match data {
            Data::Out { from, into } => kernels::cast(
                from.part(input..input + work.elems),
                into.part_mut(output..output + work.elems),
            ),
            _ => Ok(()), // in place, the elements are where they belong
        }
    }

    /// Go over this rank's whole input, in order: slabs, and elements of each.
    fn read(&self, data: &Data, each: impl FnMut(&Slab, Range<usize>) -> Result<()>) -> Result<()> {
        self.read_part(data, 0..self.input.len(), each)
    }

    /// Go over a part of this rank's input, in order.
    pub(super) fn read_part(
        &self,
        data: &Data,
        part: Range<usize>,
        mut each: impl FnMut(&Slab, Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let part = self.input.start + part.start..self.input.start + part.end;
        match data {
            _ if part.is_empty() => Ok(()),
            Data::None => Ok(()),
            Data::InPlace(slab) | Data::Out { from: slab, .. } => each(slab, part),
            Data::Many(slabs) => {
                cut(&self.lengths, part).try_for_each(|(slab, range)| each(&slabs[slab], range))
            }
        }
    }

    /// Go over a part of this rank's output, in order: slabs, elements of each, and how many came before.
    pub(super) fn write(
        &self,
        data: &mut Data,
        part: Range<usize>,
        mut each: impl FnMut(&mut Slab, Range<usize>, usize) -> Result<()>,
    ) -> Result<()> {
        let part = self.output.start + part.start..self.output.start + part.end;
        match data {
            _ if part.is_empty() => Ok(()),
            Data::None => Ok(()),
            Data::InPlace(slab) | Data::Out { into: slab, .. } => each(slab, part, 0),
            Data::Many(slabs) => {
                let mut done = 0;
                cut(&self.lengths, part).try_for_each(|(slab, range)| {
                    let before = done;
                    done += range.len();
                    each(&mut slabs[slab], range, before)
                })
            }
        }
    }
}
