//! The collectives as a table: names, bandwidth factors, what lies where, and what must come out. A new one is an entry in
//! each function here.

use std::ops::Range;

use fabric_engine::{
    Error, Result,
    comm::{Call, Op, Rank},
};

use super::{args, redop::Redop};

/// By the names of nccl-tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    /// Everybody gets the reduction.
    AllReduce,
    /// Everybody gets everybody's elements.
    AllGather,
    /// Everybody gets a slice of the reduction.
    ReduceScatter,
    /// Everybody gets the root's elements.
    Broadcast,
    /// The root gets the reduction.
    Reduce,
    /// Everybody sends a slice to everybody.
    AllToAll,
    /// The same, with slices of 0, 1 or 2 times the count.
    AllToAllV,
    /// Everybody sends to the next rank, and receives from the one before.
    SendRecv,
    /// The root gets everybody's elements.
    Gather,
    /// Everybody gets a slice of the root's elements.
    Scatter,
    /// Nobody leaves before everybody has come.
    Barrier,
}

/// Elements of a rank's vector, in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Whose vector; `None` is the reduction over all.
    pub of: Option<Rank>,
    /// Which elements of it.
    pub range: Range<usize>,
}

/// One rank's memory in a collective, in elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Elements of the input: the first of this rank's vector.
    pub input: usize,
    /// The output, from its beginning.
    pub output: Vec<Segment>,
    /// In place: the slab's elements, where the input begins, where the output begins; `None` where there is no such form.
    pub in_place: Option<(usize, usize, usize)>,
}

impl Layout {
    /// Elements of the output.
    pub fn output_elems(&self) -> usize {
        self.output.iter().map(|segment| segment.range.len()).sum()
    }
}

/// Which rank of how many, and who is the root.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// This rank.
    pub rank: Rank,
    /// Ranks.
    pub ranks: usize,
    /// The root.
    pub root: Rank,
}

impl Collective {
    /// All, in the order of the help.
    pub const ALL: [Self; 11] = [
        Self::AllReduce,
        Self::AllGather,
        Self::ReduceScatter,
        Self::Broadcast,
        Self::Reduce,
        Self::AllToAll,
        Self::AllToAllV,
        Self::SendRecv,
        Self::Gather,
        Self::Scatter,
        Self::Barrier,
    ];

