//! `fabric doctor` starts ranks here and lets them show that they work: every collective on every wire, a rank that dies, and
//! how fast it all is.

mod checks;
mod findings;
mod rank;
mod speeds;

use std::{io::IsTerminal, path::Path};

use clap::ValueEnum;
use fabric::{
    Error, Result,
    engine::shard::plan::several,
    launch::{Job, Program, RankFailed, supervise},
};

use crate::print;
use findings::{Finding, Findings, Status, style};
use rank::{Note, notes};
pub(crate) use rank::{RankArgs, rank};

/// Start ranks on this machine, and see whether they can work together, on every wire, and how fast
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fabric doctor
  fabric doctor --devices 8 --wire shm
  fabric doctor --quick --json > doctor.json      # a few seconds, for CI

Every collective's result is checked on every wire (shared memory, Unix sockets, TCP over loopback), for f32, bf16 and i64;
then a rank is killed on purpose, and must be noticed and named; then speeds are measured, beside what copying memory
takes here. The exit status is 1 when anything fails. Colours are for terminals only, and not with NO_COLOR.")]
pub(crate) struct DoctorArgs {
    /// Ranks
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=64))]
    devices: u8,
    /// The wires to try
    #[arg(long, value_enum, default_value_t = WireChoice::All)]
    wire: WireChoice,
    /// Short vectors and few repetitions: right or wrong, but not how fast
    #[arg(long)]
    quick: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WireChoice {
    All,
    Shm,
    Unix,
    Tcp,
}

/// How long a collective may take before it counts as stuck, in seconds.
const PATIENCE_S: &str = "10";

pub(crate) fn doctor(args: &DoctorArgs) -> Result<()> {
    let wires: &[&str] = match args.wire {
        WireChoice::All => &["shm", "unix", "tcp"],
        WireChoice::Shm => &["shm"],
        WireChoice::Unix => &["unix"],
        WireChoice::Tcp => &["tcp"],
    };
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let show = Show {
        is_silent: args.json,
        has_colors: std::io::stdout().is_terminal() && !no_color,
    };
    let room = tempfile::tempdir()?;
    let mut findings = Findings::new(usize::from(args.devices));
    show.all(&findings.checks)?;
    findings.copy_bytes_per_s = speeds::copy_bytes_per_s(args.quick);
    for wire in wires {
        let file = room.path().join(wire);
        let told = start(args, wire, &file, false);
        let found = of_wire(wire, told.as_ref().err(), notes(&file), &mut findings);
        show.all(&found)?;
        findings.checks.extend(found);
    }
    // On whichever wire works.
    let works = |wire: &&&str| {
        let mut failed = findings
            .checks
            .iter()
            .filter(|found| found.status == Status::Fail);
        !failed.any(|found| found.wire == **wire)
    };
    let wire = wires.iter().find(works).unwrap_or(&wires[0]);
    let file = room.path().join("lost");
    let told = start(args, wire, &file, true);
    let found = lost(wire, told.err(), notes(&file));
    show.all(std::slice::from_ref(&found))?;
    findings.checks.push(found);

    match args.json {
        true => print((serde_json::to_string_pretty(&findings)? + "\n").as_bytes())?,
        false => print(findings.table().as_bytes())?,
    }
    let failed = findings.failed();
    match failed {
        0 => Ok(()),
        _ => Err(Error::new(format!(
            "{failed} of {} failed; fabric env says what this machine is",
            several(findings.checks.len(), "check")
        ))),
    }
}

/// Run a job of this program's own ranks, as `fabric.launch` would.
fn start(args: &DoctorArgs, wire: &str, file: &Path, loses: bool) -> Result<()> {
    let mut words = vec!["doctor-rank".into(), "--notes".into(), file.into()];
    words.extend(args.quick.then(|| "--quick".into()));
    words.extend(loses.then(|| "--lose-one".into()));
    // What the user's jobs are told is not for these.
    let variables = [
        ("FABRIC_ACCELERATOR", "cpu".to_string()),
        ("FABRIC_STRATEGY", "ddp".into()),
        ("FABRIC_DEVICES", args.devices.to_string()),
        ("FABRIC_NUM_NODES", "1".into()),
        ("FABRIC_PRECISION", "32-true".into()),
        ("FABRIC_WIRE", wire.into()),
        ("FABRIC_TIMEOUT_S", PATIENCE_S.into()),
    ];
    supervise(Job {
        program: Program {
            args: words,
            ..Program::this()
        },
        variables: variables
            .map(|(name, value)| (name.into(), value.into()))
            .into(),
        ..Job::new(usize::from(args.devices))
    })
}

/// What the ranks of one wire have found, and where they stopped.
fn of_wire(
    wire: &'static str,
    failure: Option<&Error>,
    notes: Vec<Note>,
    findings: &mut Findings,
) -> Vec<Finding> {
    let mut due: Vec<_> = rank::parts().collect();
    let mut found = Vec::new();
    for note in notes {
        match note {
            Note::Check { name, what, wrong } => {
                due.retain(|known| *known != name);
                found.push(match wrong {
                    None => Finding::pass(wire, name, what),
                    Some(wrong) => Finding::fail(wire, name, wrong, RESULTS.into()),
                });
            }
            Note::Speed(mut speed) => {
                speed.wire = wire;
                findings.speeds.push(speed);
            }
            Note::Lost { .. } => {}
        }
    }
    let Some(error) = failure else { return found };
    if let Some((name, rest)) = due.split_first() {
        let what = match rest {
            [] => error.to_string(),
            rest => format!(
                "{error} ({} not tried)",
                several(rest.len(), "further check")
            ),
        };
        let hint = findings.hint(wire);
        found.push(Finding::fail(wire, name.to_string(), what, hint));
    }
    found
}

const RESULTS: &str = "A wrong result is a mistake in Fabric, or broken memory: please report it, with what fabric env says";

/// Rank 1 was killed on purpose.
fn lost(wire: &'static str, failure: Option<Error>, notes: Vec<Note>) -> Finding {
    let name = "a lost rank is noticed".to_string();
    let seen = notes.into_iter().find_map(|note| match note {
        Note::Lost { text, ms } => Some((text, ms)),
        _ => None,
    });
    let hint =
        "Ranks must be this user's processes, which its supervisor may watch (pidfd_open, SIGTERM)";
    let wrong = |what: String| Finding::fail(wire, name.clone(), what, hint.into());
    let Some(failure) = failure else {
        return wrong("rank 1 was killed, and the supervisor says that all is well".into());
    };
    let named = failure.downcast_ref::<RankFailed>().map(RankFailed::rank);
    match (named, seen) {
        (Some(1), Some((text, ms))) if text.contains("rank 1") => {
            let what = format!("the supervisor names it, and rank 0 after {ms:.1} ms");
            Finding::pass(wire, name, what)
        }
        (Some(1), Some((text, _))) => wrong(format!("rank 0 does not name rank 1: {text}")),
        (Some(1), None) => wrong("rank 0 has not noticed".into()),
        _ => wrong(format!(
            "rank 1 was killed, and the supervisor says: {failure}"
        )),
    }
}

/// Where findings are shown as they come.
struct Show {
    is_silent: bool,
    has_colors: bool,
}

impl Show {
    fn all(&self, findings: &[Finding]) -> Result<()> {
        if self.is_silent {
            return Ok(());
        }
        let lines = findings
            .iter()
            .map(|finding| style(finding, self.has_colors));
        print(lines.collect::<String>().as_bytes())
    }
}
