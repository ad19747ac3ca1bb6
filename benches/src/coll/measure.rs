//! How long it takes.
//!
//! [Note: how times are taken] Four ways, by the flags:
//!
//! - back to back (the default, nccl-tests' own): after a barrier, all iterations in one loop; time = loop / iterations;
//! - isolated (`-z 1`): a barrier before each iteration, not timed; the time of an iteration is the slowest rank's, and
//!   the row shows the median over iterations;
//! - dirty (`--dirty`), as nccl-tests -z 1 and OSU do, but on new inputs: every rank rewrites its input, a barrier, the
//!   operation. Above 64 KiB each operation is timed by itself behind its barrier. Up to 64 KiB, where a clock and the
//!   skew behind a barrier would be most of it, a batch of 32 times (rewrite, barrier, operation) is timed, and in turns
//!   with it one of 32 times (rewrite, barrier), so that noise hits both; the time is the difference of the two medians
//!   over batches / 32. The collective barrier's time is that of a batch of barriers / 32;
//! - pipelined, beside dirty and up to 64 KiB: the same without barriers, which is the throughput of operations back to
//!   back, less 32 rewrites. A root, say, need not wait for the others; so this is no latency.
//!
//! The benchmarks in `peers/` do the same as the last two.

use std::time::Duration;

use fabric_engine::{
    Result,
    clock::Clock,
    comm::{Collectives, host::Host},
    kernels::{self, Finish, Fold, Span, SpanMut, Store},
};

use rustix::time::{ClockId, clock_gettime};

use super::{
    args::Args,
    case::{Buffers, Case},
    collective::Collective,
    stage::Stage,
};

/// Operations in a batch.
pub const BATCH: usize = 32;
/// Up to this size batches are timed.
pub const BATCHED_BYTES: usize = 64 << 10;

/// What a batch does after each rewrite.
#[derive(Clone, Copy)]
struct Batch {
    meets: bool,
    operates: bool,
}

impl Batch {
    const PIPELINED: Self = Self {
        meets: false,
        operates: true,
    };
    /// Each is what is measured, and then what is subtracted.
    const ALL: [Self; 4] = [
        Self {
            meets: true,
            operates: true,
        },
        Self {
            meets: true,
            operates: false,
        },
        Self::PIPELINED,
        Self {
            meets: false,
            operates: false,
        },
    ];
}

/// What was measured, in seconds for one operation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// The time of the row.
    pub time: f64,
    /// Over iterations, where each was timed: the smallest, the middle, the 99th percentile, the largest.
    pub spread: Option<Spread>,
    /// Iterations (batches, where batches were timed).
    pub iterations: usize,
    /// Dirty and up to 64 KiB: the time back to back.
    pub pipelined: Option<f64>,
}

/// A distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Spread {
    /// Smallest.
    pub min: f64,
    /// Half are smaller.
    pub p50: f64,
    /// 99 of 100 are smaller.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// Of at least one value.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        let last = values.len() - 1;
        let at = |part: f64| values[(last as f64 * part).round() as usize];
        Self {
            min: values[0],
            p50: at(0.5),
            p99: at(0.99),
            max: values[last],
        }
    }
}

/// One rank's stop-watch, and what it needs to agree with the others.
pub struct Bench<'a> {
    /// The ranks.
    pub stage: &'a Stage,
    /// The communicator.
    pub host: &'a mut Host,
    /// The flags.
    pub args: &'a Args,
    /// The clock.
    pub clock: Clock,
}

