//! The collectives' benchmark: what the program `coll` does.
//!
//! ```text
//! args ──> stage (ranks, wires) ──> table rows: case (memory, call) ──> measure (time), check (exact values, guards)
//!                              ├──> sweep (check only)                   └──> table, report (JSON), plot (SVG)
//!                              └──> tune (a table of algorithms)
//! ```

pub mod args;
pub mod case;
pub mod check;
pub mod collective;
pub mod inputs;
pub mod measure;
pub mod model;
pub mod plot;
mod reals;
pub mod redop;
pub mod report;
pub mod stage;
pub mod sweep;
pub mod table;
pub mod tune;
mod words;

use fabric_engine::{
    Result,
    clock::Clock,
    comm::host::{Host, tuning_path},
    kernels::Dtype,
};

use args::Args;
use case::{Buffers, Case, Memory};
use check::Wrong;
use collective::{Collective, Place};
use measure::Bench;
use model::Model;
use redop::Redop;
use report::{Config, Device, Half, Report, Row, Table};
use stage::Stage;

/// Run what the command line asks for.
///
/// # Errors
/// When a rank fails, and when anything was wrong.
pub fn run(args: &Args) -> fabric::Result<()> {
    stage::run(args, |stage| {
        if args.sweep {
            return sweep::run(stage, args);
        }
        if args.tune {
            return tune::run(stage, args);
        }
        rank(stage, args)
    })
}

/// One rank's whole life.
fn rank(stage: &Stage, args: &Args) -> fabric::Result<()> {
    let earlier = args.ranks.iter().position(|ranks| *ranks == stage.ranks()) > Some(0);
    let mut report = match (&args.output_file, earlier) {
        (Some(path), true) => Report::read(path)?,
        _ => Report::new(),
    };
    let mut wrong = Wrong::default();
    for wire in &args.wire {
        let mut host = stage.connect(wire, args)?;
        let model = match args.model {
            true => Model::measure(stage, &mut host, args)?,
            false => None,
        };
        let mut cycle = 0;
        while args.run_cycles == 0 || cycle < args.run_cycles {
            for collective in args.collectives.iter() {
                let (table, found) = measured(stage, &mut host, args, model.as_ref(), *collective)?;
                wrong += found;
                report.tables.extend(table);
            }
            cycle += 1;
        }
    }
    if stage.is_first() {
        if let Some(path) = &args.output_file {
            report.write(path)?;
        }
        if let Some(path) = &args.plot {
            plot::write(path, &plot::lines(&report))?;
        }
    }
    stage.all(&[])?; // the first failure ends all ranks, and this one may still be writing
    verdict(wrong)
}

/// An error that says how much was wrong, if anything was.
fn verdict(wrong: Wrong) -> fabric::Result<()> {
    if wrong.is_none() {
        return Ok(());
    }
    Err(fabric::Error::new(format!(
        "{} wrong elements, and {} bytes written outside of outputs",
        wrong.elements, wrong.outside
    )))
}

/// One collective's table; none when the engine has no such collective.
fn measured(
    stage: &Stage,
    host: &mut Host,
    args: &Args,
    model: Option<&Model>,
    collective: Collective,
) -> Result<(Option<Table>, Wrong)> {
    let mut table = Table {
        collective: collective.name().into(),
        wire: host.wire().into(),
        config: Config::new(args, stage.ranks()),
        devices: devices(stage)?,
        tuning: tuning_path()
            .filter(|path| path.exists())
            .map(|path| path.display().to_string()),
        model: model.map(|model| model.constants),
        ..Table::default()
    };
    let cases = cases(args, collective, stage.ranks());
    if cases.is_empty() {
        let (name, ranks) = (collective.name(), stage.ranks());
        if stage.is_first() {
            table::say!("# {name} among {ranks} with these ops and types: nothing to do");
        }
        return Ok((None, Wrong::default()));
    }
    if stage.is_first() {
        table::head(args, &table, stage.ranks());
    }
    let mut wrong = Wrong::default();
    let sizes = match collective {
        Collective::Barrier => vec![0],
        _ => args.sizes(),
    };
    for (op, dtype) in cases {
        let roots = match collective.is_rooted() {
            true => args.roots(stage.ranks()),
            false => vec![0],
        };
        for root in roots {
            let place = place(stage, args, root);
            let counts = sizes.iter();
            let counts = counts.map(|bytes| collective.count(*bytes, dtype.size(), place.ranks));
            let mut counts = counts.collect::<Vec<_>>();
            counts.dedup();
            for count in counts {
                let case = Case {
                    collective,
                    op,
                    dtype,
                    count,
                    place,
                    is_in_place: false,
                };
                wrong += one_row(stage, host, args, model, case, &mut table)?;
            }
        }
    }
    table.conclude(wrong.outside);
    if stage.is_first() {
        table::foot(&table);
    }
    Ok((Some(table), wrong))
}

