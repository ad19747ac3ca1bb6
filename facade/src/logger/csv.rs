//! A logger that writes one CSV file and loses no row: each is written at once, by one call of the system, and a new
//! column replaces the file in one step. Whoever kills the process finds every row that was logged.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use super::{
    Logger, RunFolder,
    file::{append_lines, failed, replace},
    prefixed,
};
use crate::{Error, Result};

const STEP: &str = "step";

/// Writes metrics as CSV: a `step` column, then a column for each metric, by name.
///
/// The file is made with the first row, not before, so that ranks which never log leave nothing behind. A metric that
/// comes later gets its column then, empty in the rows before it. A run that goes on in the same version writes behind its
/// rows.
///
/// ```
/// use fabric::logger::{CsvLogger, Logger};
///
/// let folder = tempfile::tempdir()?;
/// let mut logger = CsvLogger::new(folder.path(), "runs");
/// logger.log_metrics(&[("loss".into(), 0.5)], 0)?;
/// logger.log_metrics(&[("loss".into(), 0.25), ("accuracy".into(), 1.0)], 1)?;
/// let path = logger.path().expect("a row was logged");
/// assert!(path.ends_with("runs/version_0/metrics.csv"));
/// assert_eq!(std::fs::read_to_string(path)?, "step,accuracy,loss\n0,,0.5\n1,1.0,0.25\n");
/// # Ok::<(), fabric::Error>(())
/// ```
pub struct CsvLogger {
    name: String,
    prefix: String,
    target: Target,
    columns: Vec<String>,
    open: Option<(PathBuf, File)>,
}

enum Target {
    /// The folder of a run.
    Run(RunFolder),
    /// Exactly here.
    Exact(PathBuf),
}

impl CsvLogger {
    /// Log to `root/name/version_N/metrics.csv`, with the first N above those of all earlier runs.
    pub fn new(root: impl AsRef<Path>, name: &str) -> Self {
        Self::within(&RunFolder::new(root, name))
    }

    /// Log into the folder of a run: of a version of its own, say, or together with other loggers.
    pub fn within(run: &RunFolder) -> Self {
        Self::to(run.name(), Target::Run(run.clone()))
    }

    /// Log to exactly `path`, which must not exist yet.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self::to("csv", Target::Exact(path.into()))
    }

    fn to(name: &str, target: Target) -> Self {
        Self {
            name: name.into(),
            prefix: String::new(),
            target,
            columns: Vec::new(),
            open: None,
        }
    }

    /// Put `prefix-` before the name of every metric.
    pub fn prefix(mut self, prefix: &str) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// The file, once something was logged; before that, only when it was given exactly.
    pub fn path(&self) -> Option<&Path> {
        match (&self.open, &self.target) {
            (Some((path, _)), _) | (None, Target::Exact(path)) => Some(path),
            (None, Target::Run(_)) => None,
        }
    }

    /// The run's file, made when this is the first use.
    fn open(&mut self) -> Result<(&mut File, &Path)> {
        if self.open.is_none() {
            self.open = Some(match &self.target {
                Target::Exact(path) => {
                    let path = path.clone();
                    let file = created(&path)?;
                    (path, file)
                }
                Target::Run(run) => {
                    let path = run.path()?.join("metrics.csv");
                    let file = append_lines(&path)?;
                    self.columns = header(&path)?;
                    (path, file)
                }
            });
        }
        let (path, file) = self.open.as_mut().expect("opened above");
        Ok((file, path))
    }

    /// Replace the file by one with all of `columns` and a further `row`, in one step.
    fn widen(&mut self, columns: Vec<String>, row: &[String]) -> Result<()> {
        let (_, path) = self.open()?;
        let path = path.to_owned();
        let doing = "add a column to";
        let bytes = fs::read(&path).map_err(failed(doing, &path))?;
        let mut text = line(&columns)?;
        let mut rows = csv::ReaderBuilder::new()
            .flexible(true)
            .from_reader(bytes.as_slice());
        let place = |column: &String| columns.binary_search_by(|known| order(known, column));
        let places: Vec<_> = self.columns.iter().map(place).collect();
        for old in rows.records() {
            let mut cells = vec![String::new(); columns.len()];
            for (cell, place) in old?.iter().zip(&places) {
                cells[place.expect("a column stays")] = cell.into();
            }
            text.extend(line(&cells)?);
        }
        text.extend(line(row)?);
        replace(&path, &text)?;
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.map_err(failed(doing, &path))?;
        self.open = Some((path, file));
        self.columns = columns;
        Ok(())
    }
}

impl Logger for CsvLogger {
    fn name(&self) -> &str {
        &self.name
    }

    fn version(&mut self) -> Result<Option<String>> {
        match &self.target {
            Target::Run(run) => run.version_text().map(Some),
            Target::Exact(_) => Ok(None),
        }
    }

    fn root_dir(&self) -> Option<PathBuf> {
        match &self.target {
            Target::Run(run) => Some(run.root().into()),
            Target::Exact(_) => None,
        }
    }

