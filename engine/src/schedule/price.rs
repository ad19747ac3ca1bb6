//! What a schedule costs: counts that a benchmark or an executor's trace can be held against.

use super::shared::{Ranks, Shared};
use super::{Form, Move, Rank, Schedule};

/// What one rank sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Price {
    /// Messages sent.
    pub messages: usize,
    /// Elements sent in the buffer's dtype.
    pub payload_elems: usize,
    /// Elements sent in the accumulator's dtype.
    pub partial_elems: usize,
    /// Rounds with a wire or without; the same on all ranks.
    pub rounds: usize,
}

impl Price {
    /// The price of one rank's schedule.
    pub fn of(schedule: &Schedule) -> Price {
        let mut price = Price {
            rounds: schedule.rounds.len(),
            ..Price::default()
        };
        for step in schedule.rounds.iter().flat_map(|round| &round.wire) {
            if let Move::Send { from, .. } = step {
                price.messages += 1;
                match schedule.form(from.region) {
                    Form::Payload => price.payload_elems += from.elems(),
                    Form::Partial => price.partial_elems += from.elems(),
                }
            }
        }
        price
    }

    /// Elements sent in either form.
    pub fn elems(&self) -> usize {
        self.payload_elems + self.partial_elems
    }

    /// Bytes sent, with the sizes of an element in both forms.
    pub fn bytes(&self, payload_bytes: usize, partial_bytes: usize) -> usize {
        self.payload_elems * payload_bytes + self.partial_elems * partial_bytes
    }

    /// The α-β model (Hockney 1994): `alpha` seconds a message, or a round where this rank only waits, and `beta`
    /// seconds a byte.
    pub fn seconds(
        &self,
        alpha: f64,
        beta: f64,
        payload_bytes: usize,
        partial_bytes: usize,
    ) -> f64 {
        let starts = self.messages.max(self.rounds);
        alpha * starts as f64 + beta * self.bytes(payload_bytes, partial_bytes) as f64
    }
}

/// What one rank moves between its own memory and its peers'.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedPrice {
    /// Elements loaded from peers' inputs.
    pub loaded_elems: usize,
    /// Elements stored into peers' outputs.
    pub stored_elems: usize,
    /// Points where all ranks meet.
    pub syncs: usize,
}

impl SharedPrice {
    /// The price of one rank's steps.
    pub fn of(steps: &[Shared], world: usize, rank: Rank) -> SharedPrice {
        let peers = |ranks: Ranks| match ranks {
            Ranks::All => world - 1,
            Ranks::One(one) => usize::from(one != rank),
        };
        let mut price = SharedPrice::default();
        for step in steps {
            match step {
                Shared::Post => {}
                Shared::Sync => price.syncs += 1,
                Shared::LoadFoldStore { ranges, from, into } => {
                    let elems: usize = ranges.iter().map(ExactSizeIterator::len).sum();
                    price.loaded_elems += elems * peers(*from);
                    price.stored_elems += elems * peers(*into);
                }
            }
        }
        price
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{Algorithm, Kind, Problem, messages, shared};

    /// Every rank's price for an even problem.
    fn prices(kind: Kind, algorithm: Algorithm, world: usize, elems: usize) -> Vec<Price> {
        let problem = Problem::even(kind, world, elems);
        (0..world)
            .map(|rank| Price::of(&messages(algorithm, &problem, rank).expect("applies")))
            .collect()
    }

    #[test]
    fn powers_of_two_send_what_the_textbook_says() {
        for log in 1..=6 {
            let (world, elems) = (1usize << log, 64 << log);
            let part = elems / world * (world - 1);
            for price in prices(Kind::AllReduce, Algorithm::Halving, world, elems) {
                assert_eq!(
                    (price.elems(), price.messages, price.rounds),
                    (2 * part, 2 * log, 2 * log)
                );
                // The first round's leaves and the gather are payload; what is summed already is partial.
                assert_eq!(price.payload_elems, elems / 2 + part);
            }
            for price in prices(Kind::AllReduce, Algorithm::Direct, world, elems) {
                let all = Price {
                    messages: 2 * (world - 1),
                    payload_elems: 2 * part,
                    partial_elems: 0,
                    rounds: 2,
                };
                assert_eq!(price, all);
            }
            for price in prices(Kind::AllReduce, Algorithm::Doubling, world, elems) {
                let (payload_elems, partial_elems) = (elems, (log - 1) * elems);
                assert_eq!(
                    price,
                    Price {
                        messages: log,
                        payload_elems,
                        partial_elems,
                        rounds: log
                    }
                );
            }
            for algorithm in [Algorithm::Direct, Algorithm::Halving] {
                for price in prices(Kind::ReduceScatter, algorithm, world, elems) {
                    assert_eq!(price.elems(), part);
                }
            }
            for algorithm in [Algorithm::Direct, Algorithm::Doubling, Algorithm::Ring] {
                for price in prices(Kind::AllGather, algorithm, world, elems) {
                    assert_eq!((price.payload_elems, price.partial_elems), (part, 0));
                }
            }
            assert_eq!(
                prices(Kind::AllGather, Algorithm::Doubling, world, elems)[0].messages,
                log
            );
            assert_eq!(
                prices(Kind::AllGather, Algorithm::Ring, world, elems)[0].messages,
                world - 1
            );
        }
    }

    /// Nothing is received twice: the total sent is the least that any algorithm needs.
    #[test]
    fn any_world_sends_no_more_than_it_must_in_total() {
        for world in 1..40 {
            let elems = 12 * world;
            let total = |kind, algorithm| {
                prices(kind, algorithm, world, elems)
                    .iter()
                    .map(Price::elems)
                    .sum::<usize>()
            };
            for algorithm in [Algorithm::Direct, Algorithm::Doubling, Algorithm::Ring] {
                assert_eq!(
                    total(Kind::AllGather, algorithm),
                    (world - 1) * elems,
                    "{algorithm} {world}"
                );
            }
            for algorithm in [Algorithm::Direct, Algorithm::Tree, Algorithm::Ring] {
                assert_eq!(
                    total(Kind::Broadcast { root: world / 2 }, algorithm),
                    (world - 1) * elems
                );
            }
            assert_eq!(
                total(Kind::AllReduce, Algorithm::Tree),
                2 * (world - 1) * elems
            );
        }
    }

    #[test]
    fn a_chain_sends_the_vector_once_over_each_link() {
        let prices = prices(Kind::Broadcast { root: 0 }, Algorithm::Ring, 4, 1600);
        assert!(
            prices[..3]
                .iter()
                .all(|price| price.payload_elems == 1600 && price.rounds == 16 + 2)
        );
        assert_eq!(prices[3].messages, 0);
    }

    #[test]
    fn seconds_count_starts_and_bytes() {
        let price = Price {
            messages: 1,
            payload_elems: 10,
            partial_elems: 5,
            rounds: 3,
        };
        assert_eq!(price.seconds(2.0, 0.5, 2, 4), 3.0 * 2.0 + 40.0 * 0.5);
    }

    #[test]
    fn shared_memory_moves_each_slice_once() {
        let problem = Problem::even(Kind::AllReduce, 4, 40);
        let price = SharedPrice::of(&shared(&problem, 1), 4, 1);
        assert_eq!(
            price,
            SharedPrice {
                loaded_elems: 30,
                stored_elems: 30,
                syncs: 2
            }
        );
    }
}
