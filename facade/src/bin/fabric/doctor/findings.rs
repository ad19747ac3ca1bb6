//! What the doctor has found: lines that pass or fail, and a table of speeds.

use serde::{Deserialize, Serialize};

const MIB: u64 = 1 << 20;

/// Everything.
#[derive(Debug, Serialize)]
pub(super) struct Findings {
    version: &'static str,
    devices: usize,
    cores: usize,
    /// How fast this machine copies memory, on one core, counted in bytes that arrive.
    pub(super) copy_bytes_per_s: f64,
    pub(super) checks: Vec<Finding>,
    pub(super) speeds: Vec<Speed>,
}

/// One line.
#[derive(Debug, Serialize)]
pub(super) struct Finding {
    pub(super) status: Status,
    pub(super) wire: &'static str,
    name: String,
    what: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    hint: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Status {
    Pass,
    Fail,
    Note,
}

/// How long one operation takes: the median on the slowest rank.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Speed {
    #[serde(skip_deserializing)]
    pub(super) wire: &'static str,
    pub(super) operation: String,
    pub(super) bytes: u64,
    pub(super) seconds: f64,
    /// Bytes of a rank's vector, by time; nothing where latency is what counts.
    pub(super) bytes_per_s: Option<f64>,
    /// What each rank's link carries, as nccl-tests counts it: 2 (n - 1) / n of it for an all_reduce.
    pub(super) bus_bytes_per_s: Option<f64>,
}

impl Finding {
    pub(super) fn pass(wire: &'static str, name: String, what: String) -> Self {
        let (status, hint) = (Status::Pass, String::new());
        Self {
            status,
            wire,
            name,
            what,
            hint,
        }
    }

    pub(super) fn fail(wire: &'static str, name: String, what: String, hint: String) -> Self {
        let status = Status::Fail;
        Self {
            status,
            wire,
            name,
            what,
            hint,
        }
    }
}

impl Findings {
    pub(super) fn new(devices: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut checks = Vec::new();
        if devices > cores {
            checks.push(Finding {
                status: Status::Note,
                wire: "",
                name: "cores".into(),
                what: format!("{devices} ranks share {cores} cores: right, but slow"),
                hint: String::new(),
            });
        }
        Self {
            version: env!("CARGO_PKG_VERSION"),
            devices,
            cores,
            copy_bytes_per_s: 0.0,
            checks,
            speeds: Vec::new(),
        }
    }

    /// What to do when ranks do not come to work on a wire.
    pub(super) fn hint(&self, wire: &str) -> String {
        let mut hint = match wire {
            "shm" => {
                "Ranks share memory by sealed memfds of up to 16 GiB of address space each, of which only what is used counts: see \
                 ulimit -v and -f, and whether the container allows memfd_create. FABRIC_WIRE=unix does without"
            }
            "unix" => {
                "See ulimit -n, and that the container lets its processes connect by Unix sockets. FABRIC_WIRE=tcp does \
                 without"
            }
            _ => "See that loopback is up (ip address show lo), that no firewall drops 127.0.0.1, and ulimit -n",
        }
        .to_string();
        if self.devices > self.cores {
            hint += &format!(
                ". {} ranks on {} cores may also just be too slow: ask for fewer --devices",
                self.devices, self.cores
            );
        }
        hint
    }

    pub(super) fn failed(&self) -> usize {
        let failed = self.checks.iter();
        failed.filter(|found| found.status == Status::Fail).count()
    }

    /// The speeds, for people.
    pub(super) fn table(&self) -> String {
        let rate =
            |rate: Option<f64>| rate.map_or("-".into(), |rate| format!("{}/s", decimal(rate)));
        let head = ["wire", "operation", "bytes", "time", "bytes/s", "busbw"].map(String::from);
        let rows = self.speeds.iter().map(|speed| {
            let bytes = match speed.bytes {
                0 => "-".into(),
                bytes if bytes % MIB == 0 => format!("{} MiB", bytes / MIB),
                bytes => format!("{bytes} B"),
            };
            [
                speed.wire.into(),
                speed.operation.clone(),
                bytes,
                duration(speed.seconds),
                rate(speed.bytes_per_s),
                rate(speed.bus_bytes_per_s),
            ]
        });
        let mut text = String::from("\n");
        for [wire, operation, bytes, time, speed, bus] in std::iter::once(head).chain(rows) {
            let line =
                format!("{wire:5} {operation:11} {bytes:>9} {time:>10} {speed:>11} {bus:>11}\n");
            text += &line;
        }
        let copy = rate(Some(self.copy_bytes_per_s));
        text + &format!("memory is copied at {copy} on one core here\n")
    }
}

/// Rates in powers of 1000, as networks' are.
fn decimal(rate: f64) -> String {
    match rate {
        rate if rate >= 1e9 => format!("{:.2} GB", rate / 1e9),
        rate => format!("{:.1} MB", rate / 1e6),
    }
}

fn duration(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 1e-3 => format!("{:.2} us", seconds * 1e6),
        seconds => format!("{:.2} ms", seconds * 1e3),
    }
}

/// A finding as a line, with what to do below it.
pub(super) fn style(finding: &Finding, has_colors: bool) -> String {
    let (word, color) = match finding.status {
        Status::Pass => ("PASS", 32),
        Status::Fail => ("FAIL", 31),
        Status::Note => ("NOTE", 33),
    };
    let word = match has_colors {
        true => format!("\x1b[{color}m{word}\x1b[0m"),
        false => word.into(),
    };
    let Finding {
        wire, name, what, ..
    } = finding;
    let mut line = format!("{word}  {wire:5} {name:23} {what}\n");
    if !finding.hint.is_empty() {
        line += &format!("      {}\n", finding.hint);
    }
    line
}