    fn log_dir(&mut self) -> Result<Option<PathBuf>> {
        match &self.target {
            Target::Run(run) => run.path().map(Some),
            Target::Exact(path) => Ok(path.parent().map(Into::into)),
        }
    }

    fn log_metrics(&mut self, metrics: &[(String, f64)], step: u64) -> Result<()> {
        let mut cells = vec![(STEP.to_string(), step.to_string())];
        for (name, value) in metrics {
            let name = prefixed(&self.prefix, name);
            if cells.iter().any(|(known, _)| *known == name) {
                return Err(Error::argument(
                    format!("step {step} has two values for the metric {name:?}"),
                    "Give each metric one name of its own; `step` is the number of the step",
                ));
            }
            cells.push((name, number(*value)));
        }
        self.open()?;
        let mut columns = self.columns.clone();
        for (name, _) in &cells {
            if let Err(place) = columns.binary_search_by(|known| order(known, name)) {
                columns.insert(place, name.clone());
            }
        }
        let cell = |column: &String| {
            let found = cells.iter().find(|(name, _)| name == column);
            found.map_or(String::new(), |(_, text)| text.clone())
        };
        let row: Vec<_> = columns.iter().map(cell).collect();
        if columns != self.columns {
            return self.widen(columns, &row);
        }
        let bytes = line(&row)?;
        let (file, path) = self.open()?;
        file.write_all(&bytes)
            .map_err(failed("write a row to", path))
    }

    /// Settings go beside the metrics: `hparams.json` in the folder of a run, else `NAME.hparams.json`.
    fn log_hyperparams(&mut self, hyperparams: &serde_json::Value) -> Result<()> {
        let path = match &self.target {
            Target::Run(run) => run.path()?.join("hparams.json"),
            Target::Exact(_) => self.open()?.1.with_extension("hparams.json"),
        };
        replace(&path, &serde_json::to_vec_pretty(hyperparams)?)
    }

    fn flush(&mut self) -> Result<()> {
        match &self.open {
            Some((path, file)) => file.sync_all().map_err(failed("flush", path)),
            None => Ok(()), // nothing logged, nothing to lose
        }
    }
}

/// The step comes first, then metrics by name.
fn order(one: &String, other: &String) -> std::cmp::Ordering {
    (one != STEP, one).cmp(&(other != STEP, other))
}

/// A new file.
fn created(path: &Path) -> Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed("make the folder", folder))?;
    }
    let file = OpenOptions::new().append(true).create_new(true).open(path);
    file.map_err(|why| match why.kind() {
        ErrorKind::AlreadyExists => Error::argument(
            format!("{} exists, and may hold another run's rows", path.display()),
            "Give another path, or move that file away; CsvLogger::new numbers its runs",
        ),
        _ => failed("create", path)(why),
    })
}

/// The columns of an earlier part of this run; none, when this is the first.
fn header(path: &Path) -> Result<Vec<String>> {
    let bytes = fs::read(path).map_err(failed("read", path))?;
    let mut reader = csv::Reader::from_reader(bytes.as_slice());
    let columns: Vec<String> = reader.headers()?.iter().map(str::to_owned).collect();
    if !columns.is_sorted_by(|one, other| order(one, other).is_lt())
        || columns.first().is_some_and(|first| first != STEP)
    {
        return Err(Error::argument(
            format!(
                "{} has other columns than this logger writes",
                path.display()
            ),
            "Move that file away, or log into another version",
        ));
    }
    Ok(columns)
}

/// One line of CSV.
fn line(cells: &[String]) -> Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(cells)?;
    Ok(writer
        .into_inner()
        .map_err(|refused| refused.into_error())?)
}

