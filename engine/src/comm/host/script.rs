//! A schedule made ready to be run: every place is a piece of a numbered slab, every copy and fold is cut to pieces that
//! lie in one run each. Made once for a kind of call, and run as often as it comes.

use std::ops::Range;

use crate::{
    buffer::Piece,
    comm::Data,
    schedule::{Form, Loc, Move, Problem, Region, Round, Schedule, Slot, price::Price},
    wire::{Parcel, Traffic},
};

/// How a call's own slabs lie, which are numbered before the scratch slabs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Hold {
    /// There are none.
    Nothing,
    /// One, at nccl-tests' positions.
    InPlace,
    /// Input, then output.
    Apart,
    /// So many that are one vector, in place.
    Many(usize),
}

impl Hold {
    pub(super) fn of(data: &Data) -> Self {
        match data {
            Data::None => Self::Nothing,
            Data::InPlace(_) => Self::InPlace,
            Data::Out { .. } => Self::Apart,
            Data::Many(slabs) => Self::Many(slabs.len()),
        }
    }

    /// How many slabs.
    pub(super) fn slabs(self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::InPlace => 1,
            Self::Apart => 2,
            Self::Many(slabs) => slabs,
        }
    }
}

/// What one rank does.
pub(super) struct Script {
    pub(super) scratch: Vec<Slot>,
    pub(super) acts: Vec<Act>,
    pub(super) price: Price,
}

/// One round.
pub(super) struct Act {
    pub(super) traffic: Traffic,
    pub(super) steps: Vec<Step>,
}

/// Arithmetic on one run of elements.
pub(super) struct Step {
    pub(super) verb: Verb,
    pub(super) source: Piece,
    pub(super) target: Piece,
}

/// What happens to the elements; how, the call's reduction says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Fold,
    Lift,
    Finish,
    Copy,
}

impl Script {
    /// `lengths`: of the slabs that are one vector, where there are several.
    pub(super) fn new(
        problem: &Problem,
        rank: usize,
        schedule: Schedule,
        hold: Hold,
        lengths: &[usize],
    ) -> Self {
        let places = Places {
            hold,
            lengths,
            starts: starts(problem, rank, hold == Hold::InPlace),
        };
        let acts = schedule.rounds.iter();
        Self {
            acts: acts.map(|round| places.act(round, &schedule)).collect(),
            price: Price::of(&schedule),
            scratch: schedule.scratch,
        }
    }
}

/// Where input and output start in the caller's slabs: nccl-tests' positions in place, where the root's slab is the full
/// vector, as everybody's is when there is no root.
pub(super) fn starts(problem: &Problem, rank: usize, in_place: bool) -> (usize, usize) {
    let whole = problem.kind.root().is_none_or(|root| root == rank);
    if !in_place || !whole {
        return (0, 0);
    }
    let output = problem.outputs(rank).next().map_or(0, |part| part.start);
    (problem.input(rank).start, output)
}

/// Where a schedule's regions lie.
struct Places<'a> {
    hold: Hold,
    lengths: &'a [usize],
    starts: (usize, usize), // of input and output, in their slabs
}

