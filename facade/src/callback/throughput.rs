//! A callback that logs how fast training goes.

use std::time::Duration;

use fabric_engine::clock::Clock;

use super::{Callback, Metrics, Moment};
use crate::{
    Fabric, Result,
    throughput::{Throughput, Totals},
};

/// Keeps a [`Throughput`] on rank 0 and logs its rates. As a callback it counts by itself: the loop's batches, samples and
/// items ([`super::Progress`]), and the time that is not validation's. A program without callbacks calls
/// [`ThroughputMonitor::update`] and [`ThroughputMonitor::compute_and_log`].
///
/// ```
/// use fabric::{Fabric, callback::ThroughputMonitor, throughput::{Throughput, Totals, available_flops}};
/// use fabric::engine::kernels::Dtype;
///
/// let peak = available_flops("NVIDIA H200", Dtype::BF16);
/// let throughput = Throughput::new().available_flops(peak).window(2)?;
/// let mut monitor = ThroughputMonitor::new(throughput).flops_per_batch(1e12);
/// Fabric::builder().build()?.launch(|fabric| {
///     for batches in 1..=2u64 {
///         let totals = Totals { time: batches as f64, batches, samples: batches * 8, ..Totals::default() };
///         monitor.update(fabric, totals)?;
///     }
///     let rates = monitor.compute_and_log(fabric, None)?;
///     assert_eq!(rates.get("device/samples_per_sec"), Some(8.0));
///     Ok(())
/// })?;
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ThroughputMonitor {
    throughput: Throughput,
    flops_per_batch: Option<f64>,
    every: u64,
    step: u64, // of the next log without one
    clock: Clock,
    pause: Option<Duration>, // since when
    paused: Duration,
    batches: u64, // at the last update
}

impl ThroughputMonitor {
    /// Log every 10 batches. The world's size is Fabric's.
    pub fn new(throughput: Throughput) -> Self {
        Self {
            throughput,
            flops_per_batch: None,
            every: 10,
            step: 0,
            clock: Clock::machine(),
            pause: None,
            paused: Duration::ZERO,
            batches: 0,
        }
    }

    /// Tell how many floating-point operations a batch of one rank takes ([`crate::throughput::transformer_flops`]).
    pub fn flops_per_batch(mut self, flops: f64) -> Self {
        self.flops_per_batch = Some(flops);
        self
    }

    /// Log after every so many batches.
    pub fn every(mut self, batches: u64) -> Self {
        self.every = batches.max(1);
        self
    }

    /// Take the time from this clock.
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Tell where this rank stands; nothing on other ranks than 0.
    ///
    /// # Errors
    /// As [`Throughput::update`].
    pub fn update(&mut self, fabric: &Fabric, totals: Totals) -> Result<()> {
        if !fabric.is_global_zero() {
            return Ok(());
        }
        let batches = totals.batches.saturating_sub(self.batches) as f64;
        let flops = self.flops_per_batch.map(|flops| flops * batches);
        let flops = totals.flops.or(flops);
        self.throughput.update(Totals { flops, ..totals })?;
        self.batches = totals.batches;
        Ok(())
    }

    /// The rates; none on other ranks than 0.
    pub fn compute(&self, fabric: &Fabric) -> Metrics {
        match fabric.is_global_zero() {
            true => {
                let throughput = self.throughput.clone();
                throughput.world_size(fabric.world_size()).compute()
            }
            false => Metrics::new(),
        }
    }

    /// Log the rates under `step`, or under the number after the last, and return them.
    ///
    /// # Errors
    /// When a logger cannot write.
    pub fn compute_and_log(&mut self, fabric: &Fabric, step: Option<u64>) -> Result<Metrics> {
        let step = step.unwrap_or(self.step);
        self.step = step + 1;
        let rates = self.compute(fabric);
        let named: Vec<_> = rates.iter().collect();
        if !named.is_empty() {
            fabric.log_dict(&named, step)?;
        }
        Ok(rates)
    }

