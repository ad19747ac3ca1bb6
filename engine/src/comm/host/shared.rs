//! The executor that runs schedules in shared memory: ranks meet, load their peers' elements where they lie, fold them
//! in scratch memory of their own a chunk at a time, and store the result into everybody's output.
//!
//! [Note: private buffers] Peers reach only slabs of a rank's arena. With the first sync every rank announces where its
//! buffers lie, or that they are private; when any rank's are, all ranks run the same schedule window by window on
//! stages in the arenas instead, and copy in before and out after. Elements are folded alone, so the bits are the same.
//! A window ends with the schedule's last sync: nobody then still loads from a stage, and what peers have stored in ours
//! stays until they store the next window, which is after the sync to which we come only once we have copied out.

use std::{ops::Range, time::Duration};

use fabric_kernels::{self as kernels, Dtype, KernelError, Span};

use super::{
    super::{Call, Data, Op, ReduceOp, Spent},
    math::{Action, Math},
    recent::Recent,
};
use crate::{
    buffer::Slab,
    error::{Error, Result},
    schedule::{self, Kind, Problem, Ranks, Shared, price::SharedPrice},
    wire::{
        frame::{Header, Stamp},
        shm::{Group, Note, PRIVATE, STAGE_BYTES, STAGE_IN, STAGE_OUT},
    },
};

const CHUNK_BYTES: usize = 16 << 10; // of one operand: a few of them stay in the nearest cache

/// A group that shares memory, and what is kept between calls.
pub(super) struct SharedMemory {
    group: Group,
    scratch: Vec<Slab>, // CHUNK_BYTES each: what the tree needs at once, and one more
    outlines: Recent<Key, Outline>,
    lifts: Vec<Action>, // by rank, of the call that runs
    places: Vec<Place>, // by rank, of the call that runs
    flying: Vec<Data>, // the memory of the call that runs; of a failed one, too, because peers may still store there
}

impl SharedMemory {
    pub(super) fn new(group: Group) -> Self {
        // Blocks of 1, 2, 4, ... ranks may all wait for their right side at once, with the next leaf on top.
        let depth = (usize::BITS - (group.size() - 1).leading_zeros()) as usize + 1;
        let scratch = (0..depth + 1).map(|_| Slab::zeroed(Dtype::U8, CHUNK_BYTES));
        Self {
            scratch: scratch.collect(),
            group,
            outlines: Recent::new(),
            lifts: Vec::new(),
            places: Vec::new(),
            flying: Vec::with_capacity(1),
        }
    }

    pub(super) fn rank(&self) -> usize {
        self.group.rank()
    }

    pub(super) fn size(&self) -> usize {
        self.group.size()
    }

    /// Do `call`; also says what it cost, as it was counted on the way.
    pub(super) fn run(
        &mut self,
        stamp: &Stamp,
        call: &Call,
        data: Data,
        deadline: Duration,
    ) -> Result<(Data, Spent)> {
        self.flying.push(data);
        match self.attempt(stamp, call, deadline) {
            Ok(spent) => {
                let data = self.flying.pop().expect("pushed above");
                Ok((data, spent))
            }
            Err(error) => {
                self.group.fail();
                Err(error)
            }
        }
    }

    /// What `run` costs when all buffers are in arenas, from the schedule alone. Through the stages the same elements
    /// cross, but slices are cut in every window, which can shift a few elements from rank to rank, and every window
    /// counts as a message.
    pub(super) fn price(&self, op: Op, dtype: Dtype, numel: usize) -> Spent {
        let (rank, size) = (self.rank(), self.size());
        let mut spent = Spent {
            collectives: 1,
            ..Spent::default()
        };
        for step in &Outline::new(&Key::new(op, numel), size, rank).steps {
            let price = SharedPrice::of(std::slice::from_ref(step), size, rank);
            let elems = price.loaded_elems + price.stored_elems;
            spent.messages += u64::from(elems > 0);
            spent.bytes += (elems * dtype.size()) as u64;
        }
        spent
    }

