//! Long reductions, window by window: the schedule of a short vector, again and again along the long one. What a window
//! receives is folded while it is in the cache, and scratch memory is that of one window. Elements are folded alone, so the
//! tree of [Note: fold order] is the same.
//!
//! ```text
//! all-reduce, reduce:   | window 0 | window 1 | ...            one range of the vector
//! reduce-scatter:       | 0 | 1 | .. | 0 | 1 | .. | 0 | 1 |    the same part of every rank's slice
//! ```

use std::ops::Range;

use super::{Algorithm, Kind, Loc, Move, Problem, Rank, Region, Round, Schedule, Slot, messages};

/// What `rank` does to solve `problem` in windows of at most `width` elements, or `None` where the algorithm does not do
/// this kind. Kinds that do not fold have one window.
pub fn windows(
    algorithm: Algorithm,
    problem: &Problem,
    rank: Rank,
    width: usize,
) -> Option<Schedule> {
    let whole = problem.elems();
    if !problem.kind.folds() || problem.world == 1 || whole <= width {
        return messages(algorithm, problem, rank);
    }
    let (length, step) = match problem.kind {
        Kind::ReduceScatter => {
            let longest = problem.slices.iter().map(ExactSizeIterator::len).max();
            (longest.unwrap_or(0), width / problem.world)
        }
        _ => (whole, width),
    };
    let mut schedule = Schedule::default();
    for start in (0..length).step_by(step.max(1)) {
        let window = Window::new(problem, start..start + step.max(1));
        let small = messages(algorithm, &window.problem, rank)?;
        let slots = share(&mut schedule.scratch, &small.scratch);
        let rounds = small.rounds.into_iter();
        let rounds = rounds.map(|round| window.round(round, &slots));
        schedule.rounds.extend(rounds);
    }
    Some(schedule)
}

/// Find a place for each of a window's slots in those that all windows share.
fn share(shared: &mut Vec<Slot>, slots: &[Slot]) -> Vec<usize> {
    let mut taken = vec![false; shared.len()];
    let mut place = |slot: &Slot| {
        let free = (0..shared.len()).find(|&at| !taken[at] && shared[at].form == slot.form);
        let at = free.unwrap_or_else(|| {
            shared.push(*slot);
            taken.push(false);
            shared.len() - 1
        });
        taken[at] = true;
        shared[at].elems = shared[at].elems.max(slot.elems);
        at
    };
    slots.iter().map(&mut place).collect()
}

/// A part of a problem, and where its elements are in the whole.
struct Window<'a> {
    whole: &'a Problem,
    problem: Problem,
    start: usize, // in the vector, or in every slice
}

impl<'a> Window<'a> {
    fn new(whole: &'a Problem, part: Range<usize>) -> Self {
        let cut = |length: usize| part.end.min(length) - part.start.min(length);
        let problem = match whole.kind {
            Kind::ReduceScatter => {
                let counts = whole.slices.iter().map(|slice| cut(slice.len()));
                Problem::with_counts(whole.kind, whole.world, &counts.collect::<Vec<_>>())
            }
            kind => Problem::even(kind, whole.world, cut(whole.elems())),
        };
        Self {
            problem: problem.with_lifted(whole.lifted),
            whole,
            start: part.start,
        }
    }

    fn round(&self, round: Round, slots: &[usize]) -> Round {
        let place = |loc| self.place(loc, slots);
        let moved = |step| match step {
            Move::Send { to, from } => Move::Send {
                to,
                from: place(from),
            },
            Move::Recv { from, into } => Move::Recv {
                from,
                into: place(into),
            },
            Move::Fold { into, with } => Move::Fold {
                into: place(into),
                with: place(with),
            },
            Move::Copy { from, into } => Move::Copy {
                from: place(from),
                into: place(into),
            },
        };
        Round {
            wire: round.wire.into_iter().map(moved).collect(),
            local: round.local.into_iter().map(moved).collect(),
        }
    }

    /// Where the window's `loc` is in the whole.
    fn place(&self, loc: Loc, slots: &[usize]) -> Loc {
        let shifted = |range: Range<usize>| range.start + self.start..range.end + self.start;
        match (loc.region, self.whole.kind) {
            (Region::Scratch(slot), _) => Loc {
                region: Region::Scratch(slots[slot]),
                ..loc
            },
            (Region::Input, Kind::ReduceScatter) => {
                let ranges = loc.ranges.iter().flat_map(|range| self.in_slices(range));
                Loc::new(loc.region, ranges)
            }
            (region, _) => Loc::new(region, loc.ranges.into_iter().map(shifted)),
        }
    }

    /// A range of the window's vector, as ranges of the whole one: one for each slice that it touches.
    fn in_slices(&self, range: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let slices = self.problem.slices.iter().zip(&self.whole.slices);
        slices.filter_map(move |(small, whole)| {
            let (from, to) = (range.start.max(small.start), range.end.min(small.end));
            let base = whole.start + self.start;
            (from < to).then(|| base + from - small.start..base + to - small.start)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{check::prove, price::Price};

    /// Goal: windows change neither what is computed nor how much is sent. Method: the checker, over worlds, lengths, widths,
    /// even and uneven slices, in place and not, lifted and not.
    #[test]
    fn every_window_of_every_reduction_is_right() {
        for world in 2..=9 {
            let root = world / 2;
            for kind in [Kind::AllReduce, Kind::ReduceScatter, Kind::Reduce { root }] {
                let even = [1, 7, 40, 65].map(|elems| Problem::even(kind, world, elems));
                let counts = (0..world).map(|rank| rank * 5 % 7).collect::<Vec<_>>();
                let uneven = Problem::with_counts(kind, world, &counts);
                let uneven = (kind == Kind::ReduceScatter).then_some(uneven);
                for problem in even.into_iter().chain(uneven) {
                    for width in [1, 3, 16, 64] {
                        right(&problem, width);
                        right(&problem.clone().with_lifted(true), width);
                    }
                }
            }
        }
    }

    fn right(problem: &Problem, width: usize) {
        for algorithm in [Algorithm::Direct, Algorithm::Halving, Algorithm::Doubling] {
            let schedules = (0..problem.world)
                .map(|rank| windows(algorithm, problem, rank, width))
                .collect::<Option<Vec<_>>>();
            let Some(schedules) = schedules else {
                continue;
            };
            for in_place in [false, true] {
                let proof = prove(problem, &schedules, in_place);
                proof.unwrap_or_else(|flaw| {
                    panic!("{algorithm}, width {width}: {flaw}\n{problem:?}")
                });
            }
        }
    }

    #[test]
    fn a_window_is_all_the_scratch_that_is_needed_and_no_more_is_sent() {
        let problem = Problem::even(Kind::AllReduce, 4, 4096);
        let cut = windows(Algorithm::Halving, &problem, 1, 256).unwrap();
        let whole = messages(Algorithm::Halving, &problem, 1).unwrap();
        let scratch = |schedule: &Schedule| {
            schedule
                .scratch
                .iter()
                .map(|slot| slot.elems)
                .sum::<usize>()
        };
        assert_eq!(16 * scratch(&cut), scratch(&whole));
        let (cut, whole) = (Price::of(&cut), Price::of(&whole));
        assert_eq!(cut.elems(), whole.elems());
        assert_eq!(cut.messages, 16 * whole.messages);
    }
}
