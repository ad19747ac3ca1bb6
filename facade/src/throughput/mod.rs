//! How fast training goes: batches, samples, items and floating-point operations a second over a window of updates, and the
//! share of the hardware's peak that they are.

mod estimate;
mod peak;

use std::collections::VecDeque;

pub use estimate::{Transformer, transformer_flops};
pub use peak::{available_flops, tf32_flops};

use crate::{Error, Result, callback::Metrics};

/// Running totals of one rank, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    /// Seconds.
    pub time: f64,
    /// Batches.
    pub batches: u64,
    /// Samples, no fewer than batches.
    pub samples: u64,
    /// Items in them, no fewer than samples: tokens, say.
    pub lengths: Option<u64>,
    /// Floating-point operations of this rank since the last update: the only number that is no running total.
    pub flops: Option<f64>,
}

/// Computes rates over a window of updates.
///
/// ```
/// use fabric::throughput::{Throughput, Totals};
///
/// let mut throughput = Throughput::new().world_size(2).window(3)?.available_flops(Some(50.0));
/// for step in 1..=3u64 {
///     let (time, flops) = (step as f64 * 2.0, Some(40.0));
///     throughput.update(Totals { time, batches: step, samples: step * 8, lengths: None, flops })?;
/// }
/// let rates = throughput.compute();
/// assert_eq!(rates.get("device/samples_per_sec"), Some(4.0));
/// assert_eq!(rates.get("samples_per_sec"), Some(8.0));
/// assert_eq!(rates.get("device/mfu"), Some(0.4));
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Throughput {
    available_flops: Option<f64>,
    world_size: usize,
    window: usize,
    separator: String,
    updates: VecDeque<Totals>,
    with_lengths: usize, // the last updates that had them
    with_flops: usize,
}

impl Default for Throughput {
    fn default() -> Self {
        Self::new()
    }
}

impl Throughput {
    /// One rank, a window of 100 updates, no peak.
    pub fn new() -> Self {
        Self {
            available_flops: None,
            world_size: 1,
            window: 100,
            separator: "/".into(),
            updates: VecDeque::new(),
            with_lengths: 0,
            with_flops: 0,
        }
    }

    /// What one device can do at most, in operations a second ([`available_flops()`]): dense, unless the model is sparse.
    pub fn available_flops(mut self, peak: Option<f64>) -> Self {
        self.available_flops = peak;
        self
    }

    /// How many ranks there are: all are taken to be as fast as this one.
    pub fn world_size(mut self, ranks: usize) -> Self {
        self.world_size = ranks.max(1);
        self
    }

    /// Over how many updates rates are computed.
    ///
    /// # Errors
    /// For fewer than two: a rate needs a begin and an end.
    pub fn window(mut self, updates: usize) -> Result<Self> {
        if updates < 2 {
            return Err(Error::argument(
                format!("a window of {updates} updates"),
                "Give at least 2: a rate needs a begin and an end",
            ));
        }
        self.window = updates;
        self.reset();
        Ok(self)
    }

    /// What stands between `device` and the rest of a name, "/" unless told otherwise.
    pub fn separator(mut self, separator: &str) -> Self {
        self.separator = separator.into();
        self
    }

    /// Tell where this rank stands now.
    ///
    /// # Errors
    /// When a running total has not grown, there are fewer samples than batches or items than samples, or items are told in
    /// some updates of the window only. Nothing is changed then.
    pub fn update(&mut self, totals: Totals) -> Result<()> {
        self.check(&totals)?;
        if self.updates.len() == self.window {
            self.updates.pop_front();
        }
        self.updates.push_back(totals);
        let count = |count: usize, is_told: bool| match is_told {
            true => (count + 1).min(self.window),
            false => 0,
        };
        self.with_lengths = count(self.with_lengths, totals.lengths.is_some());
        self.with_flops = count(self.with_flops, totals.flops.is_some());
        Ok(())
    }

