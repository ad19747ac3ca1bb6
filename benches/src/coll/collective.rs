//! The collectives as a table: names, bandwidth factors, what lies where, and what must come out. A new one is an entry in
//! each function here.

use std::ops::Range;

use fabric_engine::{
    comm::{Call, Op, Rank},
    schedule::Kind,
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
    /// Whether vectors are cut unevenly.
    pub is_uneven: bool,
}

impl Place {
    /// Elements of `rank`'s slice of a vector that is cut among the ranks.
    fn slice(self, count: usize, rank: Rank) -> usize {
        match self.is_uneven {
            true => count * ((rank + 2) % 3),
            false => count,
        }
    }

    /// Where `rank`'s slice begins.
    fn start(self, count: usize, rank: Rank) -> usize {
        (0..rank).map(|before| self.slice(count, before)).sum()
    }
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
    pub fn elements(self, count: usize, place: Place) -> usize {
        let ranks = place.ranks;
        match self {
            Self::AllToAll => count * ranks,
            Self::AllReduce | Self::Broadcast | Self::Reduce | Self::SendRecv => count,
            Self::AllToAllV => (0..ranks)
                .map(|rank| (0..ranks).map(|to| uneven(count, rank, to)).sum())
                .max()
                .unwrap_or(0),
            _ => place.start(count, ranks),
        }
    }

    /// Elements of the full vector: what all ranks' elements are parts of. Tables of algorithms go by it.
    pub fn full_elems(self, count: usize, place: Place) -> usize {
        match self {
            Self::AllToAll => count * place.ranks * place.ranks,
            Self::AllToAllV => (0..place.ranks * place.ranks)
                .map(|pair| uneven(count, pair / place.ranks, pair % place.ranks))
                .sum(),
            _ => self.elements(count, place),
        }
    }

    /// What rows of a table of algorithms call it (with root 0); none for messages, and for what another one's rows decide.
    pub fn kind(self) -> Option<Kind> {
        match self {
            Self::AllReduce => Some(Kind::AllReduce),
            Self::AllGather => Some(Kind::AllGather),
            Self::ReduceScatter => Some(Kind::ReduceScatter),
            Self::Broadcast => Some(Kind::Broadcast { root: 0 }),
            Self::Reduce => Some(Kind::Reduce { root: 0 }),
            Self::AllToAll => Some(Kind::AllToAll),
            Self::Gather => Some(Kind::Gather { root: 0 }),
            Self::Scatter => Some(Kind::Scatter { root: 0 }),
            Self::Barrier => Some(Kind::Barrier),
            Self::AllToAllV | Self::SendRecv => None,
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
        let Place {
            rank, ranks, root, ..
        } = place;
        let is_root = rank == root;
        let slice = place.slice(count, rank);
        let own = place.start(count, rank)..place.start(count, rank) + slice;
        let whole = place.start(count, ranks);
        let segment = |of, range| Segment { of, range };
        let on_root = |here: usize| if is_root { here } else { 0 };
        let slices = |times: usize| {
            (0..ranks).map(move |of| segment(Some(of), 0..place.slice(count, of) * times))
        };
        let (input, output, in_place) = match self {
            Self::AllReduce => (count, vec![segment(None, 0..count)], Some((count, 0, 0))),
            Self::AllGather => (slice, slices(1).collect(), Some((whole, own.start, 0))),
            Self::ReduceScatter => (
                whole,
                vec![segment(None, own.clone())],
                Some((whole, 0, own.start)),
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
            Self::AllToAll => {
                let block = rank * count..(rank + 1) * count;
                let blocks = (0..ranks).map(|of| segment(Some(of), block.clone()));
                (count * ranks, blocks.collect(), None)
            }
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
                slice,
                slices(on_root(1)).collect(),
                Some(match is_root {
                    true => (whole, own.start, 0),
                    false => (slice, 0, 0),
                }),
            ),
            Self::Scatter => (
                on_root(whole),
                vec![segment(Some(root), own.clone())],
                Some(match is_root {
                    true => (whole, 0, own.start),
                    false => (slice, 0, 0),
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
    pub fn call(self, op: Option<Redop>, count: usize, place: Place) -> Call {
        let Place {
            rank, ranks, root, ..
        } = place;
        let op = op.unwrap_or(Redop::Sum).on_rank(rank);
        let call = Call::new(match self {
            Self::AllReduce => Op::AllReduce(op),
            Self::ReduceScatter => Op::ReduceScatter(op),
            Self::AllGather => Op::AllGather,
            Self::Broadcast => Op::Broadcast { root },
            Self::Reduce => Op::Reduce { op, root },
            Self::AllToAll | Self::AllToAllV => Op::AllToAll,
            Self::SendRecv => Op::SendRecv {
                to: (rank + 1) % ranks,
                from: (rank + ranks - 1) % ranks,
            },
            Self::Gather => Op::Gather { root },
            Self::Scatter => Op::Scatter { root },
            Self::Barrier => Op::Barrier,
        });
        if self == Self::AllToAllV {
            let pairs = (0..ranks * ranks).map(|pair| uneven(count, pair / ranks, pair % ranks));
            call.counts(pairs.collect::<Vec<_>>())
        } else if self.is_cut() && place.is_uneven {
            let slices = (0..ranks).map(|rank| place.slice(count, rank));
            call.counts(slices.collect::<Vec<_>>())
        } else {
            call
        }
    }

    /// Whether one vector is cut into a slice for each rank.
    pub fn is_cut(self) -> bool {
        let cut = [
            Self::AllGather,
            Self::ReduceScatter,
            Self::Gather,
            Self::Scatter,
        ];
        cut.contains(&self)
    }

    /// Whether it can be done among `ranks`: nobody sends to itself.
    pub fn is_possible(self, ranks: usize) -> bool {
        ranks > 1 || self != Self::SendRecv
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
            for (ranks, is_uneven) in (1..=8).flat_map(|ranks| [(ranks, false), (ranks, true)]) {
                for root in 0..ranks {
                    let place = |rank| Place {
                        rank,
                        ranks,
                        root,
                        is_uneven,
                    };
                    let layout = |rank| collective.layout(6, place(rank));
                    for rank in 0..ranks {
                        let here = layout(rank);
                        let what = format!("{collective:?} {:?}", place(rank));
                        for segment in &here.output {
                            let sender = segment.of.unwrap_or(rank);
                            assert!(segment.range.end <= layout(sender).input, "{what}");
                        }
                        if let Some((slab, from, into)) = here.in_place {
                            assert!(from + here.input <= slab, "{what}");
                            assert!(into + here.output_elems() <= slab, "{what}");
                            assert!(slab <= collective.elements(6, place(rank)), "{what}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn uneven_slices_are_zero_one_or_two_counts() {
        let place = Place {
            rank: 1,
            ranks: 3,
            root: 0,
            is_uneven: true,
        };
        let layout = Collective::AllGather.layout(5, place);
        assert_eq!((layout.input, layout.in_place), (0, Some((15, 10, 0))));
        let call = Collective::Scatter.call(None, 5, place);
        assert_eq!(*call.counts.unwrap(), [10, 0, 5]);
        let call = Collective::AllToAllV.call(None, 5, place);
        assert_eq!(*call.counts.unwrap(), [0, 10, 5, 5, 0, 10, 10, 5, 0]);
        assert_eq!(Collective::AllReduce.call(None, 5, place).counts, None);
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
