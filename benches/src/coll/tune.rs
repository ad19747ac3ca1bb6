//! `coll --tune`: times every algorithm of a wire for every collective and size, and writes the table by which this machine's
//! communicators choose (`fabric_engine::comm::host::tuning`). Rows found for a wire, a number of ranks and a collective
//! replace earlier ones; everything else in the file stays, and the shipped rows are below.

use std::{
    fs,
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use fabric_engine::{
    Error,
    comm::host::{Host, POST_BYTES, tuning_path},
    schedule::{
        Algorithm, Kind,
        choose::{Row, Tuning, WireKind},
    },
};

use super::{
    args::Args,
    case::Case,
    collective::{Collective, Place},
    measure::Spread,
    model::{self, Constants},
    stage::Stage,
    table::{fit, say},
};

const WINS: f64 = 0.95; // an algorithm that takes over needs at most so much of the other's time
const ROUNDS: usize = 5; // in which the algorithms take turns
const LINK: &str = "# link "; // begins the lines of constants

/// Tune the wires that `args` names among these ranks.
///
/// # Errors
/// When a rank fails, and when the file cannot be read or written.
pub fn run(stage: &Stage, args: &Args) -> fabric::Result<()> {
    if stage.ranks() == 1 {
        let hint = "Give -n 2 or more, as many ranks as will run";
        return Err(Error::argument("--tune with one rank, which sends nothing", hint).into());
    }
    let path = path(args)?;
    before(&path)?; // what is no table is refused now, not after half a minute
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let unpinned = model::probing(args);
    for wire in &args.wire {
        // Ranks that share memory spin: the scheduler may keep two on one core. Those that wait in the kernel it places well.
        let pin = args.pin || (wire == "shm" && stage.ranks() <= cores);
        let args = &Args {
            pin,
            ..unpinned.clone()
        };
        let mut host = stage.connect_with(wire, args, Tuning::default())?;
        let found = Found {
            wire: WireKind::from_name(host.wire()).unwrap_or(WireKind::Sim),
            ranks: stage.ranks(),
            constants: Constants::measure(stage, &mut host, args)?,
            rows: Vec::new(),
        };
        drop(host);
        let found = measured(stage, args, found)?;
        if stage.is_first() {
            let text = merge(&before(&path)?, &found);
            replace(&path, &text)?;
            let is_new =
                |line: &&str| line.contains(&format!(" {} {} ", found.wire.name(), found.ranks));
            text.lines().filter(is_new).for_each(|line| say!("{line}"));
            say!("# written to {}, above the shipped rows\n#", path.display());
        }
    }
    stage.all(&[])?; // the first failure ends all ranks, and this one may still be writing
    Ok(())
}

fn path(args: &Args) -> Result<PathBuf, Error> {
    let usual = || {
        let hint = "Set FABRIC_TUNING, XDG_CONFIG_HOME or HOME, or give -J a path";
        tuning_path().ok_or_else(|| Error::argument("--tune, but this user has no folder", hint))
    };
    args.output_file.clone().map_or_else(usual, Ok)
}

/// What was found out about a wire.
struct Found {
    wire: WireKind,
    ranks: usize,
    constants: Option<Constants>,
    rows: Vec<Row>,
}

fn measured(stage: &Stage, args: &Args, mut found: Found) -> Result<Found, Error> {
    let wire = found.wire.name();
    if stage.is_first() {
        say!("# {wire}, {} ranks: us a call, isolated", found.ranks);
        say!("#   collective          size  by algorithm");
    }
    for collective in args.collectives.iter() {
        let Some(kind) = collective.kind() else {
            continue;
        };
        let does = |algorithm: &Algorithm| match found.wire {
            WireKind::Shm => algorithm.shares(),
            _ => algorithm.does(kind),
        };
        let algorithms = Algorithm::ALL.into_iter().filter(does).collect::<Vec<_>>();
        if algorithms.len() > 1 {
            let (sizes, times) = cells(stage, args, *collective, wire, &algorithms)?;
            let shipped = Tuning::default();
            let shipped = shipped.choose(&kind, found.ranks, sizes[0], found.wire);
            let first = algorithms.iter().position(|known| *known == shipped);
            for (most_bytes, at) in crossovers(&sizes, &times, first) {
                found.rows.push(Row {
                    kind: Some(kind),
                    wire: Some(found.wire),
                    most_ranks: Some(found.ranks),
                    most_bytes,
                    algorithm: algorithms[at],
                });
            }
        }
    }
    Ok(found)
}

/// Full vectors' bytes, and for each the seconds by algorithm.
type Cells = (Vec<usize>, Vec<Vec<f64>>);

fn cells(
    stage: &Stage,
    args: &Args,
    collective: Collective,
    wire: &str,
    algorithms: &[Algorithm],
) -> Result<Cells, Error> {
    let connect = |algorithm: &Algorithm| {
        let kind = collective.kind().map_or("*", Kind::name);
        let row = format!("{kind} {wire} * * {algorithm}");
        let forced = Tuning::parse(&row).expect("an algorithm that does this kind");
        stage.connect_with(wire, args, forced)
    };
    let hosts = algorithms.iter().map(connect);
    let mut hosts = hosts.collect::<Result<Vec<Host>, Error>>()?;
    let sizes = match collective {
        Collective::Barrier => vec![0],
        _ => args.sizes(),
    };
    let (mut bytes, mut times) = (Vec::new(), Vec::new());
    for size in sizes {
        let case = model::case(collective, size, stage);
        if case.count == 0 && collective != Collective::Barrier {
            continue;
        }
        let mut laps = vec![Vec::new(); hosts.len()];
        for _ in 0..ROUNDS {
            for ((host, laps), algorithm) in hosts.iter_mut().zip(&mut laps).zip(algorithms) {
                laps.push(match fits(*algorithm, &case) {
                    true => model::timed(stage, host, args, &case)?,
                    false => f64::INFINITY,
                });
            }
        }
        let laps = laps.into_iter().map(|laps| Spread::of(laps).p50);
        let laps = laps.collect::<Vec<_>>();
        if stage.is_first() {
            let shown = algorithms.iter().zip(&laps);
            let time = |lap: f64| match lap.is_finite() {
                true => fit(lap * 1e6, 8),
                false => "-".into(),
            };
            let shown = shown.map(|(name, lap)| format!("  {name:>8} {:>8}", time(*lap)));
            let name = collective.name();
            say!("{name:>14}  {size:>12}{}", shown.collect::<String>());
        }
        bytes.push(case.full_elems() * case.dtype.size());
        times.push(laps);
    }
    if bytes.is_empty() {
        let hint = "Give -e a size that can be cut among the ranks, like 4M";
        return Err(Error::argument("--tune without a size to measure", hint));
    }
    Ok((bytes, times))
}

/// Whether the algorithm does a case of this length, rather than leave it to another.
fn fits(algorithm: Algorithm, case: &Case) -> bool {
    let first = Place {
        rank: case.place.root, // whose input is the largest
        ..case.place
    };
    let input = case.collective.layout(case.count, first).input * case.dtype.size();
    algorithm != Algorithm::Post || input <= POST_BYTES
}

/// Up to how many bytes which algorithm (`times[size][algorithm]`): one is kept until another wins by 5 %, also in the mean of
/// this size and the next, because single ones are noisy; `first` is the one that there is. Between two sizes the change is in their (geometric) middle.
fn crossovers(
    sizes: &[usize],
    all: &[Vec<f64>],
    first: Option<usize>,
) -> Vec<(Option<usize>, usize)> {
    let fastest = |times: &[f64]| {
        let by_time = |a: &usize, b: &usize| times[*a].total_cmp(&times[*b]);
        (0..times.len()).min_by(by_time).unwrap_or(0)
    };
    let mut kept = first.unwrap_or_else(|| fastest(&all[0]));
    let mut rows = Vec::new();
    for (at, times) in all.iter().enumerate() {
        let best = fastest(times);
        let wins = |times: &[f64]| times[best] / times[kept];
        let next = all.get(at + 1).map_or(wins(times), |next| wins(next));
        if wins(times) < WINS && (wins(times) * next).sqrt() < WINS {
            if at > 0 {
                let middle = (sizes[at - 1] as f64 * sizes[at] as f64).sqrt();
                rows.push((Some(middle as usize), kept));
            }
            kept = best;
        }
    }
    rows.push((None, kept));
    rows
}

/// The file as it is, or nothing.
fn before(path: &Path) -> Result<String, Error> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        Err(error) => return Err(Error::io(0, "read the tuning table", error)),
    };
    let hint = "Remove it, or give -J another path: only a tuning table is written over";
    let what = |error| format!("{} is no tuning table: {error}", path.display());
    Tuning::parse(&text).map_err(|error| Error::argument(what(error), hint))?;
    Ok(text)
}

