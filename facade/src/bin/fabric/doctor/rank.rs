//! The doctor's ranks: they run every check together, and rank 0 notes what came of it in a file, line by line, so that
//! what was found before a failure is known.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use fabric::{Fabric, Result, engine::clock::Clock};
use rustix::process::{Signal, getpid, kill_process};
use serde::{Deserialize, Serialize};

use super::{checks, findings::Speed, speeds};

/// Be a rank of fabric doctor
#[derive(clap::Args)]
pub(crate) struct RankArgs {
    /// Where rank 0 writes what it finds
    #[arg(long)]
    notes: PathBuf,
    #[arg(long)]
    quick: bool,
    /// Kill rank 1, and see what becomes of it
    #[arg(long)]
    lose_one: bool,
}

/// What rank 0 has found.
#[derive(Serialize, Deserialize)]
pub(super) enum Note {
    /// A check, on what, and what was wrong.
    Check {
        name: String,
        what: String,
        wrong: Option<String>,
    },
    Speed(Speed),
    /// What rank 0 heard of the rank that was killed, and after how long.
    Lost {
        text: String,
        ms: f64,
    },
}

/// What is done on every wire, in this order.
pub(super) fn parts() -> impl Iterator<Item = &'static str> {
    let checks = checks::ALL.into_iter().map(|(name, _)| name);
    std::iter::once(MEET).chain(checks).chain([SPEEDS])
}

/// For long vectors, on one wire.
const PATIENCE: Duration = Duration::from_secs(2);

const MEET: &str = "ranks meet";
const SPEEDS: &str = "speeds";

pub(crate) fn rank(args: &RankArgs) -> Result<()> {
    if args.lose_one {
        // It ends badly on purpose: that is not for the terminal.
        rustix::stdio::dup2_stderr(OpenOptions::new().write(true).open("/dev/null")?)?;
    }
    Fabric::builder().build()?.launch(|fabric| {
        let mut book = Book::open(fabric, &args.notes)?;
        match args.lose_one {
            true => lose_one(fabric, &mut book),
            false => examine(fabric, &mut book, args.quick),
        }
    })?;
    Ok(())
}

fn examine(fabric: &Fabric, book: &mut Book, quick: bool) -> Result<()> {
    let wire = fabric.wire().unwrap_or("no wire");
    let what = format!("{} ranks over {wire}", fabric.world_size());
    book.check(fabric, MEET, what, None)?;
    let pace = Pace::new(quick);
    for (name, check) in checks::ALL {
        let lengths: &[usize] = match pace.is_short(fabric)? {
            true => &[1, 1000],
            false => &[1, 1000, 300_001],
        };
        let (what, wrong) = check(fabric, lengths)?;
        book.check(fabric, name, what, wrong)?;
    }
    for speed in speeds::measure(fabric, pace.is_short(fabric)?)? {
        book.note(&Note::Speed(speed))?;
    }
    book.check(fabric, SPEEDS, "measured".into(), None)
}

/// How much time there is: where ranks wait for cores, everything takes longer, and less must do.
struct Pace {
    quick: bool,
    clock: Clock,
    begun: Duration,
}

impl Pace {
    fn new(quick: bool) -> Self {
        let clock = Clock::machine();
        let begun = clock.now();
        Self {
            quick,
            clock,
            begun,
        }
    }

    /// Whether little must do from here on: rank 0's clock decides.
    fn is_short(&self, fabric: &Fabric) -> Result<bool> {
        let late = self.clock.now() - self.begun > PATIENCE;
        fabric.broadcast(self.quick || late, 0)
    }
}

fn lose_one(fabric: &Fabric, book: &mut Book) -> Result<()> {
    let clock = Clock::machine();
    fabric.barrier()?;
    if fabric.global_rank() == 1 {
        kill_process(getpid(), Signal::KILL)?;
    }
    let begun = clock.now();
    let heard = fabric.barrier();
    let ms = (clock.now() - begun).as_secs_f64() * 1e3;
    if let Err(error) = &heard {
        let text = error.to_string();
        book.note(&Note::Lost { text, ms })?;
    }
    heard
}

/// Where rank 0 writes.
struct Book(Option<File>);

impl Book {
    fn open(fabric: &Fabric, path: &Path) -> Result<Self> {
        let file = fabric.is_global_zero().then(|| File::create(path));
        Ok(Self(file.transpose()?))
    }

    fn note(&mut self, note: &Note) -> Result<()> {
        let Some(file) = &mut self.0 else {
            return Ok(());
        };
        let line = serde_json::to_string(note)? + "\n";
        Ok(file.write_all(line.as_bytes())?)
    }

    /// All ranks tell whether something was wrong; the first of them counts.
    fn check(
        &mut self,
        fabric: &Fabric,
        name: &str,
        what: String,
        wrong: Option<String>,
    ) -> Result<()> {
        let all = fabric.all_gather_object(&wrong)?;
        let mut all = all.into_iter().enumerate();
        let wrong = all.find_map(|(rank, wrong)| Some(format!("on rank {rank}: {}", wrong?)));
        let name = name.into();
        self.note(&Note::Check { name, what, wrong })
    }
}

/// What rank 0 has noted, as far as it came.
pub(super) fn notes(path: &Path) -> Vec<Note> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let notes = text
        .lines()
        .map_while(|line| serde_json::from_str(line).ok());
    notes.collect()
}
