//! A callback that logs what this process takes of its machine.

use std::fs;

use super::{Callback, Metrics, Moment};
use crate::{Fabric, Result};

const TICKS_PER_SECOND: f64 = 100.0; // USER_HZ, what Linux tells programs on every machine of today

/// Logs, every so many batches, rank 0's memory and processor time, as Linux tells them: `host/rss_bytes`,
/// `host/peak_rss_bytes`, `host/cpu_seconds`. Nothing on other systems.
#[derive(Clone, Debug)]
pub struct DeviceStatistics {
    every: u64,
}

impl DeviceStatistics {
    /// After every `every`th batch.
    pub fn new(every: u64) -> Self {
        let every = every.max(1);
        Self { every }
    }

    /// The numbers now.
    pub fn numbers() -> Metrics {
        let mut metrics = Metrics::new();
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        for (key, name) in [
            ("VmRSS:", "host/rss_bytes"),
            ("VmHWM:", "host/peak_rss_bytes"),
        ] {
            if let Some(bytes) = kibibytes(&status, key) {
                metrics.set(name, bytes * 1024.0);
            }
        }
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        if let Some(ticks) = ticks(&stat) {
            metrics.set("host/cpu_seconds", ticks / TICKS_PER_SECOND);
        }
        metrics
    }
}

/// "VmRSS:     1234 kB"
fn kibibytes(status: &str, key: &str) -> Option<f64> {
    let line = status.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// User's and system's, fields 14 and 15; the second field is a name in parentheses, which may hold spaces.
fn ticks(stat: &str) -> Option<f64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<f64>().ok();
    Some(next()? + next()?)
}

impl Callback for DeviceStatistics {
    fn on_train_batch_end(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        if !moment.progress.batches.is_multiple_of(self.every) {
            return Ok(());
        }
        let numbers = Self::numbers();
        let named: Vec<_> = numbers.iter().collect();
        match named.is_empty() {
            true => Ok(()),
            false => fabric.log_dict(&named, moment.progress.steps),
        }
    }

    fn twin(&self) -> Option<Box<dyn Callback>> {
        Some(Box::new(self.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_tells_of_this_process() {
        let stat = "7 (a (b) c) R 1 2 3 4 5 6 7 8 9 10 250 50 0 0";
        assert_eq!(ticks(stat), Some(300.0));
        assert_eq!(
            kibibytes("Name:\tx\nVmRSS:\t  12 kB\n", "VmRSS:"),
            Some(12.0)
        );
        assert_eq!((ticks("odd"), kibibytes("", "VmRSS:")), (None, None));
        if cfg!(target_os = "linux") {
            let numbers = DeviceStatistics::numbers();
            let rss = numbers.get("host/rss_bytes").unwrap();
            assert!(rss > 1e5 && numbers.get("host/peak_rss_bytes").unwrap() >= rss);
            assert!(numbers.get("host/cpu_seconds").unwrap() >= 0.0);
        }
    }
}