    fn attempt(&mut self, stamp: &Stamp, call: &Call, deadline: Duration) -> Result<Spent> {
        let (rank, size) = (self.rank(), self.size());
        let key = Key::new(call.op, stamp.numel as usize);
        let outline = self.outlines.get(key, || Outline::new(&key, size, rank));
        let data = self.flying.last_mut().expect("pushed by run");
        let reduce = call.op.reduce().unwrap_or(ReduceOp::Sum);
        let own = Hand::new(&outline.problem, rank, data).announce(&self.group, data);
        let partial = reduce.partial(stamp.dtype);
        self.scratch
            .iter_mut()
            .for_each(|slab| slab.retype(partial));
        let mut pass = Pass {
            note: Note {
                header: Header {
                    stamp: *stamp,
                    round: 0,
                    bytes: 0,
                },
                input: own.input,
                output: own.output,
                factor: match reduce {
                    ReduceOp::PreMulSum(factor) => factor,
                    _ => 1.0,
                },
            },
            group: &mut self.group,
            outlines: &mut self.outlines,
            stack: &mut self.scratch,
            lifts: &mut self.lifts,
            places: &mut self.places,
            math: Math {
                rank,
                size,
                reduce,
                stamp,
            },
            deadline,
            spent: Spent {
                collectives: 1,
                ..Spent::default()
            },
        };
        pass.go(&outline, data)?;
        Ok(pass.spent)
    }
}

/// What decides an outline.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    kind: Kind,
    lifted: bool,
    numel: usize,
}

impl Key {
    fn new(op: Op, numel: usize) -> Self {
        Self {
            kind: op.kind(),
            lifted: op.is_lifted(),
            numel,
        }
    }
}

/// A problem, and what this rank does to solve it.
struct Outline {
    problem: Problem,
    steps: Vec<Shared>,
}

impl Outline {
    /// Even slices, as the message executor cuts them.
    fn new(key: &Key, size: usize, rank: usize) -> Self {
        let problem = Problem::even(key.kind, size, key.numel).with_lifted(key.lifted);
        Self {
            steps: schedule::shared(&problem, rank),
            problem,
        }
    }
}

/// Where a rank's input and output start in its arena, in bytes.
#[derive(Clone, Copy)]
struct Place {
    input: u64,
    output: u64,
}

/// Where this rank's input and output start in the caller's slabs, in elements; nccl-tests' positions in place.
struct Hand {
    input: Range<usize>,
    output: Range<usize>,
}

impl Hand {
    fn new(problem: &Problem, rank: usize, data: &Data) -> Self {
        let (input, output) = (problem.input(rank), problem.output(rank));
        if matches!(data, Data::InPlace(_)) {
            return Self { input, output };
        }
        Self {
            input: 0..input.len(),
            output: 0..output.len(),
        }
    }

    fn announce(&self, group: &Group, data: &Data) -> Place {
        let place = |slab: Option<&Slab>, range: &Range<usize>| {
            let Some(slab) = slab.filter(|_| !range.is_empty()) else {
                return STAGE_IN; // no elements: any place will do
            };
            let size = slab.dtype().size();
            let (start, bytes) = (slab.address() + range.start * size, range.len() * size);
            group.own().place(start, bytes).unwrap_or(PRIVATE)
        };
        Place {
            input: place(source(data), &self.input),
            output: place(target(data), &self.output),
        }
    }
}

fn source(data: &Data) -> Option<&Slab> {
    match data {
        Data::None => None,
        Data::InPlace(slab) | Data::Out { from: slab, .. } => Some(slab),
    }
}

fn target(data: &Data) -> Option<&Slab> {
    match data {
        Data::None => None,
        Data::InPlace(slab) | Data::Out { into: slab, .. } => Some(slab),
    }
}

fn target_mut(data: &mut Data) -> Option<&mut Slab> {
    match data {
        Data::None => None,
        Data::InPlace(slab) | Data::Out { into: slab, .. } => Some(slab),
    }
}

/// One call on its way.
struct Pass<'a> {
    group: &'a mut Group,
    outlines: &'a mut Recent<Key, Outline>,
    stack: &'a mut Vec<Slab>,   // scratch in the accumulator's type
    lifts: &'a mut Vec<Action>, // by rank
    places: &'a mut Vec<Place>, // by rank
    math: Math<'a>,
    note: Note,
    deadline: Duration,
    spent: Spent,
}