    fn check(&self, totals: &Totals) -> Result<()> {
        let Totals {
            time,
            batches,
            samples,
            lengths,
            flops,
        } = *totals;
        let last = self.updates.back();
        let grows = |what: &str, is_more: bool, before: String, now: String| match is_more {
            true => Ok(()),
            false => Err(Error::argument(
                format!("throughput: {what} went from {before} to {now}"),
                "Give running totals since the start, which grow with every update",
            )),
        };
        let text = |number: u64| number.to_string();
        if !time.is_finite() {
            return Err(Error::argument(
                format!("throughput: the time is {time}"),
                "Give seconds since the start",
            ));
        }
        if let Some(last) = last {
            grows(
                "time",
                time > last.time,
                last.time.to_string(),
                time.to_string(),
            )?;
            grows(
                "batches",
                batches > last.batches,
                text(last.batches),
                text(batches),
            )?;
            grows(
                "samples",
                samples > last.samples,
                text(last.samples),
                text(samples),
            )?;
            if let (Some(before), Some(now)) = (last.lengths, lengths) {
                grows("lengths", now > before, text(before), text(now))?;
            }
        }
        let enough = |few: &str, fewer: u64, many: &str, more: u64| match fewer < more {
            false => Ok(()),
            true => Err(Error::argument(
                format!("throughput: {fewer} {few} in {more} {many}"),
                "Give totals: a batch has a sample at least, and a sample an item",
            )),
        };
        enough("samples", samples, "batches", batches)?;
        if let Some(lengths) = lengths {
            enough("lengths", lengths, "samples", samples)?;
        }
        if last.is_some_and(|last| last.lengths.is_some() != lengths.is_some()) {
            return Err(Error::argument(
                "throughput: some updates tell lengths, some do not",
                "Tell lengths in every update or in none; reset() begins anew",
            ));
        }
        match flops {
            Some(flops) if !(flops.is_finite() && flops >= 0.0) => Err(Error::argument(
                format!("throughput: {flops} floating-point operations"),
                "Give the operations of one rank since the last update",
            )),
            _ => Ok(()),
        }
    }

    /// The totals, and, when the window is full, rates: of this device, and with several ranks of all, where the name has no
    /// `device/` before it.
    pub fn compute(&self) -> Metrics {
        let mut metrics = Metrics::new();
        let (Some(first), Some(last)) = (self.updates.front(), self.updates.back()) else {
            return metrics;
        };
        metrics.set("time", last.time);
        metrics.set("batches", last.batches as f64);
        metrics.set("samples", last.samples as f64);
        if let Some(lengths) = last.lengths {
            metrics.set("lengths", lengths as f64);
        }
        if self.updates.len() < self.window {
            return metrics;
        }
        let seconds = last.time - first.time; // more than 0: it grew
        let world = self.world_size as f64;
        let mut rate = |name: &str, amount: f64| {
            let a_second = amount / seconds;
            metrics.set(format!("device{}{name}", self.separator), a_second);
            if self.world_size > 1 {
                metrics.set(name, a_second * world);
            }
            a_second
        };
        rate("batches_per_sec", (last.batches - first.batches) as f64);
        rate("samples_per_sec", (last.samples - first.samples) as f64);
        if let (Some(before), Some(now)) = (first.lengths, last.lengths)
            && self.with_lengths == self.window
        {
            rate("items_per_sec", (now - before) as f64);
        }
        if self.with_flops == self.window {
            // What was done before the window's first update is not in its time.
            let after_first = self.updates.iter().skip(1);
            let done: f64 = after_first.filter_map(|totals| totals.flops).sum();
            let a_second = rate("flops_per_sec", done);
            if let Some(peak) = self.available_flops {
                metrics.set(format!("device{}mfu", self.separator), a_second / peak);
            }
        }
        metrics
    }