/// The table's text with what was found.
fn merge(before: &str, found: &Found) -> String {
    let wire = found.wire.name();
    let link = format!("{LINK}{wire} {} ", found.ranks);
    let others = |line: &&str| line.starts_with(LINK) && !line.starts_with(&link);
    let others = before.lines().filter(others).map(str::to_owned);
    let mut links = others.collect::<Vec<_>>();
    if let Some(Constants { alpha, beta, gamma }) = found.constants {
        links.push(format!(
            "{link}alpha {alpha:.3e} s/message beta {beta:.3e} B/s gamma {gamma:.3e} B/s folded"
        ));
    }
    links.sort_unstable();
    let was = Tuning::parse(before).unwrap_or(Tuning { rows: Vec::new() });
    let was = match was.rows.is_empty() {
        true => Tuning::default(),
        false => was,
    };
    let is_replaced = |row: &&Row| {
        row.wire == Some(found.wire)
            && row.most_ranks == Some(found.ranks)
            && (found.rows.iter()).any(|new| new.kind == row.kind)
    };
    let kept = was.rows.iter().filter(|row| !is_replaced(row)).copied();
    let is_measured = |row: &Row| row.kind.and(row.wire).and(row.most_ranks).is_some();
    let (kept, general): (Vec<Row>, Vec<Row>) = kept.partition(is_measured);
    let mut rows = [&found.rows[..], &kept].concat();
    // The first row that fits decides, so that fewer ranks and bytes come before more.
    rows.sort_by_key(|row| {
        let place = |name: &str| Kind::ALL.into_iter().position(|kind| kind.name() == name);
        (
            row.wire.map(WireKind::name),
            row.kind.and_then(|kind| place(kind.name())),
            row.most_ranks,
            row.most_bytes.unwrap_or(usize::MAX),
        )
    });
    rows.extend(general);
    let links = links.iter().map(|link| format!("{link}\n"));
    let links = links.collect::<String>();
    format!(
        "# Which algorithm for what on this machine, by `coll --tune`: kind wire most_ranks most_bytes algorithm\n\
         {links}{}",
        Tuning { rows }.to_text()
    )
}