    fn begin(&mut self) {
        (self.pause, self.paused) = (None, self.clock.now());
        self.throughput.reset();
    }
}

impl Callback for ThroughputMonitor {
    fn on_train_start(&mut self, _: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        self.batches = moment.progress.batches; // a run that goes on
        self.begin();
        Ok(())
    }

    fn on_validation_start(&mut self, _: &Fabric, _: &mut Moment<'_>) -> Result<()> {
        self.pause = Some(self.clock.now());
        Ok(())
    }

    fn on_validation_end(&mut self, _: &Fabric, _: &mut Moment<'_>) -> Result<()> {
        if let Some(since) = self.pause.take() {
            self.paused += self.clock.now().saturating_sub(since);
        }
        Ok(())
    }

    fn on_train_batch_end(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        let progress = moment.progress;
        let totals = Totals {
            time: self.clock.now().saturating_sub(self.paused).as_secs_f64(),
            batches: progress.batches,
            samples: progress.samples.max(progress.batches), // a loop may not count them
            lengths: progress.items,
            flops: None,
        };
        self.update(fabric, totals)?;
        if progress.batches.is_multiple_of(self.every) {
            self.compute_and_log(fabric, Some(progress.steps))?;
        }
        Ok(())
    }

    fn twin(&self) -> Option<Box<dyn Callback>> {
        Some(Box::new(self.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        callback::{Hook, LoopState},
        logger::CsvLogger,
    };

    // UTIL-11, line 58
    #[test]
    fn a_loop_is_measured_without_its_validation() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.csv");
        let clock = Clock::manual();
        let throughput = Throughput::new()
            .window(3)
            .unwrap()
            .available_flops(Some(100.0));
        let monitor = ThroughputMonitor::new(throughput)
            .flops_per_batch(20.0)
            .every(4);
        let builder = Fabric::builder().devices(1).logger(CsvLogger::at(&path));
        let fabric = builder
            .callback(monitor.clock(clock.clone()))
            .build()
            .unwrap();
        let second = |clock: &Clock| clock.advance_to(clock.now() + Duration::from_secs(1));
        let outcome = fabric.launch(|fabric| {
            let mut state = LoopState::default();
            second(&clock);
            fabric.notify(Hook::TrainStart, &mut state.moment())?;
            for batch in 0..4 {
                second(&clock);
                state.progress.batches += 1;
                state.progress.samples += 16;
                state.progress.items = Some(state.progress.samples * 2);
                state.progress.steps = batch + 100;
                fabric.notify(Hook::TrainBatchEnd, &mut state.moment())?;
                fabric.notify(Hook::ValidationStart, &mut state.moment())?;
                (0..50).for_each(|_| second(&clock));
                fabric.notify(Hook::ValidationEnd, &mut state.moment())?;
            }
            fabric.with_callback(|monitor: &mut ThroughputMonitor| Ok(monitor.compute(fabric)))
        });
        let rates = outcome.unwrap().flatten().unwrap();
        for (name, value) in [
            ("time", 4.0),
            ("device/batches_per_sec", 1.0),
            ("device/samples_per_sec", 16.0),
            ("device/items_per_sec", 32.0),
            ("device/flops_per_sec", 20.0),
            ("device/mfu", 0.2),
        ] {
            assert_eq!(rates.get(name), Some(value), "{name}");
        }
        let text = std::fs::read_to_string(path).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert!(text.lines().nth(1).unwrap().starts_with("103,"), "{text}");
    }

    // UTIL-11, line 58
    #[test]
    fn steps_count_on_where_none_are_given() {
        let fabric = Fabric::builder().devices(1).build().unwrap();
        let mut monitor = ThroughputMonitor::new(Throughput::new());
        for (given, next) in [(None, 1), (Some(5), 6), (None, 7)] {
            monitor.compute_and_log(&fabric, given).unwrap();
            assert_eq!(monitor.step, next);
        }
    }
}
