//! One call on its way through shared memory: inputs are loaded where they lie and results stored into all outputs, between
//! two meetings. (Small ones are posted: `post`.)

use std::ops::Range;

use fabric_kernels::{self as kernels, KernelError, Store};
use smallvec::SmallVec;

use super::{
    super::{
        super::{Data, ReduceOp, Spent},
        math::Math,
    },
    Place,
    hand::Hand,
    outline::{Outline, members},
};
use crate::{
    error::{Error, Result},
    schedule::{Problem, Ranks, Shared},
    wire::{frame::Header, shm::Group},
};

/// One call on its way.
pub(super) struct Pass<'a> {
    pub(super) group: &'a mut Group,
    pub(super) factors: &'a mut Vec<f64>,  // by rank
    pub(super) places: &'a mut Vec<Place>, // by rank
    pub(super) math: Math<'a>,
    pub(super) header: Header,
    pub(super) turn: &'a mut u32, // of the stages
    pub(super) cache_bytes: usize,
    pub(super) spent: Spent,
}

impl Pass<'_> {
    /// All meet twice, and between load from inputs and store into outputs where they lie.
    pub(super) fn go(&mut self, outline: &Outline, data: &mut Data) -> Result<()> {
        let (problem, dtype) = (&outline.problem, self.math.stamp.dtype);
        let own = Hand::new(outline, data).announce(self.group, data);
        let is_private = own.is_private();
        if is_private {
            self.fill(&self.way(outline, data), 0, data)?;
        }
        let words = [self.factor().to_bits(), own.input, own.output, 0, 0, 0];
        self.meet(words)?;
        self.learn_factors();
        let words = self.group.words();
        self.places.clear();
        self.places.extend(words.iter().map(|words| Place {
            input: words[1],
            output: words[2],
        }));
        if self.places.iter().any(Place::is_private) {
            let have_all = self.places.iter().all(Place::is_private);
            return self.windows(&self.way(outline, data), data, is_private, have_all);
        }
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
        let store = self.store(outline);
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

    /// How results are stored, so that those that will be wanted soon stay near.
    pub(super) fn store(&self, outline: &Outline) -> Store {
        let bytes = outline.touched_elems * self.math.stamp.dtype.size();
        match bytes > self.cache_bytes / 4 * 3 {
            true => Store::Streaming,
            false => Store::Cached,
        }
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

    pub(super) fn factors_for(&self, sources: &Range<usize>) -> Option<&[f64]> {
        (!self.factors.is_empty()).then(|| &self.factors[sources.clone()])
    }

    pub(super) fn refused(&self) -> impl FnOnce(KernelError) -> Error + use<> {
        Error::kernel(self.math.rank, *self.math.stamp)
    }
}
