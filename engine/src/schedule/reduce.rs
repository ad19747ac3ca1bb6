//! The reduction that climbs the canonical tree level by level: one builder, three owner maps.
//!
//! Halving is Rabenseifner's (2004; Thakur, Rabenseifner and Gropp 2005): reduce-scatter by halving, all-gather
//! by doubling, 2(n-1)/n of the vector sent. Doubling sends the whole vector in each of log2 n rounds. Tree reduces to
//! rank 0 and broadcasts. All fold in the same order, since the level's blocks are the fold's blocks.

use std::collections::BTreeMap;
use std::ops::Range;

use super::owners::Owners;
use super::spread::Spread;
use super::tree::{Block, top};
use super::{Algorithm, Form, Kind, Loc, Problem, Rank, Region, Round, Schedule, Slot};

/// This rank's sums, and its lifted leaves.
const ACC: Region = Region::Scratch(0);

/// All-reduce, reduce-scatter, reduce.
pub(super) fn reduce(algorithm: Algorithm, problem: &Problem, rank: Rank) -> Schedule {
    let owners = Owners::of(algorithm);
    let whole = 0..problem.elems();
    let pieces = if owners == Owners::Strided {
        &problem.slices[..]
    } else {
        std::slice::from_ref(&whole)
    };
    let mut climb = Climb::new(owners, pieces, problem, rank);
    let mut rounds = climb.rounds();

    let world = Block {
        lo: 0,
        len: problem.world,
    };
    if let Kind::Reduce { root } = problem.kind {
        let mut last = Round::default();
        let slot = collect(&climb, world, root, &mut last);
        rounds.push(last);
        let mut scratch = climb.scratch();
        scratch.push(slot);
        return Schedule { scratch, rounds };
    }
    let held = (0..pieces.len()).filter(|&piece| owners.holds(world, piece, rank));
    let (sums, answers): (Vec<_>, Vec<_>) = held
        .map(|piece| (climb.home(piece), pieces[piece].clone()))
        .unzip();
    let start = if problem.kind == Kind::AllReduce {
        0
    } else {
        problem.slices[rank].start
    };
    let answers = answers
        .into_iter()
        .map(|range| range.start - start..range.end - start);
    if let Some(last) = rounds.last_mut() {
        last.copy(Loc::new(ACC, sums), Loc::new(Region::Output, answers));
    }

    if problem.kind == Kind::AllReduce && owners != Owners::Every {
        rounds.extend(
            Spread {
                owners,
                pieces,
                world: problem.world,
                root: 0,
            }
            .rounds(rank, None),
        );
    }
    Schedule {
        scratch: climb.scratch(),
        rounds,
    }
}

/// Reduce: the sums go from their owners to the root, still partial, since only an Output takes finished ones. The room
/// in which they arrive there.
fn collect(climb: &Climb<'_>, world: Block, root: Rank, round: &mut Round) -> Slot {
    let (owners, rank, elems) = (climb.owners, climb.rank, climb.problem.elems());
    let owned = |by: Rank| {
        (0..climb.pieces.len()).filter(move |&piece| match owners {
            Owners::Every => by == root,
            _ => owners.owner(world, piece) == by,
        })
    };
    if rank != root {
        let homes = owned(rank).map(|piece| climb.home(piece));
        round.send(root, Loc::new(ACC, homes));
        return Slot {
            form: Form::Partial,
            elems: 0,
        };
    }
    const ARRIVED: Region = Region::Scratch(3);
    for owner in 0..climb.problem.world {
        let parts = || owned(owner).map(|piece| climb.pieces[piece].clone());
        let output = Loc::new(Region::Output, parts());
        if owner == root {
            let homes = owned(owner).map(|piece| climb.home(piece));
            round.copy(Loc::new(ACC, homes), output);
        } else {
            round.recv(owner, Loc::new(ARRIVED, parts()));
            round.copy(Loc::new(ARRIVED, parts()), output);
        }
    }
    Slot {
        form: Form::Partial,
        elems,
    }
}