/// A number that every CSV reader understands.
fn number(value: f64) -> String {
    match value {
        _ if value.is_nan() => "nan".into(),
        f64::INFINITY => "inf".into(),
        f64::NEG_INFINITY => "-inf".into(),
        _ => format!("{value:?}"), // the shortest text that reads back as the same number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(logger: &mut CsvLogger, step: u64, metrics: &[(&str, f64)]) -> Result<()> {
        let metrics: Vec<_> = metrics
            .iter()
            .map(|(name, value)| (name.to_string(), *value))
            .collect();
        logger.log_metrics(&metrics, step)
    }

    fn text(logger: &CsvLogger) -> String {
        fs::read_to_string(logger.path().unwrap()).unwrap()
    }

    // LOG-02, BUG-07, BUG-08, line 53
    #[test]
    fn line_53_every_row_is_in_the_file_when_the_call_returns() {
        let folder = tempfile::tempdir().unwrap();
        let mut logger = CsvLogger::at(folder.path().join("deep/metrics.csv"));
        for step in 0..205 {
            log(&mut logger, step, &[("loss", step as f64)]).unwrap();
            assert_eq!(text(&logger).lines().count() as u64, step + 2);
        }
        std::mem::forget(logger); // as a kill would: nothing runs afterwards
        let mut rows = csv::Reader::from_path(folder.path().join("deep/metrics.csv")).unwrap();
        let steps: Vec<u64> = rows
            .records()
            .map(|row| row.unwrap()[0].parse().unwrap())
            .collect();
        assert_eq!(steps, (0..205).collect::<Vec<_>>());
    }

    // LOG-02, line 53
    #[test]
    fn a_late_metric_adds_a_column_and_keeps_all_rows() {
        let folder = tempfile::tempdir().unwrap();
        let mut logger = CsvLogger::new(folder.path(), "run");
        log(&mut logger, 0, &[("loss", 1.0)]).unwrap();
        let mode = fs::metadata(logger.path().unwrap()).unwrap().permissions();
        log(&mut logger, 1, &[("with, comma", 2.0)]).unwrap();
        log(&mut logger, 2, &[("loss", 3.5)]).unwrap();
        logger.flush().unwrap();
        assert_eq!(
            text(&logger),
            "step,loss,\"with, comma\"\n0,1.0,\n1,,2.0\n2,3.5,\n"
        );
        let path = logger.path().unwrap();
        assert_eq!(fs::metadata(path).unwrap().permissions(), mode);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1); // no temporary file is left
    }

    #[test]
    fn the_columns_of_a_row_may_come_in_any_order() {
        let folder = tempfile::tempdir().unwrap();
        let mut logger = CsvLogger::new(folder.path(), "run");
        log(&mut logger, 0, &[("a", 1.0), ("b", 2.0)]).unwrap();
        log(&mut logger, 1, &[("b", 4.0), ("a", 3.0)]).unwrap();
        log(&mut logger, 2, &[]).unwrap();
        assert_eq!(text(&logger), "step,a,b\n0,1.0,2.0\n1,3.0,4.0\n2,,\n");
    }

    #[test]
    fn non_finite_values_are_words() {
        let folder = tempfile::tempdir().unwrap();
        let mut logger = CsvLogger::at(folder.path().join("m.csv"));
        let values = [
            ("a", f64::NAN),
            ("b", f64::INFINITY),
            ("c", f64::NEG_INFINITY),
            ("d", 1e300),
        ];
        log(&mut logger, 7, &values).unwrap();
        assert_eq!(text(&logger), "step,a,b,c,d\n7,nan,inf,-inf,1e300\n");
    }

    #[test]
    fn an_existing_file_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.csv");
        fs::write(&path, "another run").unwrap();
        let error = log(&mut CsvLogger::at(&path), 0, &[("a", 1.0)]).unwrap_err();
        assert!(error.to_string().contains("m.csv exists"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "another run");
    }

    #[test]
    fn a_run_that_goes_on_keeps_its_rows_and_a_silent_one_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut silent = CsvLogger::new(folder.path(), "silent");
        silent.flush().unwrap();
        assert_eq!(silent.path(), None);
        assert!(!folder.path().join("silent").exists());
        let run = || CsvLogger::within(&RunFolder::new(folder.path(), "run").version("mine"));
        log(&mut run(), 0, &[("b", 1.0)]).unwrap();
        let path = folder.path().join("run/mine/metrics.csv");
        let mut torn = fs::read(&path).unwrap();
        torn.extend(b"1,2"); // killed while writing
        fs::write(&path, torn).unwrap();
        let mut second = run().prefix("a");
        log(&mut second, 2, &[("loss", 3.0)]).unwrap();
        log(&mut second, 3, &[("loss", 4.0)]).unwrap();
        assert_eq!(
            text(&second),
            "step,a-loss,b\n0,,1.0\n1,,2\n2,3.0,\n3,4.0,\n"
        );
        assert_eq!(second.version().unwrap(), Some("mine".into()));
        fs::write(&path, "x,y\n1,2\n").unwrap();
        let error = log(&mut run(), 0, &[("b", 1.0)]).unwrap_err().to_string();
        assert!(error.contains("other columns"), "{error}");
    }

    #[test]
    fn a_metric_has_one_value_a_step() {
        let folder = tempfile::tempdir().unwrap();
        let mut logger = CsvLogger::new(folder.path(), "run");
        for twice in [[("a", 1.0), ("a", 2.0)], [("a", 1.0), ("step", 2.0)]] {
            let error = log(&mut logger, 3, &twice).unwrap_err().to_string();
            assert!(error.contains("step 3"), "{error}");
        }
    }

    #[test]
    fn settings_stand_beside_the_metrics() {
        let folder = tempfile::tempdir().unwrap();
        let mut logger = CsvLogger::new(folder.path(), "run");
        logger
            .log_hyperparams(&serde_json::json!({"lr": 0.1}))
            .unwrap();
        log(&mut logger, 0, &[("a", 1.0)]).unwrap();
        let beside = logger.path().unwrap().with_file_name("hparams.json");
        let value: serde_json::Value = serde_json::from_slice(&fs::read(beside).unwrap()).unwrap();
        assert_eq!(value["lr"], 0.1);
        assert_eq!(text(&logger), "step,a\n0,1.0\n");
    }
}