impl Pass<'_> {
    fn go(&mut self, outline: &Outline, data: &mut Data) -> Result<()> {
        let problem = &outline.problem;
        self.sync()?;
        if problem.kind == Kind::Barrier {
            return Ok(());
        }
        let dtype = self.math.stamp.dtype;
        let notes = self.group.notes();
        let lift = |note: &Note| match self.math.reduce {
            ReduceOp::PreMulSum(_) => Action::lift(ReduceOp::PreMulSum(note.factor)),
            reduce => Action::lift(reduce),
        };
        self.lifts.clear();
        self.lifts.extend(notes.iter().map(lift));
        self.places.clear();
        if notes
            .iter()
            .any(|note| note.input == PRIVATE || note.output == PRIVATE)
        {
            return self.windows(problem, data);
        }
        let place = |note: &Note| Place {
            input: note.input,
            output: note.output,
        };
        self.places.extend(notes.iter().map(place));
        for (peer, place) in self.places.iter().enumerate() {
            self.group
                .admit(peer, place.input, dtype, problem.input(peer).len())?;
            self.group
                .admit(peer, place.output, dtype, problem.output(peer).len())?;
        }
        self.steps(problem, &outline.steps[1..]) // the first is the sync behind us
    }

    /// [Note: private buffers]
    fn windows(&mut self, problem: &Problem, data: &mut Data) -> Result<()> {
        let (rank, size, dtype) = (self.math.rank, self.math.size, self.math.stamp.dtype);
        let hand = Hand::new(problem, rank, data);
        // Where every rank has its own slice, a window is cut out of each slice.
        let sliced = matches!(problem.kind, Kind::ReduceScatter | Kind::AllGather);
        let (parts, whole) = if sliced {
            (size, problem.elems() / size)
        } else {
            (1, problem.elems())
        };
        let width = STAGE_BYTES / dtype.size() / parts;
        let stages = Place {
            input: STAGE_IN,
            output: STAGE_OUT,
        };
        self.places.resize(size, stages);
        // Where the parts of a window lie in the hand that holds all slices, if it does, and on the stage.
        let cut = |kind, window: &Range<usize>| {
            let parts = if problem.kind == kind { parts } else { 1 };
            let (start, len) = (window.start, window.len());
            (0..parts).map(move |part| {
                let at = part * whole + start;
                (at..at + len, (part * len * dtype.size()) as u64)
            })
        };
        for start in (0..whole).step_by(width) {
            let window = start..whole.min(start + width);
            if let Some(slab) = source(data).filter(|_| !hand.input.is_empty()) {
                for (range, stage) in cut(Kind::ReduceScatter, &window) {
                    let own = self.group.own().mapping();
                    let stage = own.span_mut(STAGE_IN + stage, dtype, range.len());
                    let range = hand.input.start + range.start..hand.input.start + range.end;
                    kernels::cast(slab.part(range), stage).map_err(self.refused())?;
                }
            }
            let key = Key {
                kind: problem.kind,
                lifted: problem.lifted,
                numel: window.len() * parts,
            };
            let part = self.outlines.get(key, || Outline::new(&key, size, rank));
            self.steps(&part.problem, &part.steps)?;
            if let Some(slab) = target_mut(data).filter(|_| !hand.output.is_empty()) {
                for (range, stage) in cut(Kind::AllGather, &window) {
                    let own = self.group.own().mapping();
                    let stage = own.span(STAGE_OUT + stage, dtype, range.len());
                    let range = hand.output.start + range.start..hand.output.start + range.end;
                    kernels::cast(stage, slab.part_mut(range)).map_err(self.refused())?;
                }
            }
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        self.group.sync(&self.note, self.deadline)?;
        self.note.header.round = self.note.header.round.wrapping_add(1);
        Ok(())
    }

    fn steps(&mut self, problem: &Problem, steps: &[Shared]) -> Result<()> {
        for step in steps {
            match step {
                Shared::Sync => self.sync()?,
                Shared::LoadFoldStore { ranges, from, into } => {
                    let before = self.spent.bytes;
                    for range in ranges {
                        self.load_fold_store(problem, range, *from, *into)?;
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
    ) -> Result<()> {
        let (dtype, partial) = (self.math.stamp.dtype, self.stack[0].dtype());
        // In a world of one the input is the answer, unless it is lifted.
        let from = match from {
            Ranks::All if self.math.size == 1 && !problem.lifted => Ranks::One(0),
            from => from,
        };
        let group = &*self.group;
        let load = |rank: usize, elems: &Range<usize>| {
            let skip = (elems.start - problem.input(rank).start) * dtype.size();
            group
                .memory(rank)
                .span(self.places[rank].input + skip as u64, dtype, elems.len())
        };
        let mut sum = Tree {
            stack: self.stack,
            fold: Action::Fold(self.math.reduce.fold()),
            lifts: self.lifts,
            lifted: problem.lifted,
        };
        let refused = || Error::kernel(self.math.rank, *self.math.stamp);
        let mut moved = 0; // elements from and to peers
        let width = CHUNK_BYTES / dtype.size().max(partial.size());
        for start in range.clone().step_by(width) {
            let elems = start..range.end.min(start + width);
            let (value, action) = match from {
                Ranks::One(source) => {
                    moved += elems.len() * usize::from(source != self.math.rank);
                    (load(source, &elems), Action::Cast)
                }
                Ranks::All => {
                    let leaf = |rank| {
                        moved += elems.len() * usize::from(rank != self.math.rank);
                        load(rank, &elems)
                    };
                    sum.fold(elems.len(), leaf).map_err(refused())?;
                    let finish = self.math.finish();
                    if into == Ranks::All && (finish != Action::Cast || partial != dtype) {
                        let value = sum.finish(elems.len(), finish, dtype);
                        (value.map_err(refused())?, Action::Cast)
                    } else {
                        (sum.value(elems.len()), finish)
                    }
                }
            };
            // Everybody begins with its own output, so that not all store to one rank at once.
            let targets = match into {
                Ranks::All => self.math.rank..self.math.rank + self.math.size,
                Ranks::One(target) => target..target + 1,
            };
            for target in targets.map(|target| target % self.math.size) {
                let skip = (elems.start - problem.output(target).start) * dtype.size();
                let at = self.places[target].output + skip as u64;
                let output = group.memory(target).span_mut(at, dtype, elems.len());
                moved += elems.len() * usize::from(target != self.math.rank);
                if output.as_ptr() == value.as_ptr() {
                    continue; // in place: the elements are where they belong
                }
                action.apply(output, value).map_err(refused())?;
            }
        }
        self.spent.bytes += (moved * dtype.size()) as u64;
        Ok(())
    }

    fn refused(&self) -> impl FnOnce(KernelError) -> Error + use<> {
        Error::kernel(self.math.rank, *self.math.stamp)
    }
}

/// The canonical tree ([Note: fold order] in `schedule`) over one chunk: a stack of blocks that wait for their right
/// side, each twice as large as the next.
struct Tree<'a> {
    stack: &'a mut Vec<Slab>,
    fold: Action,
    lifts: &'a [Action],
    lifted: bool,
}

impl Tree<'_> {
    /// Leaves the value in the first slab.
    fn fold<'s>(
        &mut self,
        numel: usize,
        mut leaf: impl FnMut(usize) -> Span<'s>,
    ) -> Result<(), KernelError> {
        let mut depth = 0;
        for (rank, lift) in self.lifts.iter().enumerate() {
            let mut complete = rank.trailing_ones(); // how many blocks end with this rank
            if complete > 0 && !self.lifted {
                // A leaf as it is folds into the block before it without a copy.
                let block = self.stack[depth - 1].part_mut(0..numel);
                self.fold.apply(block, leaf(rank))?;
                complete -= 1;
            } else {
                lift.apply(self.stack[depth].part_mut(0..numel), leaf(rank))?;
                depth += 1;
            }
            for _ in 0..complete {
                depth = self.pair(depth, numel)?;
            }
        }
        while depth > 1 {
            depth = self.pair(depth, numel)?;
        }
        Ok(())
    }

    /// The two blocks on top become one.
    fn pair(&mut self, depth: usize, numel: usize) -> Result<usize, KernelError> {
        let (left, right) = self.stack.split_at_mut(depth - 1);
        let into = left[depth - 2].part_mut(0..numel);
        self.fold.apply(into, right[0].part(0..numel))?;
        Ok(depth - 1)
    }

    fn value(&self, numel: usize) -> Span<'_> {
        self.stack[0].part(0..numel)
    }

    /// The value in the buffer's type, in the last slab.
    fn finish(
        &mut self,
        numel: usize,
        finish: Action,
        dtype: Dtype,
    ) -> Result<Span<'_>, KernelError> {
        let last = self.stack.pop().expect("scratch has a slab to spare");
        let spare = self.stack.len();
        self.stack.push(last.recast(dtype));
        let (stack, last) = self.stack.split_at_mut(spare);
        finish.apply(last[0].part_mut(0..numel), stack[0].part(0..numel))?;
        Ok(last[0].part(0..numel))
    }
}