impl Bench<'_> {
    /// Time `case` on `sets` of buffers: each iteration takes the next.
    ///
    /// # Errors
    /// The collective's.
    pub fn times(&mut self, case: &Case, sets: &mut [Buffers], bytes: usize) -> Result<Times> {
        for _ in 0..self.args.warmup_iters {
            self.iteration(sets, 0)?;
        }
        if self.args.dirty {
            if bytes <= BATCHED_BYTES {
                self.batches(case, sets)
            } else {
                self.isolated(case, sets, true)
            }
        } else if self.args.blocking == 1 {
            self.isolated(case, sets, false)
        } else {
            self.back_to_back(sets)
        }
    }

    /// How many iterations fill the budget, if there is one; `once` measures one of them.
    fn iterations(&mut self, once: impl FnOnce(&mut Self) -> Result<()>) -> Result<usize> {
        const MOST: f64 = 2000.0;
        let (budget, least) = match (self.args.budget, self.args.iters) {
            (Some(budget), _) => (budget, 3.0),
            (None, Some(iterations)) => return Ok(iterations.max(1)),
            (None, None) => (0.02, 20.0),
        };
        self.host.barrier()?;
        let start = self.clock.now();
        once(self)?;
        let own = (self.clock.now() - start).as_secs_f64();
        let slowest = self.stage.largest(&[own])?[0];
        Ok((budget / slowest.max(1e-9)).clamp(least, MOST) as usize)
    }

    fn iteration(&mut self, sets: &mut [Buffers], turn: usize) -> Result<()> {
        let together = self.args.agg_iters;
        if together > 1 {
            return Buffers::run_together(&mut sets[..together], self.host);
        }
        let turn = turn % sets.len();
        sets[turn].run(self.host)
    }

    fn back_to_back(&mut self, sets: &mut [Buffers]) -> Result<Times> {
        let iterations = self.iterations(|bench| bench.iteration(sets, 1))?;
        let mut laps = Vec::new();
        self.host.barrier()?;
        let start = self.now();
        let mut before = start;
        for turn in 0..iterations {
            self.iteration(sets, turn)?;
            if self.args.per_iter_timing {
                let now = self.now();
                laps.push(self.per_operation(now - before));
                before = now;
            }
        }
        let own = self.per_operation(self.now() - start) / iterations as f64;
        let by_rank = self.stage.all(&[own])?;
        let by_rank = by_rank.iter().map(|row| row[0]);
        let time = match self.args.average {
            0 => by_rank.clone().next().unwrap_or(own),
            1 => by_rank.clone().sum::<f64>() / by_rank.len() as f64,
            2 => by_rank.fold(f64::MAX, f64::min),
            _ => by_rank.fold(0.0, f64::max),
        };
        let spread = match laps.is_empty() {
            true => None,
            false => Some(Spread::of(self.stage.largest(&laps)?)),
        };
        Ok(Times {
            time,
            spread,
            iterations,
            pipelined: None,
        })
    }

    fn isolated(&mut self, case: &Case, sets: &mut [Buffers], dirty: bool) -> Result<Times> {
        let iterations = self.iterations(|bench| bench.iteration(sets, 1))?;
        let mut laps = Vec::with_capacity(iterations);
        for turn in 0..iterations {
            if dirty {
                sets.iter_mut()
                    .for_each(|set| set.rewrite(case.dtype, turn));
            }
            self.host.barrier()?;
            let start = self.now();
            self.iteration(sets, turn)?;
            laps.push(self.per_operation(self.now() - start));
        }
        self.slowest(&laps)
    }

    fn batches(&mut self, case: &Case, sets: &mut [Buffers]) -> Result<Times> {
        let kinds: &[Batch] = match case.collective {
            Collective::Barrier => &[Batch::PIPELINED], // which is one barrier after the other
            _ => &Batch::ALL,
        };
        let batches = self.iterations(|bench| {
            (kinds.iter()).try_for_each(|kind| bench.batch(case, sets, *kind).map(drop))
        })?;
        let mut laps = vec![Vec::with_capacity(batches); kinds.len()];
        for _ in 0..batches {
            for (kind, laps) in kinds.iter().zip(&mut laps) {
                let lap = self.batch(case, sets, *kind)?;
                laps.push(self.per_operation(lap) / BATCH as f64);
            }
        }
        for laps in &mut laps {
            *laps = self.stage.largest(laps)?;
        }
        let less = |all: &[f64], rest: &[f64]| {
            let rest = Spread::of(rest.to_vec()).p50;
            Spread::of(all.iter().map(|lap| (lap - rest).max(0.0)).collect())
        };
        let (spread, pipelined) = match &laps[..] {
            [isolated, barriers, pipelined, rewrites] => (
                less(isolated, barriers),
                Some(less(pipelined, rewrites).p50),
            ),
            laps => (Spread::of(laps.concat()), None),
        };
        Ok(Times {
            time: spread.p50,
            spread: Some(spread),
            iterations: batches,
            pipelined,
        })
    }

    fn batch(&mut self, case: &Case, sets: &mut [Buffers], kind: Batch) -> Result<Duration> {
        self.host.barrier()?;
        let start = self.now();
        for turn in 0..BATCH {
            sets.iter_mut()
                .for_each(|set| set.rewrite(case.dtype, turn));
            if kind.meets {
                self.host.barrier()?;
            }
            if kind.operates {
                self.iteration(sets, turn)?;
            }
        }
        Ok(self.now() - start)
    }

    /// The stop-watch: time, or what this process has spent of processors' time.
    fn now(&self) -> Duration {
        if self.args.report_cputime == 0 {
            return self.clock.now();
        }
        let spent = clock_gettime(ClockId::ProcessCPUTime);
        Duration::try_from(spent).unwrap_or_default() // never negative
    }

    fn per_operation(&self, time: Duration) -> f64 {
        time.as_secs_f64() / self.args.agg_iters.max(1) as f64
    }

    fn slowest(&self, laps: &[f64]) -> Result<Times> {
        let spread = Spread::of(self.stage.largest(laps)?);
        Ok(Times {
            time: spread.p50,
            spread: Some(spread),
            iterations: laps.len(),
            pipelined: None,
        })
    }

    /// The limit: the median time of all ranks copying `bytes` at once, in the ordinary way or past the caches, whichever is
    /// quicker.
    ///
    /// # Errors
    /// When a rank is gone.
    pub fn copies(&mut self, bytes: usize) -> Result<f64> {
        let plain = self.copies_by(bytes, |from, into| into.copy_from_slice(from))?;
        let streamed = self.copies_by(bytes, |from, into| {
            let (from, into) = (&[Span::of(from)], &mut [SpanMut::of(into)]);
            kernels::combine(Fold::Sum, from, None, Finish::Cast, into, Store::Streaming)
                .expect("a copy of bytes");
        })?;
        Ok(plain.min(streamed))
    }

    fn copies_by(&mut self, bytes: usize, copy: impl Fn(&[u8], &mut [u8])) -> Result<f64> {
        let from = vec![1u8; bytes];
        let mut into = vec![0u8; bytes];
        let inner = (BATCHED_BYTES / bytes.max(1)).clamp(1, BATCH);
        let iterations = ((256 << 20) / bytes.max(1)).clamp(5, 50);
        let mut laps = Vec::with_capacity(iterations);
        for _ in 0..iterations {
            self.host.barrier()?;
            let start = self.clock.now();
            for _ in 0..inner {
                copy(std::hint::black_box(&from), &mut into);
                std::hint::black_box(&mut into);
            }
            laps.push((self.clock.now() - start).as_secs_f64() / inner as f64);
        }
        Ok(Spread::of(self.stage.largest(&laps)?).p50)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let spread = Spread::of((0..=100).rev().map(f64::from).collect());
        assert_eq!(
            (spread.min, spread.p50, spread.p99, spread.max),
            (0.0, 50.0, 99.0, 100.0)
        );
        assert_eq!(Spread::of(vec![3.0]).p99, 3.0);
    }
}