fn place(stage: &Stage, args: &Args, root: usize) -> Place {
    Place {
        is_uneven: args.uneven,
        rank: stage.rank(),
        ranks: stage.ranks(),
        root,
    }
}

/// The reductions and types that go together, and that the engine has.
fn cases(args: &Args, collective: Collective, ranks: usize) -> Vec<(Option<Redop>, Dtype)> {
    let ops = match collective.reduces() {
        true => args.op.iter().map(|op| Some(*op)).collect(),
        false => vec![None],
    };
    let ops = ops.into_iter().filter(|_| collective.is_possible(ranks));
    let pairs = ops.flat_map(|op| {
        let takes = move |dtype: &Dtype| op.is_none_or(|op| op.takes(*dtype));
        (args.datatype.iter().copied().filter(takes)).map(move |dtype| (op, dtype))
    });
    match collective {
        Collective::Barrier => pairs.take(1).collect(),
        _ => pairs.collect(),
    }
}

/// Measure and check one row, out of place and in place.
fn one_row(
    stage: &Stage,
    host: &mut Host,
    args: &Args,
    model: Option<&Model>,
    case: Case,
    table: &mut Table,
) -> Result<Wrong> {
    let bytes = case.collective.elements(case.count, case.place) * case.dtype.size();
    let mut wrong = Wrong::default();
    let mut halves: [Option<Half>; 2] = [None, None];
    for (half, is_in_place) in halves.iter_mut().zip([false, true]) {
        let case = Case {
            is_in_place,
            ..case
        };
        let wanted = args.place != if is_in_place { "out" } else { "in" };
        if wanted && case.exists() {
            let (found, checked) = one_half(stage, host, args, &case, bytes)?;
            *half = Some(found);
            wrong += checked;
        }
    }
    let mut limit = None;
    let copied = case.collective.limit_bytes(bytes, case.place.ranks);
    if args.limit && copied > 0 {
        let mut bench = bench(stage, host, args);
        limit = Some(bench.copies(copied)?);
    }
    let model = match model {
        Some(model) => Some(stage.largest(&[model.seconds(host, &case)])?[0]).filter(|s| *s > 0.0),
        None => None,
    };
    if stage.is_first() {
        table::row(args, &case, bytes, &halves, [limit, model]);
    }
    let [out_of_place, in_place] = halves;
    table.results.push(Row {
        size: bytes,
        count: case.count,
        dtype: args::type_name(case.dtype).into(),
        redop: case.op.map_or("none", Redop::name).into(),
        root: if case.collective.is_rooted() {
            case.place.root as i64
        } else {
            -1
        },
        out_of_place,
        in_place,
        limit: limit.map(|limit| limit * 1e6),
        model: model.map(|model| model * 1e6),
    });
    Ok(wrong)
}

fn one_half(
    stage: &Stage,
    host: &mut Host,
    args: &Args,
    case: &Case,
    bytes: usize,
) -> Result<(Half, Wrong)> {
    let memory = Memory {
        is_private: args.private,
        unalign: args.unalign,
    };
    let rotated = match args.rotate {
        true => (args.maxbytes / bytes.max(1)).clamp(1, args.iters.unwrap_or(20).max(1)),
        false => 1,
    };
    let sets = rotated.max(args.agg_iters);
    let sets = (0..sets).map(|_| case.buffers(host, memory));
    let mut sets = sets.collect::<Result<Vec<Buffers>>>()?;
    sets.iter_mut().for_each(|set| set.fill(case, 0));
    let times = bench(stage, host, args).times(case, &mut sets, bytes)?;
    let mut wrong = Wrong::default();
    for turn in 0..args.check {
        let seed = 1 + turn as u32;
        let turn = turn % sets.len();
        let set = &mut sets[turn];
        set.fill(case, seed);
        set.run(host)?;
        wrong += set.check(case, seed);
    }
    let everywhere = stage.sum(&[wrong.elements as f64, wrong.outside as f64])?;
    let wrong = Wrong {
        elements: everywhere[0] as u64,
        outside: everywhere[1] as u64,
    };
    let nwrong = (args.check > 0).then_some(wrong.elements);
    Ok((table::half(case, bytes, &times, nwrong), wrong))
}