    /// Its name in nccl-tests.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::Broadcast => "broadcast",
            Self::Reduce => "reduce",
            Self::AllToAll => "alltoall",
            Self::AllToAllV => "alltoallv",
            Self::SendRecv => "sendrecv",
            Self::Gather => "gather",
            Self::Scatter => "scatter",
            Self::Barrier => "barrier",
        }
    }

    /// Names with commas, or "all".
    pub(super) fn parse_list(text: &str) -> std::result::Result<args::Collectives, String> {
        let find = |name: &str| Self::ALL.into_iter().find(|known| known.name() == name);
        args::list(text, &Self::ALL, find, || {
            Self::ALL.map(Self::name).join(", ")
        })
    }

    /// Whether it reduces.
    pub fn reduces(self) -> bool {
        matches!(self, Self::AllReduce | Self::ReduceScatter | Self::Reduce)
    }

    /// Whether it has a root.
    pub fn is_rooted(self) -> bool {
        matches!(
            self,
            Self::Broadcast | Self::Reduce | Self::Gather | Self::Scatter
        )
    }

    /// The call's count for a size in bytes: nccl-tests divides vectors that are cut among ranks in multiples of 16 bytes.
    pub fn count(self, bytes: usize, elem_bytes: usize, ranks: usize) -> usize {
        match self {
            Self::AllReduce | Self::Broadcast | Self::Reduce | Self::SendRecv => bytes / elem_bytes,
            Self::Barrier => 0,
            _ => bytes / elem_bytes / ranks / (16 / elem_bytes) * (16 / elem_bytes),
        }
    }

    /// The size in the table: the most elements that a rank sends or receives.
    pub fn elements(self, count: usize, ranks: usize) -> usize {
        match self {
            Self::AllReduce | Self::Broadcast | Self::Reduce | Self::SendRecv => count,
            Self::AllToAllV => (0..ranks)
                .map(|rank| (0..ranks).map(|to| uneven(count, rank, to)).sum())
                .max()
                .unwrap_or(0),
            _ => count * ranks,
        }
    }

    /// busbw / algbw.
    pub fn bus_factor(self, ranks: usize) -> f64 {
        let n = ranks as f64;
        match self {
            Self::AllReduce => 2.0 * (n - 1.0) / n,
            Self::Broadcast | Self::Reduce | Self::SendRecv => 1.0,
            Self::Barrier => 0.0,
            _ => (n - 1.0) / n,
        }
    }

    /// How many bytes each rank copies in the time that is the limit, for a size of `bytes`: half of what is read and
    /// written, where elements that several ranks read count once. A copy of so many bytes moves as much memory.
    pub fn limit_bytes(self, bytes: usize, ranks: usize) -> usize {
        let share = bytes / ranks;
        match self {
            Self::AllReduce | Self::AllToAll | Self::AllToAllV | Self::SendRecv => bytes,
            Self::AllGather | Self::ReduceScatter | Self::Broadcast | Self::Reduce => {
                (bytes + share) / 2
            }
            Self::Gather | Self::Scatter => share,
            Self::Barrier => 0,
        }
    }

    /// What lies where for `count` elements.
    pub fn layout(self, count: usize, place: Place) -> Layout {
        let Place { rank, ranks, root } = place;
        let is_root = rank == root;
        let own = rank * count..(rank + 1) * count;
        let segment = |of, range| Segment { of, range };
        let everybody =
            |range: Range<usize>| (0..ranks).map(move |of| segment(Some(of), range.clone()));
        let on_root = |here: usize| if is_root { here } else { 0 };
        let (input, output, in_place) = match self {
            Self::AllReduce => (count, vec![segment(None, 0..count)], Some((count, 0, 0))),
            Self::AllGather => (
                count,
                everybody(0..count).collect(),
                Some((count * ranks, own.start, 0)),
            ),
            Self::ReduceScatter => (
                count * ranks,
                vec![segment(None, own.clone())],
                Some((count * ranks, 0, own.start)),
            ),
            Self::Broadcast => (
                on_root(count),
                vec![segment(Some(root), 0..count)],
                Some((count, 0, 0)),
            ),
            Self::Reduce => (
                count,
                vec![segment(None, 0..on_root(count))],
                Some((count, 0, 0)),
            ),
            Self::AllToAll => (count * ranks, everybody(own).collect(), None),
            Self::AllToAllV => {
                let before = |of| (0..rank).map(|to| uneven(count, of, to)).sum();
                let part = |of| {
                    let start: usize = before(of);
                    segment(Some(of), start..start + uneven(count, of, rank))
                };
                let input = (0..ranks).map(|to| uneven(count, rank, to)).sum();
                (input, (0..ranks).map(part).collect(), None)
            }
            Self::SendRecv => {
                let previous = (rank + ranks - 1) % ranks;
                (count, vec![segment(Some(previous), 0..count)], None)
            }
            Self::Gather => (
                count,
                everybody(0..on_root(count)).collect(),
                Some(match is_root {
                    true => (count * ranks, own.start, 0),
                    false => (count, 0, 0),
                }),
            ),
            Self::Scatter => (
                on_root(count * ranks),
                vec![segment(Some(root), own.clone())],
                Some(match is_root {
                    true => (count * ranks, 0, own.start),
                    false => (count, 0, 0),
                }),
            ),
            Self::Barrier => (0, Vec::new(), None),
        };
        Layout {
            input,
            output,
            in_place,
        }
    }

    /// The engine's call.
    ///
    /// # Errors
    /// When the engine has no such operation.
    pub fn call(self, op: Option<Redop>, place: Place) -> Result<Call> {
        let reduction = op.map(|op| (op.name(), op.on_rank(place.rank)));
        let root = place.root;
        Ok(Call::new(match (self, reduction) {
            (Self::AllReduce, Some((_, Some(op)))) => Op::AllReduce(op),
            (Self::ReduceScatter, Some((_, Some(op)))) => Op::ReduceScatter(op),
            (Self::AllGather, None) => Op::AllGather,
            (Self::Broadcast, None) => Op::Broadcast { root },
            (Self::Barrier, None) => Op::Barrier,
            (_, reduction) => {
                let reduction = reduction.map_or("", |(name, _)| name);
                return Err(Error::argument(
                    format!("this engine has no {} {reduction}", self.name()),
                    "Choose another collective or operation",
                ));
            }
        }))
    }

    /// Whether the engine can do it with `op` among `ranks`.
    pub fn is_possible(self, op: Option<Redop>, ranks: usize) -> bool {
        let place = Place {
            rank: 0,
            ranks,
            root: 0,
        };
        // Nobody sends to itself.
        (ranks > 1 || self != Self::SendRecv) && self.call(op, place).is_ok()
    }
}

/// What `from` sends to `to` in an uneven exchange: 0, 1 or 2 times the count.
pub fn uneven(count: usize, from: Rank, to: Rank) -> usize {
    count * ((from + 2 * to) % 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what is received is what was sent. Method: every segment names elements that its sender has.
    #[test]
    fn outputs_name_elements_that_somebody_puts_in() {
        for collective in Collective::ALL {
            for ranks in 1..=8 {
                for root in 0..ranks {
                    let layout = |rank| collective.layout(6, Place { rank, ranks, root });
                    for rank in 0..ranks {
                        let layout_here = layout(rank);
                        for segment in &layout_here.output {
                            let sender = segment.of.unwrap_or(rank);
                            assert!(
                                segment.range.end <= layout(sender).input.max(layout_here.input),
                                "{collective:?} {rank}/{ranks} root {root}: {segment:?}"
                            );
                        }
                        let most = collective.elements(6, ranks);
                        if let Some((slab, from, into)) = layout_here.in_place {
                            assert!(from + layout_here.input <= slab, "{collective:?}");
                            assert!(into + layout_here.output_elems() <= slab, "{collective:?}");
                            assert!(slab <= most);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn factors_and_counts_are_those_of_nccl_tests() {
        assert_eq!(Collective::AllReduce.bus_factor(4), 1.5);
        assert_eq!(Collective::AllGather.bus_factor(4), 0.75);
        assert_eq!(Collective::Broadcast.bus_factor(4), 1.0);
        assert_eq!(Collective::AllGather.count(1000, 4, 3), 80); // 83.3, in multiples of 16 bytes
        assert_eq!(Collective::AllReduce.count(1000, 4, 3), 250);
    }
}
