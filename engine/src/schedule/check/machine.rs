//! All ranks at once, on symbols: executes schedules by messages, round after round, and stops at the first flaw.

use std::collections::VecDeque;
use std::ops::Range;

use super::bench::{At, Bench, Place};
use super::flaw::{Cell, Flaw, Value};
use crate::schedule::{Form, Kind, Move, Problem, Rank, Region, Schedule};

/// A message on its way: its form and where it lies among the round's values.
struct Message {
    form: Form,
    values: Range<usize>,
}

/// The world.
pub(super) struct Machine<'a> {
    problem: &'a Problem,
    schedules: &'a [Schedule],
    benches: Vec<Bench>,
    /// `mail[from * world + to]`, this round's.
    mail: Vec<VecDeque<Message>>,
    values: Vec<Value>,
    pending: usize,
    /// Barrier: which ranks each knows to have entered, 64 a word.
    known: Vec<Vec<u64>>,
}

impl<'a> Machine<'a> {
    pub(super) fn new(
        problem: &'a Problem,
        schedules: &'a [Schedule],
        in_place: bool,
    ) -> Machine<'a> {
        let world = problem.world;
        let knows = |rank: Rank| {
            let mut words = vec![0; world.div_ceil(64)];
            words[rank / 64] |= 1 << (rank % 64);
            words
        };
        Machine {
            problem,
            schedules,
            benches: (0..world)
                .map(|rank| Bench::new(problem, &schedules[rank], rank, in_place))
                .collect(),
            mail: (0..world * world).map(|_| VecDeque::new()).collect(),
            values: Vec::new(),
            pending: 0,
            known: if problem.kind == Kind::Barrier {
                (0..world).map(knows).collect()
            } else {
                Vec::new()
            },
        }
    }

    /// All sends see memory as it is before the round; then receives land; then each rank goes on alone.
    pub(super) fn round(&mut self, round: usize) -> Result<(), Flaw> {
        self.values.clear();
        let before = self.known.clone();
        for rank in 0..self.problem.world {
            self.send(rank, round)?;
        }
        for rank in 0..self.problem.world {
            self.recv(rank, round, &before)?;
        }
        if self.pending > 0 {
            let pair = self
                .mail
                .iter()
                .position(|mail| !mail.is_empty())
                .expect("a message is pending");
            let (from, to) = (pair / self.problem.world, pair % self.problem.world);
            return Err(Flaw::Unreceived { from, to, round });
        }
        for rank in 0..self.problem.world {
            self.local(rank, round)?;
        }
        Ok(())
    }

    fn send(&mut self, rank: Rank, round: usize) -> Result<(), Flaw> {
        for step in &self.schedules[rank].rounds[round].wire {
            let Move::Send { to, from } = step else {
                continue;
            };
            self.peer(rank, round, *to)?;
            let at = At {
                rank,
                round,
                loc: from,
            };
            let form = self.form(at)?;
            let start = self.values.len();
            let bench = &mut self.benches[rank];
            for range in &from.ranges {
                let (array, cells) = bench.cells(at, range)?;
                for (index, cell) in cells.enumerate() {
                    self.values
                        .push(bench.read(at, array, cell, range.start + index)?);
                    bench.marks[array][cell] = 2 * round + 1;
                }
            }
            let message = Message {
                form,
                values: start..self.values.len(),
            };
            self.mail[rank * self.problem.world + to].push_back(message);
            self.pending += 1;
        }
        Ok(())
    }

    fn recv(&mut self, rank: Rank, round: usize, before: &[Vec<u64>]) -> Result<(), Flaw> {
        for step in &self.schedules[rank].rounds[round].wire {
            let (from, into) = match step {
                Move::Recv { from, into } => (*from, into),
                Move::Send { .. } => continue,
                Move::Fold { .. } | Move::Copy { .. } => {
                    return Err(Flaw::Misplaced { rank, round });
                }
            };
            self.peer(rank, round, from)?;
            let at = At {
                rank,
                round,
                loc: into,
            };
            let taken = self.form(at)?;
            let Some(message) = self.mail[from * self.problem.world + rank].pop_front() else {
                return Err(Flaw::Unsent {
                    from,
                    to: rank,
                    round,
                });
            };
            self.pending -= 1;
            if message.form != taken {
                return Err(Flaw::Form {
                    from,
                    to: rank,
                    round,
                    sent: message.form,
                    taken,
                });
            }
            if message.values.len() != into.elems() {
                let (sent, taken) = (message.values.len(), into.elems());
                return Err(Flaw::Length {
                    from,
                    to: rank,
                    round,
                    sent,
                    taken,
                });
            }
            let mut values = message.values;
            for range in &into.ranges {
                let (array, cells) = self.benches[rank].cells(at, range)?;
                for (index, cell) in cells.enumerate() {
                    let value = self.values[values.next().expect("the lengths agree")];
                    let mark = &mut self.benches[rank].marks[array][cell];
                    if *mark > 2 * round {
                        return Err(Flaw::Race {
                            cell: at.cell(range.start + index),
                            round,
                        });
                    }
                    *mark = 2 * round + 2;
                    self.benches[rank].write(at, array, cell, range.start + index, value)?;
                }
            }
            if let Some(told) = before.get(from) {
                self.known[rank]
                    .iter_mut()
                    .zip(told)
                    .for_each(|(own, told)| *own |= told);
            }
        }
        Ok(())
    }

    fn local(&mut self, rank: Rank, round: usize) -> Result<(), Flaw> {
        for step in &self.schedules[rank].rounds[round].local {
            let (source, target, fold) = match step {
                Move::Fold { into, with } => (with, into, true),
                Move::Copy { from, into } => (from, into, false),
                Move::Send { .. } | Move::Recv { .. } => {
                    return Err(Flaw::Misplaced { rank, round });
                }
            };
            let (from, into) = (
                At {
                    rank,
                    round,
                    loc: source,
                },
                At {
                    rank,
                    round,
                    loc: target,
                },
            );
            let (sent, taken) = (source.elems(), target.elems());
            if sent != taken {
                return Err(Flaw::Length {
                    from: rank,
                    to: rank,
                    round,
                    sent,
                    taken,
                });
            }
            let forms = (self.form(from)?, self.form(into)?);
            let finishes = target.region == Region::Output && forms.0 == Form::Partial;
            let allowed = match forms {
                (_, Form::Partial) => true,
                (Form::Payload, Form::Payload) => !fold,
                (Form::Partial, Form::Payload) => !fold && finishes,
            };
            if !allowed {
                return Err(Flaw::Target {
                    cell: into.cell(target.ranges.first().map_or(0, |r| r.start)),
                    round,
                });
            }
            let sources = self.benches[rank].list(from)?;
            let targets = self.benches[rank].list(into)?;
            self.benches[rank].disjoint(into, fold, &sources, &targets)?;
            let (lifted, world) = (self.problem.lifted, self.problem.world);
            let bench = &mut self.benches[rank];
            for (&(from_array, from_cell, from_index), &(array, cell, index)) in
                sources.iter().zip(&targets)
            {
                let mut value = bench.read(from, from_array, from_cell, from_index)?;
                if forms.1 == Form::Partial {
                    let input = source.region == Region::Input && !(fold && lifted);
                    let widened = value.widened(lifted, input);
                    let cell = from.cell(from_index);
                    value = widened.ok_or(Flaw::Widened {
                        cell,
                        round,
                        found: value,
                    })?;
                }
                if fold {
                    let held = bench.read(into, array, cell, index)?;
                    let order = Flaw::Order {
                        cell: into.cell(index),
                        round,
                        into: held,
                        with: value,
                    };
                    value = held.folded(value, world).ok_or(order)?;
                }
                if finishes {
                    value = match value {
                        Value::Sum { lo: 0, len, elem } if len == world => Value::Finished { elem },
                        found => {
                            return Err(Flaw::Early {
                                cell: from.cell(from_index),
                                round,
                                found,
                            });
                        }
                    };
                }
                bench.write(into, array, cell, index, value)?;
            }
        }
        Ok(())
    }

    /// Every output is what the problem asks for, and every rank knows what a barrier must tell it.
    pub(super) fn answers(&self) -> Result<(), Flaw> {
        for (rank, bench) in self.benches.iter().enumerate() {
            let Place { array, start, .. } = bench.output;
            for (index, elem) in self.problem.outputs(rank).flatten().enumerate() {
                let found = bench.arrays[array][start + index];
                if !found.is_answer(self.problem, elem) {
                    return Err(Flaw::Answer {
                        cell: Cell {
                            rank,
                            region: Region::Output,
                            index,
                        },
                        found,
                    });
                }
            }
        }
        for (rank, known) in self.known.iter().enumerate() {
            if let Some(of) =
                (0..self.problem.world).find(|of| known[of / 64] >> (of % 64) & 1 == 0)
            {
                return Err(Flaw::Ignorant { rank, of });
            }
        }
        Ok(())
    }

    fn peer(&self, rank: Rank, round: usize, peer: Rank) -> Result<(), Flaw> {
        if peer == rank || peer >= self.problem.world {
            Err(Flaw::Peer { rank, round, peer })
        } else {
            Ok(())
        }
    }

    fn form(&self, at: At<'_>) -> Result<Form, Flaw> {
        match at.loc.region {
            Region::Input | Region::Output => Ok(Form::Payload),
            Region::Scratch(slot) => match self.schedules[at.rank].scratch.get(slot) {
                Some(slot) => Ok(slot.form),
                None => Err(Flaw::Bounds {
                    cell: at.cell(0),
                    round: at.round,
                    len: 0,
                }),
            },
        }
    }
}