impl Places<'_> {
    fn act(&self, round: &Round, schedule: &Schedule) -> Act {
        let mut traffic = Traffic::default();
        for step in &round.wire {
            let parcel = |peer: &usize, loc: &Loc| Parcel {
                peer: *peer,
                pieces: self.pieces(loc).collect(),
            };
            match step {
                Move::Send { to, from } => traffic.sends.push(parcel(to, from)),
                Move::Recv { from, into } => traffic.recvs.push(parcel(from, into)),
                Move::Fold { .. } | Move::Copy { .. } => {
                    unreachable!("the checker keeps local moves off the wire")
                }
            }
        }
        let mut steps = Vec::new();
        for step in &round.local {
            let (target, source, verb) = match step {
                Move::Fold { into, with } => (into, with, Verb::Fold),
                Move::Copy { from, into } => {
                    let verb = match (schedule.form(from.region), schedule.form(into.region)) {
                        (Form::Payload, Form::Partial) => Verb::Lift,
                        (Form::Partial, Form::Payload) => Verb::Finish,
                        _ => Verb::Copy,
                    };
                    (into, from, verb)
                }
                Move::Send { .. } | Move::Recv { .. } => {
                    unreachable!("the checker keeps messages out of the local moves")
                }
            };
            let pairs = zip(self.pieces(target), self.pieces(source));
            // In place, an element is where it belongs.
            let moves = pairs.filter(|(target, source)| verb != Verb::Copy || target != source);
            steps.extend(moves.map(|(target, source)| Step {
                verb,
                source,
                target,
            }));
        }
        Act { traffic, steps }
    }

    fn pieces(&self, loc: &Loc) -> impl Iterator<Item = Piece> {
        let (slab, base) = match loc.region {
            Region::Input => (0, self.starts.0),
            Region::Output => (usize::from(self.hold == Hold::Apart), self.starts.1),
            Region::Scratch(slot) => (self.hold.slabs() + slot, 0),
        };
        let many = matches!(self.hold, Hold::Many(_)) && !matches!(loc.region, Region::Scratch(_));
        let lengths = if many { self.lengths } else { &[] };
        loc.ranges.iter().flat_map(move |range| {
            let one = Piece {
                slab,
                range: base + range.start..base + range.end,
            };
            let parts = cut(lengths, range.clone());
            let parts = parts.map(|(slab, range)| Piece { slab, range });
            Some(one).filter(|_| !many).into_iter().chain(parts)
        })
    }
}

/// Where a range of a vector lies in the slabs that make it up.
pub(super) fn cut(
    lengths: &[usize],
    range: Range<usize>,
) -> impl Iterator<Item = (usize, Range<usize>)> {
    let mut start = 0;
    lengths
        .iter()
        .enumerate()
        .filter_map(move |(slab, length)| {
            let own = start..start + length;
            start = own.end;
            let (from, to) = (range.start.max(own.start), range.end.min(own.end));
            (from < to).then(|| (slab, from - own.start..to - own.start))
        })
}

/// Pair two lists of pieces, of equal length in all, cut where either is cut.
fn zip(
    mut targets: impl Iterator<Item = Piece>,
    mut sources: impl Iterator<Item = Piece>,
) -> impl Iterator<Item = (Piece, Piece)> {
    let (mut target, mut source) = (targets.next(), sources.next());
    std::iter::from_fn(move || {
        loop {
            let (into, from) = (target.as_mut()?, source.as_mut()?);
            let elems = into.range.len().min(from.range.len());
            let pair = (take(into, elems), take(from, elems));
            if into.range.is_empty() {
                target = targets.next();
            }
            if from.range.is_empty() {
                source = sources.next();
            }
            if elems > 0 {
                return Some(pair);
            }
        }
    })
}

fn take(piece: &mut Piece, elems: usize) -> Piece {
    let start = piece.range.start;
    piece.range.start += elems;
    Piece {
        slab: piece.slab,
        range: start..start + elems,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_where_the_slabs_end() {
        let parts: Vec<_> = cut(&[3, 0, 2, 4], 2..6).collect();
        assert_eq!(parts, [(0, 2..3), (2, 0..2), (3, 0..1)]);
        assert_eq!(cut(&[3], 1..1).count(), 0);
    }

    #[test]
    fn pieces_are_paired_and_cut_where_either_is_cut() {
        let piece = |slab, range| Piece { slab, range };
        let targets = [piece(0, 0..3), piece(0, 5..5), piece(0, 7..9)];
        let sources = [piece(1, 10..11), piece(2, 0..4)];
        let pairs = zip(targets.into_iter(), sources.into_iter()).collect::<Vec<_>>();
        let expected = [
            (piece(0, 0..1), piece(1, 10..11)),
            (piece(0, 1..3), piece(2, 0..2)),
            (piece(0, 7..9), piece(2, 2..4)),
        ];
        assert_eq!(pairs, expected);
    }
}