    /// Forget all updates.
    pub fn reset(&mut self) {
        self.updates.clear();
        (self.with_lengths, self.with_flops) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(time: f64, batches: u64, samples: u64) -> Totals {
        Totals {
            time,
            batches,
            samples,
            ..Totals::default()
        }
    }

    fn names(metrics: &Metrics) -> Vec<String> {
        metrics.iter().map(|(name, _)| name.to_string()).collect()
    }

    // UTIL-10, line 58
    #[test]
    fn line_58_rates_come_when_the_window_is_full_and_move_with_it() {
        let mut throughput = Throughput::new().window(3).unwrap().separator("|");
        for (time, batches, samples) in [(1.0, 1, 2), (3.0, 2, 4)] {
            throughput.update(totals(time, batches, samples)).unwrap();
            assert_eq!(names(&throughput.compute()), ["time", "batches", "samples"]);
        }
        throughput.update(totals(5.0, 4, 10)).unwrap();
        let rates = throughput.compute();
        assert_eq!(rates.get("device|batches_per_sec"), Some(3.0 / 4.0));
        assert_eq!(rates.get("device|samples_per_sec"), Some(2.0));
        assert_eq!(rates.get("batches_per_sec"), None, "one rank");
        throughput.update(totals(6.0, 5, 11)).unwrap(); // the first has left
        assert_eq!(
            throughput.compute().get("device|samples_per_sec"),
            Some(7.0 / 3.0)
        );
        throughput.reset();
        assert!(throughput.compute().is_empty());
        throughput.update(totals(0.5, 1, 1)).unwrap(); // time may begin anew
    }

    // UTIL-10, line 58
    #[test]
    fn several_ranks_have_the_sum_and_operations_are_those_inside_the_window() {
        let throughput = Throughput::new().world_size(4).window(2).unwrap();
        let mut throughput = throughput.available_flops(Some(100.0));
        for step in 1..=2u64 {
            let told = Totals {
                lengths: Some(step * 30),
                flops: Some(step as f64 * 20.0),
                ..totals(step as f64 * 2.0, step, step * 3)
            };
            throughput.update(told).unwrap();
        }
        let rates = throughput.compute();
        for (name, value) in [
            ("lengths", 60.0),
            ("device/batches_per_sec", 0.5),
            ("batches_per_sec", 2.0),
            ("device/samples_per_sec", 1.5),
            ("samples_per_sec", 6.0),
            ("device/items_per_sec", 15.0),
            ("items_per_sec", 60.0),
            ("device/flops_per_sec", 20.0),
            ("flops_per_sec", 80.0),
            ("device/mfu", 0.2),
        ] {
            assert_eq!(rates.get(name), Some(value), "{name}");
        }
    }

    // UTIL-10, line 58
    #[test]
    fn totals_that_make_no_sense_are_refused_and_change_nothing() {
        let mut throughput = Throughput::new().window(2).unwrap();
        let with = |lengths, told: Totals| Totals { lengths, ..told };
        throughput.update(with(Some(9), totals(1.0, 1, 3))).unwrap();
        for (told, word) in [
            (with(Some(10), totals(1.0, 2, 4)), "time went from 1 to 1"),
            (
                with(Some(10), totals(2.0, 1, 4)),
                "batches went from 1 to 1",
            ),
            (
                with(Some(10), totals(2.0, 2, 2)),
                "samples went from 3 to 2",
            ),
            (with(Some(9), totals(2.0, 2, 4)), "lengths went from 9 to 9"),
            (with(Some(10), totals(2.0, 5, 4)), "4 samples in 5 batches"),
            (
                with(Some(10), totals(2.0, 2, 11)),
                "10 lengths in 11 samples",
            ),
            (totals(2.0, 2, 4), "some updates tell lengths"),
            (with(Some(10), totals(f64::NAN, 2, 4)), "the time is NaN"),
            (
                Totals {
                    flops: Some(-1.0),
                    ..with(Some(10), totals(2.0, 2, 4))
                },
                "-1 floating-point",
            ),
        ] {
            let error = throughput.update(told).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        throughput
            .update(with(Some(10), totals(2.0, 2, 4)))
            .unwrap();
        assert_eq!(throughput.compute().get("device/items_per_sec"), Some(1.0));
        assert!(Throughput::new().window(1).is_err());
    }
}
