//! What was found, as JSON: nccl-tests' object for each table, in a list.

use std::{
    fs, io,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::{args::Args, measure::Spread, model::Constants};

/// The file.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Of this program.
    pub version: String,
    /// Seconds since 1970.
    pub start_time: u64,
    /// The command line.
    pub args: Vec<String>,
    /// A table for each collective, number of ranks, and wire.
    pub tables: Vec<Table>,
}

/// One table.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Table {
    /// Its name in nccl-tests.
    pub collective: String,
    /// The wire that was taken.
    pub wire: String,
    /// The flags.
    pub config: Config,
    /// The ranks.
    pub devices: Vec<Device>,
    /// The table of algorithms of this machine, if it has one.
    #[serde(default)]
    pub tuning: Option<String>,
    /// What the model's times are made of.
    #[serde(default)]
    pub model: Option<Constants>,
    /// The rows.
    pub results: Vec<Row>,
    /// Wrong elements.
    pub out_of_bounds: OutOfBounds,
    /// Bytes written outside of outputs.
    pub guards: u64,
    /// The mean of all bus bandwidths.
    pub average_bus_bandwidth: Average,
}

/// The flags that explain the rows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Config {
    /// Ranks.
    pub ranks: usize,
    /// Whether they are threads.
    pub threads: bool,
    /// `-b`.
    pub minimum_bytes: usize,
    /// `-e`.
    pub maximum_bytes: usize,
    /// `-f`.
    pub step_factor: Option<usize>,
    /// `-i`.
    pub step_bytes: usize,
    /// `-w`.
    pub warmup_iters: usize,
    /// `--iters`.
    pub iterations: Option<usize>,
    /// `-m`.
    pub aggregated_iterations: usize,
    /// `-c`.
    pub validation: usize,
    /// `-z`.
    pub blocking: u8,
    /// `--dirty`.
    pub dirty: bool,
    /// `--private`.
    pub private: bool,
    /// `--pin`.
    pub pin: bool,
    /// `-u`.
    pub unalign: usize,
    /// `-C`.
    #[serde(default)]
    pub report_cputime: u8,
    /// `--security`.
    #[serde(default)]
    pub security: Option<String>,
}

impl Config {
    /// The flags of `args` in a world of `ranks`.
    pub fn new(args: &Args, ranks: usize) -> Self {
        Self {
            ranks,
            threads: args.threads,
            minimum_bytes: args.minbytes,
            maximum_bytes: args.maxbytes,
            step_factor: args.stepfactor,
            step_bytes: args.stepbytes,
            warmup_iters: args.warmup_iters,
            iterations: args.iters,
            aggregated_iterations: args.agg_iters,
            validation: args.check,
            blocking: args.blocking,
            dirty: args.dirty,
            private: args.private,
            pin: args.pin,
            unalign: args.unalign,
            report_cputime: args.report_cputime,
            security: args.security.map(|security| security.name().into()),
        }
    }
}

/// A rank.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Device {
    /// Its number.
    pub rank: usize,
    /// Its process.
    pub pid: u32,
    /// Its machine.
    pub hostname: String,
    /// Its number on the machine.
    pub device: usize,
    /// Its processor.
    pub device_info: String,
}

/// A row.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Row {
    /// Bytes.
    pub size: usize,
    /// Elements.
    pub count: usize,
    /// Their type.
    #[serde(rename = "type")]
    pub dtype: String,
    /// The reduction.
    pub redop: String,
    /// The root, or -1.
    pub root: i64,
    /// Input and output apart.
    pub out_of_place: Option<Half>,
    /// Input and output in one.
    pub in_place: Option<Half>,
    /// The limit in microseconds.
    pub limit: Option<f64>,
    /// The model's time in microseconds.
    #[serde(default)]
    pub model: Option<f64>,
}

/// Half of a row.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Half {
    /// Microseconds.
    pub time: f64,
    /// GB/s.
    pub alg_bw: f64,
    /// GB/s.
    pub bus_bw: f64,
    /// Wrong elements, where it was checked.
    pub nwrong: Option<u64>,
    /// Over iterations, in seconds.
    pub spread: Option<Spread>,
    /// How many.
    pub iterations: usize,
    /// Microseconds back to back, where it was measured beside.
    #[serde(default)]
    pub pipelined: Option<f64>,
}

/// The verdict on values.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct OutOfBounds {
    /// Wrong elements in all rows.
    pub count: u64,
    /// None.
    pub okay: bool,
}

/// The mean.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Average {
    /// GB/s.
    pub bandwidth: f64,
}

impl Table {
    /// Sum up the rows; `guards` bytes were written outside.
    pub fn conclude(&mut self, guards: u64) {
        let halves = self
            .results
            .iter()
            .flat_map(|row| [&row.out_of_place, &row.in_place]);
        let halves = halves.flatten().collect::<Vec<_>>();
        let count = halves.iter().filter_map(|half| half.nwrong).sum();
        let bandwidth = halves.iter().map(|half| half.bus_bw).sum::<f64>();
        self.average_bus_bandwidth.bandwidth = bandwidth / halves.len().max(1) as f64;
        self.guards = guards;
        self.out_of_bounds = OutOfBounds {
            count,
            okay: count == 0,
        };
    }
}

impl Report {
    /// Without tables.
    pub fn new() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            start_time: since.map_or(0, |since| since.as_secs()),
            args: std::env::args().collect(),
            tables: Vec::new(),
        }
    }

    /// Read a file.
    ///
    /// # Errors
    /// When there is none, or it is no report.
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    /// Write a file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        fs::write(path, serde_json::to_vec_pretty(self)?)
    }
}

/// The machine's name.
pub fn hostname() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    text.trim().to_owned()
}

/// The processor's name.
pub fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    line.map_or("processor", |line| {
        line.trim_start_matches([' ', '\t', ':'])
    })
    .to_owned()
}
