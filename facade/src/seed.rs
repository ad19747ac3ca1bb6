//! One seed for a whole run, and the many that follow from it: for a rank, a worker, an epoch, a sample.

use std::sync::{PoisonError, RwLock};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result};

static CURRENT: RwLock<Option<u64>> = RwLock::new(None);

/// Choose the run's seed and remember it for this process: `seed` when given, else `FABRIC_SEED`, else 0 with a warning
/// (Lightning's rule). All ranks get the same seed, none adds its rank to it: ranks must agree on how data is shuffled
/// and parameters begin. For randomness that differs by rank, use [`derive()`].
///
/// Two differences from Lightning: any `u64` is a seed, and nothing is written into the environment, because
/// supervised ranks run this program from its start and call this function themselves.
///
/// ```
/// assert_eq!(fabric::seed::seed_everything(Some(42))?, 42);
/// assert_eq!(fabric::seed::current(), Some(42));
/// # Ok::<(), fabric::Error>(())
/// ```
///
/// # Errors
/// When `FABRIC_SEED` is needed, set, and not a number from 0 to 2^64 - 1.
pub fn seed_everything(seed: Option<u64>) -> Result<u64> {
    let seed = choose(seed, &|name| std::env::var(name).ok())?;
    *CURRENT.write().unwrap_or_else(PoisonError::into_inner) = Some(seed);
    Ok(seed)
}

/// The seed that [`seed_everything`] chose last in this process.
pub fn current() -> Option<u64> {
    *CURRENT.read().unwrap_or_else(PoisonError::into_inner)
}

/// The seed of a stream: `derive(seed, &[rank, worker, epoch])`. The same on every machine and in every release.
///
/// Each entry is added to the state, multiplied by an odd constant, and mixed by the finaliser of splitmix64 (Steele,
/// Lea, Flood, "Fast splittable pseudorandom number generators", 2014). Every step is a bijection of the state and of the
/// entry, so streams that differ in exactly one entry, and seeds with the same stream, never collide.
///
/// ```
/// use fabric::seed::derive;
///
/// let (rank, worker, epoch) = (3, 0, 7);
/// assert_eq!(derive(42, &[rank, worker, epoch]), derive(42, &[rank, worker, epoch]));
/// assert_ne!(derive(42, &[rank, worker, epoch]), derive(42, &[worker, rank, epoch]));
/// ```
pub fn derive(seed: u64, stream: &[u64]) -> u64 {
    const ODD: u64 = 0xd134_2543_de82_ef95; // a multiplier with a good spectral test (Steele & Vigna 2021)
    stream.iter().fold(mix(seed), |state, &entry| {
        mix(state.wrapping_mul(ODD).wrapping_add(entry))
    })
}

/// A generator for `seed`, the same on every machine.
///
/// ```
/// use rand::Rng;
///
/// let (mut a, mut b) = (fabric::seed::rng(7), fabric::seed::rng(7));
/// assert_eq!(a.random::<u64>(), b.random::<u64>());
/// ```
pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn choose(seed: Option<u64>, get: &dyn Fn(&str) -> Option<String>) -> Result<u64> {
    if let Some(seed) = seed {
        return Ok(seed);
    }
    let Some(text) = get("FABRIC_SEED") else {
        tracing::warn!("no seed was given and FABRIC_SEED is not set: the seed is 0");
        return Ok(0);
    };
    text.trim().parse().map_err(|_| {
        Error::argument(
            format!("FABRIC_SEED is {text:?}, which is not a number from 0 to 2^64 - 1"),
            "Correct or unset it, or give the seed to seed_everything",
        )
    })
}

/// The finaliser of splitmix64, after one step of its counter (so that 0 does not stay 0).
fn mix(state: u64) -> u64 {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn line_57_a_given_seed_wins_then_the_variable_then_zero() {
        let set = |_: &str| Some("17".to_string());
        assert_eq!(choose(Some(5), &set).unwrap(), 5);
        assert_eq!(choose(None, &set).unwrap(), 17);
        assert_eq!(choose(None, &|_| None).unwrap(), 0);
        assert_eq!(
            choose(None, &|_| Some(u64::MAX.to_string())).unwrap(),
            u64::MAX
        );
    }

    #[test]
    fn a_malformed_variable_is_an_error_with_its_value() {
        for text in ["", "-1", "1.5", "seed", "18446744073709551616"] {
            let error = choose(None, &|_| Some(text.to_string()))
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("FABRIC_SEED") && error.contains(text),
                "{error}"
            );
        }
    }

    #[test]
    fn the_chosen_seed_is_remembered() {
        assert_eq!(seed_everything(Some(99)).unwrap(), 99);
        assert_eq!(current(), Some(99));
    }

    #[test]
    fn splitmix_is_the_published_one() {
        assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf); // the first output of splitmix64 from state 0
    }

    #[test]
    fn no_two_of_many_streams_collide() {
        let mut seen = HashSet::new();
        for seed in 0..4 {
            for rank in 0..16 {
                for worker in 0..8 {
                    for epoch in 0..64 {
                        assert!(seen.insert(derive(seed, &[rank, worker, epoch])));
                    }
                }
            }
        }
    }

    #[test]
    fn the_length_and_the_order_of_a_stream_matter() {
        assert_ne!(derive(1, &[]), derive(1, &[0]));
        assert_ne!(derive(1, &[0]), derive(1, &[0, 0]));
        assert_ne!(derive(1, &[2, 3]), derive(1, &[3, 2]));
    }
}
