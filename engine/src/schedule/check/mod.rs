//! The proof that schedules are right: all ranks are executed together on symbols instead of numbers.
//!
//! A symbol is a leaf, the value of a block of ranks, or a finished sum, each with its element. No expressions are
//! kept: a sum has the canonical tree only if both operands have, so a fold of anything but the two halves of a block
//! is wrong at once and for ever, and is named where it happens (see [Note: fold order]).
//!
//! Proved of messages: sends and receives match in round, order, form and length; nothing undefined is read; no receive
//! lands on what is sent or received at the same time; Input is not written, nor read late ([Note: in place]); slots
//! keep their size and form; each rank ends with the required value, finished once. Of a barrier: every exit knows of
//! every entry. Of shared memory: no element is written in a phase in which another rank touches it, and
//! peers' memory is touched only between two syncs; what they have posted, after the first (that it stays until all have read
//! it, the flags see to: `wire/shm/flags.rs`).
mod bench;
mod flaw;
mod machine;
mod memory;

use self::machine::Machine;
use super::price::Price;
use super::{Algorithm, Kind, Problem, Schedule, Shared, messages, posted, shared};

pub use self::flaw::{Cell, Flaw, Value};

/// What was proved right, with its price.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// Rounds, the same on all ranks.
    pub rounds: usize,
    /// What each rank sends.
    pub prices: Vec<Price>,
}

/// Proves the schedules of all ranks; `None` where the algorithm does not do this kind. `in_place`: Input and Output
/// share memory.
pub fn check(
    algorithm: Algorithm,
    problem: &Problem,
    in_place: bool,
) -> Result<Option<Proof>, Flaw> {
    let schedules: Option<Vec<_>> = (0..problem.world)
        .map(|rank| messages(algorithm, problem, rank))
        .collect();
    schedules
        .map(|schedules| prove(problem, &schedules, in_place))
        .transpose()
}

/// Proves these schedules, one for each rank.
pub fn prove(problem: &Problem, schedules: &[Schedule], in_place: bool) -> Result<Proof, Flaw> {
    assert_eq!(schedules.len(), problem.world, "one schedule for each rank");
    let rounds = schedules[0].rounds.len();
    for (rank, schedule) in schedules.iter().enumerate() {
        if schedule.rounds.len() != rounds {
            return Err(Flaw::Rounds {
                rank,
                found: schedule.rounds.len(),
                expected: rounds,
            });
        }
    }
    let mut machine = Machine::new(problem, schedules, in_place);
    for round in 0..rounds {
        machine.round(round)?;
    }
    machine.answers()?;
    Ok(Proof {
        rounds,
        prices: schedules.iter().map(Price::of).collect(),
    })
}

/// Proves the shared-memory lowering of all ranks.
pub fn check_shared(problem: &Problem, in_place: bool) -> Result<(), Flaw> {
    let steps: Vec<_> = (0..problem.world)
        .map(|rank| shared(problem, rank))
        .collect();
    prove_shared(problem, &steps, in_place)
}

/// Proves the lowering for small vectors of all ranks.
pub fn check_posted(problem: &Problem, in_place: bool) -> Result<(), Flaw> {
    let steps: Vec<_> = (0..problem.world)
        .map(|rank| posted(problem, rank))
        .collect();
    prove_shared(problem, &steps, in_place)
}

/// Proves these steps, one list for each rank.
pub fn prove_shared(problem: &Problem, steps: &[Vec<Shared>], in_place: bool) -> Result<(), Flaw> {
    assert_eq!(
        steps.len(),
        problem.world,
        "one list of steps for each rank"
    );
    let phases: Vec<Vec<&[Shared]>> = steps
        .iter()
        .map(|steps| steps.split(|step| *step == Shared::Sync).collect())
        .collect();
    for (rank, own) in phases.iter().enumerate() {
        if own.len() != phases[0].len() {
            return Err(Flaw::Syncs {
                rank,
                found: own.len() - 1,
                expected: phases[0].len() - 1,
            });
        }
    }
    if problem.kind == Kind::Barrier && problem.world > 1 && phases[0].len() < 2 {
        return Err(Flaw::Ignorant { rank: 0, of: 1 });
    }
    let mut memory = memory::Memory::new(problem, in_place);
    for phase in 0..phases[0].len() {
        memory.phase(phases.iter().map(|own| own[phase]), phase, phases[0].len())?;
    }
    memory.answers()
}

#[cfg(test)]
mod tests;