/// Put `text` there, whole or not at all.
fn replace(path: &Path, text: &str) -> Result<(), Error> {
    let write = || {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}", std::process::id()));
        let mut file = fs::File::create(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|error| Error::io(0, "write the tuning table", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(wire: WireKind, ranks: usize, rows: &str) -> Found {
        let constants = Constants {
            alpha: 1.5e-7,
            beta: 2e10,
            gamma: 9e10,
        };
        Found {
            wire,
            ranks,
            constants: Some(constants),
            rows: Tuning::parse(rows).unwrap().rows,
        }
    }

    #[test]
    fn another_algorithm_takes_over_when_it_wins_by_five_percent() {
        let sizes = [256, 1024, 4096, 16384];
        let rows = |times: &[[f64; 2]], first| {
            let times = times.iter().map(|times| times.to_vec());
            crossovers(&sizes, &times.collect::<Vec<_>>(), first)
        };
        let times = [[1.0, 0.96], [2.0, 1.96], [4.0, 2.0], [8.0, 8.1]];
        assert_eq!(rows(&times, Some(0)), [(Some(2048), 0), (None, 1)]);
        assert_eq!(rows(&times[..1], None), [(None, 1)]);
        let noise = [[1.0, 2.0], [2.0, 1.8], [4.0, 8.0], [8.0, 9.0]];
        assert_eq!(rows(&noise, Some(0)), [(None, 0)]);
    }

    #[test]
    fn what_is_found_replaces_what_was_found_before_and_nothing_else() {
        let two = "all_reduce shm 2 32768 post\nall_reduce shm 2 * load\n";
        let text = merge("", &found(WireKind::Shm, 2, two));
        let text = merge(&text, &found(WireKind::Shm, 4, "all_reduce shm 4 * load"));
        let text = merge(&text, &found(WireKind::Tcp, 2, "broadcast tcp 2 * tree"));
        let again = merge(&text, &found(WireKind::Shm, 2, "all_reduce shm 2 * post"));
        let found = "all_reduce shm 2 * post\nall_reduce shm 4 * load\nbroadcast tcp 2 * tree\n";
        let shipped = Tuning::default().to_text();
        let kept = shipped
            .lines()
            .filter(|row| !row.starts_with("all_reduce shm 2 "));
        let mut expected: Vec<&str> = found.lines().chain(kept).collect();
        let table = Tuning::parse(&again).unwrap().to_text();
        let mut rows: Vec<&str> = table.lines().collect();
        assert_eq!(rows[..2], expected[..2], "what is particular stands first");
        rows.sort_unstable();
        expected.sort_unstable();
        assert_eq!(rows, expected);
        assert!(text.contains(two));
        assert_eq!(again.matches(LINK).count(), 3);
        assert!(again.contains("# link shm 2 alpha 1.500e-7 s/message"));
    }

    #[test]
    fn only_a_table_is_written_over_and_only_by_a_whole_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/tuning");
        assert_eq!(before(&path).unwrap(), "");
        replace(&path, "* tcp * * direct\n").unwrap();
        replace(&path, "* tcp * * tree\n").unwrap_or_else(|error| panic!("{error}"));
        assert!(
            before(&path)
                .unwrap_err()
                .to_string()
                .contains("is no tuning table")
        );
        let names = fs::read_dir(folder.path().join("a")).unwrap();
        assert_eq!(names.count(), 1);
    }
}