/// One rank's way up the tree.
struct Climb<'a> {
    owners: Owners,
    pieces: &'a [Range<usize>],
    problem: &'a Problem,
    rank: Rank,
    /// Where each piece stands in ACC, for the pieces this rank ever holds as a sum.
    homes: Vec<Option<usize>>,
    acc_elems: usize,
    /// The most that waits to be folded in one round, by form.
    stage_elems: [usize; 2],
}

impl<'a> Climb<'a> {
    fn new(
        owners: Owners,
        pieces: &'a [Range<usize>],
        problem: &'a Problem,
        rank: Rank,
    ) -> Climb<'a> {
        let mut acc_elems = 0;
        let mut homes = Vec::with_capacity(pieces.len());
        for (piece, range) in pieces.iter().enumerate() {
            let sums = |level| {
                let block = Block::at(problem.world, rank, level);
                block.len > 1 && owners.holds(block, piece, rank)
            };
            let needed = problem.lifted || (1..=top(problem.world)).any(sums);
            homes.push(needed.then_some(acc_elems));
            acc_elems += if needed { range.len() } else { 0 };
        }
        Climb {
            owners,
            pieces,
            problem,
            rank,
            homes,
            acc_elems,
            stage_elems: [0; 2],
        }
    }

    /// A round to lift where leaves are lifted, then one round a level.
    fn rounds(&mut self) -> Vec<Round> {
        let mut rounds = Vec::new();
        if self.problem.lifted {
            let mut lift = Round::default();
            let whole = 0..self.problem.elems();
            lift.copy(Loc::one(Region::Input, whole.clone()), Loc::one(ACC, whole));
            rounds.push(lift);
        }
        rounds.extend((1..=top(self.problem.world)).map(|level| self.round(level)));
        rounds
    }

    fn scratch(&self) -> Vec<Slot> {
        let stage = |form: Form| Slot {
            form,
            elems: self.stage_elems[form as usize],
        };
        vec![
            Slot {
                form: Form::Partial,
                elems: self.acc_elems,
            },
            stage(Form::Payload),
            stage(Form::Partial),
        ]
    }

    /// Folds this rank's block of 2^level ranks from its halves.
    fn round(&mut self, level: u32) -> Round {
        let block = Block::at(self.problem.world, self.rank, level);
        let Some((left, right)) = block.halves(level) else {
            return Round::default();
        };
        let (mine, other) = if left.ranks().contains(&self.rank) {
            (left, right)
        } else {
            (right, left)
        };
        let mut round = Round::default();

        let mut sent = BTreeMap::<Rank, Vec<usize>>::new();
        let mut taken = BTreeMap::<Rank, (Block, Vec<usize>)>::new();
        for piece in 0..self.pieces.len() {
            if self.holds(mine, piece) {
                for to in self.owners.targets(block, mine, other, piece, self.rank) {
                    sent.entry(to).or_default().push(piece);
                }
            }
            if self.owners.holds(block, piece, self.rank) {
                for (half, beside) in [(left, right), (right, left)] {
                    let from = self.owners.source(half, beside, piece, self.rank);
                    if from != self.rank {
                        taken
                            .entry(from)
                            .or_insert((half, Vec::new()))
                            .1
                            .push(piece);
                    }
                }
            }
        }
        for (to, pieces) in sent {
            round.send(to, self.value(mine, &pieces));
        }
        self.take(block, mine, taken, &mut round);
        round
    }

    /// Receives the messages in `taken` and folds them with what this rank has of `mine`. Ranks of the left half come
    /// first. A partial lands where it will be summed, if all of its message can; anything else waits in a stage.
    fn take(
        &mut self,
        block: Block,
        mine: Block,
        taken: BTreeMap<Rank, (Block, Vec<usize>)>,
        round: &mut Round,
    ) {
        let leaf = self.form(mine) == Form::Payload;
        let mut live: Vec<bool> = (0..self.pieces.len())
            .map(|piece| !leaf && self.holds(mine, piece))
            .collect();
        let mut owed: Vec<bool> = (0..self.pieces.len())
            .map(|piece| leaf && self.owners.holds(block, piece, self.rank))
            .collect();
        let mut staged = [0; 2];
        let (mut copies, mut folds) = (Pairs::default(), Pairs::default());
        for (from, (half, pieces)) in taken {
            let form = self.form(half);
            if form == Form::Partial && pieces.iter().all(|&piece| !live[piece]) {
                round.recv(from, self.acc(&pieces));
                pieces.iter().for_each(|&piece| live[piece] = true);
                continue;
            }
            let stage = Region::Scratch(1 + form as usize);
            let start = staged[form as usize];
            for &piece in &pieces {
                let (home, arrival) = (
                    self.home(piece),
                    claim(&mut staged[form as usize], self.pieces[piece].len()),
                );
                if !live[piece] && owed[piece] {
                    copies.push(Region::Input, home.clone(), self.pieces[piece].clone());
                    owed[piece] = false;
                    live[piece] = true;
                }
                if live[piece] {
                    folds.push(stage, home, arrival);
                } else {
                    copies.push(stage, home, arrival);
                    live[piece] = true;
                }
            }
            round.recv(from, Loc::one(stage, start..staged[form as usize]));
        }
        for piece in (0..self.pieces.len()).filter(|&piece| owed[piece]) {
            folds.push(Region::Input, self.home(piece), self.pieces[piece].clone());
        }
        for (from, into) in copies.locs() {
            round.copy(from, into);
        }
        for (with, into) in folds.locs() {
            round.fold(into, with);
        }
        for (most, now) in self.stage_elems.iter_mut().zip(staged) {
            *most = now.max(*most);
        }
    }

    /// Whether this rank has `half`'s value of a piece.
    fn holds(&self, half: Block, piece: usize) -> bool {
        self.owners.holds(half, piece, self.rank)
    }

    /// A leaf that is not lifted travels as it came.
    fn form(&self, half: Block) -> Form {
        if half.len == 1 && !self.problem.lifted {
            Form::Payload
        } else {
            Form::Partial
        }
    }

    /// Where this rank has `mine`'s value of these pieces.
    fn value(&self, mine: Block, pieces: &[usize]) -> Loc {
        match self.form(mine) {
            Form::Payload => Loc::new(
                Region::Input,
                pieces.iter().map(|&piece| self.pieces[piece].clone()),
            ),
            Form::Partial => self.acc(pieces),
        }
    }

    /// These pieces' sums.
    fn acc(&self, pieces: &[usize]) -> Loc {
        Loc::new(ACC, pieces.iter().map(|&piece| self.home(piece)))
    }

    /// Where a piece's sum stands in ACC.
    fn home(&self, piece: usize) -> Range<usize> {
        let start = self.homes[piece].expect("a home was kept for each piece this rank sums");
        start..start + self.pieces[piece].len()
    }
}

/// The next `elems` elements of a stage.
fn claim(used: &mut usize, elems: usize) -> Range<usize> {
    let range = *used..*used + elems;
    *used = range.end;
    range
}

/// Operands that go to sums, one row for each region they come from.
#[derive(Default)]
struct Pairs {
    rows: Vec<Row>,
}

struct Row {
    region: Region,
    operands: Vec<Range<usize>>,
    homes: Vec<Range<usize>>,
}

impl Pairs {
    fn push(&mut self, region: Region, home: Range<usize>, operand: Range<usize>) {
        match self.rows.iter_mut().find(|row| row.region == region) {
            Some(row) => {
                row.operands.push(operand);
                row.homes.push(home);
            }
            None => self.rows.push(Row {
                region,
                operands: vec![operand],
                homes: vec![home],
            }),
        }
    }

    /// (operand, sum), one for each region.
    fn locs(self) -> impl Iterator<Item = (Loc, Loc)> {
        self.rows
            .into_iter()
            .map(|row| (Loc::new(row.region, row.operands), Loc::new(ACC, row.homes)))
    }
}
