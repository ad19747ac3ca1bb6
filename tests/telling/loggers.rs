//! Loggers over ranks: they hear how the job ended, and have every row, whoever ended it.

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

use fabric::{
    Error, Fabric, Result,
    logger::{CsvLogger, JsonlLogger, Logger, RunFolder, Status, TensorBoardLogger, read_records},
};
use rustix::process::Signal;

use super::names_in;
use crate::process::{finish, signal, train};

/// A logger that writes down what it hears.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<String>>>);
impl Logger for Heard {
    fn name(&self) -> &str {
        "heard"
    }
    fn log_metrics(&mut self, metrics: &[(String, f64)], step: u64) -> Result<()> {
        self.0
            .lock()
            .unwrap()
            .push(format!("{step} {}", metrics.len()));
        Ok(())
    }
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
    fn finalize(&mut self, status: Status) -> Result<()> {
        self.0.lock().unwrap().push(status.name().into());
        Ok(())
    }
}

// BUG-07, BUG-23
#[test]
fn loggers_hear_how_the_job_ended_and_have_every_row() {
    type Ending = fn() -> Result<()>;
    let endings: [(Ending, &str); 3] = [
        (|| Ok(()), "success"),
        (|| Err(Error::new("out of data")), "failed"),
        (|| panic!("no luck"), "failed"),
    ];
    for (ending, status) in endings {
        for world in [1, 2] {
            let (folder, heard) = (tempfile::tempdir().unwrap(), Heard::default());
            let run = RunFolder::new(folder.path(), "run");
            let builder = Fabric::builder().devices(world).logger(heard.clone());
            let builder = builder
                .logger(CsvLogger::within(&run))
                .logger(JsonlLogger::within(&run));
            let fabric = builder
                .logger(TensorBoardLogger::within(&run))
                .build()
                .unwrap();
            let body = |fabric: &Fabric| {
                fabric.log_hyperparams(&serde_json::json!({"lr": 0.1}))?;
                fabric.log_dict(&[("a", 0.5), ("b", f64::NAN)], 7)?;
                fabric.barrier()?;
                ending()
            };
            let threads = || fabric.launch_threads(body).map(drop);
            let here = || fabric.launch(body).map(drop);
            let in_place = world == 1;
            let outcome =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match in_place {
                    true => here(),
                    false => threads(),
                }));
            assert_eq!(
                outcome.is_ok_and(|outcome| outcome.is_ok()),
                status == "success"
            );
            assert_eq!(*heard.0.lock().unwrap(), ["7 2", status]);
            let folder = run.path().unwrap();
            let csv = std::fs::read_to_string(folder.join("metrics.csv")).unwrap();
            assert_eq!(csv, "step,a,b\n7,0.5,nan\n");
            let lines = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
            assert_eq!(lines.lines().count(), 3);
            assert!(lines.lines().last().unwrap().contains(status), "{lines}");
            let names = names_in(&folder);
            let events = names
                .iter()
                .find(|name| name.starts_with("events"))
                .unwrap();
            let bytes = std::fs::read(folder.join(events)).unwrap();
            assert_eq!(
                read_records(&bytes).unwrap().len(),
                5,
                "version, metric, settings, row, end"
            );
        }
    }
}

/// What stands in the only run in `folder`: its rows, and how it ended.
fn told(folder: &Path) -> (usize, Option<String>) {
    let text = std::fs::read_to_string(folder.join("version_0/metrics.jsonl")).unwrap_or_default();
    let lines = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let lines: Vec<_> = lines.collect();
    let rows: Vec<u64> = lines
        .iter()
        .filter_map(|line| line["step"].as_u64())
        .collect();
    assert!(
        rows.iter()
            .enumerate()
            .all(|(index, step)| *step == index as u64),
        "{rows:?}"
    );
    let status = lines.last().and_then(|line| line["status"].as_str());
    (rows.len(), status.map(str::to_string))
}

// BUG-07, BUG-20
#[test]
fn processes_that_are_stopped_leave_all_rows_and_say_how_they_ended() {
    for (fault, status) in [
        ("", "success"),
        ("error:1", "failed"),
        ("panic:0", "failed"),
        ("panic:1", "failed"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = train(&["2", "5", fault]);
        let (output, text) = finish(command.env("TEST_LOGS", folder.path()).spawn().unwrap());
        assert_eq!(output.status.success(), status == "success", "{text}");
        let rows = if fault.is_empty() { 5 } else { 3 };
        assert_eq!(
            told(folder.path()),
            (rows, Some(status.into())),
            "{fault}: {text}"
        );
    }
    // Signalled in the middle of a loop that meets the others, and of a step that does not.
    for (fault, least) in [("", 3), ("alone", 1)] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = train(&["2", "100000", fault]);
        let child = command.env("TEST_LOGS", folder.path()).spawn().unwrap();
        for look in 0.. {
            if told(folder.path()).0 >= least {
                break;
            }
            assert!(look < 6000, "nothing was logged");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        signal(Signal::TERM, child.id());
        let (output, text) = finish(child);
        assert!(!output.status.success());
        let (rows, status) = told(folder.path());
        assert!(rows >= least);
        assert_eq!(status.as_deref(), Some("interrupted"), "{fault}: {text}");
    }
}

// R-12, LOG-01, API-44
#[test]
fn the_first_logger_is_at_hand_on_rank_zero_and_its_absence_is_said() {
    let fabric = Fabric::builder().devices(2).build().unwrap();
    let outcome = fabric.launch_threads(|fabric| {
        fabric.log("loss", 1.0, 0)?; // to nobody
        fabric.logger(|_| Ok(()))
    });
    let error = outcome.unwrap_err().to_string();
    assert!(
        error.contains("no logger") && error.contains("Fabric::builder().logger("),
        "{error}"
    );
    let (first, second) = (Heard::default(), Heard::default());
    let builder = Fabric::builder()
        .devices(2)
        .logger(first.clone())
        .logger(second.clone());
    let outcome = builder.build().unwrap().launch_threads(|fabric| {
        let name = fabric.logger(|logger| {
            let nested = fabric.log("loss", 1.0, 0).unwrap_err().to_string();
            assert!(
                nested.contains("use the logger that you are given"),
                "{nested}"
            );
            Ok(logger.name().to_string())
        })?;
        fabric.loggers(|logger| logger.log_metrics(&[], 3))?;
        Ok(name)
    });
    assert_eq!(outcome.unwrap(), [Some("heard".to_string()), None]);
    for heard in [first, second] {
        assert_eq!(*heard.0.lock().unwrap(), ["3 0", "success"]);
    }
}