fn bench<'a>(stage: &'a Stage, host: &'a mut Host, args: &'a Args) -> Bench<'a> {
    Bench {
        stage,
        host,
        args,
        clock: Clock::machine(),
    }
}

/// The ranks, for the head of a table.
fn devices(stage: &Stage) -> Result<Vec<Device>> {
    let pids = stage.all(&[f64::from(std::process::id())])?;
    let device = |(rank, pid): (usize, &Vec<f64>)| Device {
        rank,
        pid: pid[0] as u32,
        hostname: report::hostname(),
        device: rank,
        device_info: report::processor(),
    };
    Ok(pids.iter().enumerate().map(device).collect())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn coll(line: &str) -> fabric::Result<()> {
        let words = std::iter::once("coll").chain(line.split_whitespace());
        run(&Args::parse_from(words))
    }

    /// Goal: the program as a whole. Method: every collective on threads, and what it wrote.
    #[test]
    fn tables_of_several_ranks_and_wires_are_one_report() {
        let folder = tempfile::tempdir().unwrap();
        let (json, svg) = (folder.path().join("a.json"), folder.path().join("a.svg"));
        coll(&format!(
            "all -n 1-3 --threads --wire shm,unix,tcp -b 0 -e 4K -f 8 --iters 2 --limit --model -I -r all -J {} --plot {}",
            json.display(),
            svg.display()
        ))
        .unwrap();
        let report = Report::read(&json).unwrap();
        assert!(report.tables.len() >= 3 * 3 * 5);
        for table in &report.tables {
            assert!(table.out_of_bounds.okay && table.guards == 0);
            assert_eq!(table.devices.len(), table.config.ranks);
            assert!(!table.results.is_empty());
        }
        let svg = std::fs::read_to_string(svg).unwrap();
        assert!(svg.contains("all_reduce sum float, 3 ranks, tcp, in place"));
    }

    #[test]
    fn every_way_to_take_times_checks_too() {
        for way in [
            "-z 1",
            "--dirty",
            "--budget 0.001",
            "-m 3",
            "--rotate",
            "--private -u 1 -N 2",
            "-C 1",
            "--wire unix --security encrypted",
        ] {
            let line =
                "all_reduce,reduce_scatter,broadcast -n 2 --threads -b 4 -e 256K -f 64 --iters 2";
            coll(&format!("{line} {way}")).unwrap();
        }
    }

    #[test]
    fn a_sweep_of_everything_finds_nothing_wrong() {
        coll("all -n 3 --threads --wire shm,tcp -o all -d all --sweep -e 20K").unwrap();
    }

    /// Goal: a table that communicators can use. Method: tune two wires, and read what was written.
    #[test]
    fn a_tuned_table_is_written_and_can_be_read() {
        use fabric_engine::schedule::choose::{Tuning, WireKind};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tuning");
        let flags = "--tune -n 2-3 --threads --wire shm,unix -b 1K -e 16K --budget 0.0001";
        coll(&format!("all_reduce,gather {flags} -J {}", path.display())).unwrap();
        let tuning = Tuning::parse(&std::fs::read_to_string(path).unwrap()).unwrap();
        let rows = |wire, ranks| {
            let is_of = move |row: &&fabric_engine::schedule::choose::Row| {
                row.wire == Some(wire) && row.most_ranks == Some(ranks)
            };
            tuning.rows.iter().filter(is_of).count()
        };
        assert!(rows(WireKind::Shm, 2) >= 2 && rows(WireKind::Shm, 3) >= 2);
        assert!(rows(WireKind::Unix, 2) >= 1 && rows(WireKind::Unix, 3) >= 1);
        assert!(coll("--tune -n 1 --threads").is_err());
    }

    #[test]
    fn what_is_wrong_is_an_error_and_so_is_what_the_engine_has_not() {
        let wrong = Wrong {
            elements: 3,
            outside: 1,
        };
        let text = verdict(wrong).unwrap_err().to_string();
        assert!(text.contains("3 wrong elements") && text.contains("1 bytes"));
        assert!(verdict(Wrong::default()).is_ok());
        let text = coll("all_reduce -n 2 --threads --wire carrier-pigeon").unwrap_err();
        assert!(text.to_string().contains("no such wire"), "{text}");
    }
}
