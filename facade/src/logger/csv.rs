//! A logger that writes one CSV file and loses no row: each is written at once, by one call of the system, and a new
//! column replaces the file in one step. Whoever kills the process finds every row that was logged.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

use super::Logger;
use crate::{Error, Result};

/// Writes metrics as CSV: a `step` column, then a column for each metric in the order of their first appearance.
///
/// The file is made with the first row, not before, so that ranks which never log leave nothing behind; it is never an
/// existing one. A metric that comes later gets its column then, empty in the rows before it.
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
/// assert_eq!(std::fs::read_to_string(path)?, "step,loss,accuracy\n0,0.5,\n1,0.25,1.0\n");
/// # Ok::<(), fabric::Error>(())
/// ```
pub struct CsvLogger {
    name: String,
    target: Target,
    columns: Vec<String>,
}

enum Target {
    /// Nothing logged yet: `folder`'s next `version_N`.
    Version { folder: PathBuf },
    /// Nothing logged yet: exactly here.
    Exact { path: PathBuf },
    /// The file of this run.
    Open { path: PathBuf, file: File },
}

impl CsvLogger {
    /// Log to `root/name/version_N/metrics.csv`, with the first N above those of all earlier runs.
    pub fn new(root: impl AsRef<Path>, name: &str) -> Self {
        let folder = root.as_ref().join(name);
        Self::to(name, Target::Version { folder })
    }

    /// Log to exactly `path`, which must not exist yet.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self::to("csv", Target::Exact { path: path.into() })
    }

    fn to(name: &str, target: Target) -> Self {
        Self {
            name: name.into(),
            target,
            columns: Vec::new(),
        }
    }

    /// The file, once something was logged; before that, only when it was given exactly.
    pub fn path(&self) -> Option<&Path> {
        match &self.target {
            Target::Version { .. } => None,
            Target::Exact { path } | Target::Open { path, .. } => Some(path),
        }
    }

    /// The run's file, made when this is the first use.
    fn open(&mut self) -> Result<(&mut File, &Path)> {
        let path = match &self.target {
            Target::Version { folder } => Some(next_version(folder)?.join("metrics.csv")),
            Target::Exact { path } => {
                if let Some(folder) = path.parent() {
                    fs::create_dir_all(folder).map_err(failed("make the folder", folder))?;
                }
                Some(path.clone())
            }
            Target::Open { .. } => None,
        };
        if let Some(path) = path {
            let file = OpenOptions::new().append(true).create_new(true).open(&path);
            let file = file.map_err(|why| match why.kind() {
                ErrorKind::AlreadyExists => Error::argument(
                    format!("{} exists, and may hold another run's rows", path.display()),
                    "Give another path, or move that file away; CsvLogger::new numbers its runs",
                ),
                _ => failed("create", &path)(why),
            })?;
            self.target = Target::Open { path, file };
        }
        match &mut self.target {
            Target::Open { path, file } => Ok((file, path)),
            _ => unreachable!("the file was opened above"),
        }
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
        for old in rows.records() {
            let mut cells: Vec<String> = old?.iter().map(str::to_owned).collect();
            cells.resize(columns.len(), String::new());
            text.extend(line(&cells)?);
        }
        text.extend(line(row)?);
        replace(&path, &text)?;
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.map_err(failed(doing, &path))?;
        self.target = Target::Open { path, file };
        self.columns = columns;
        Ok(())
    }
}

impl Logger for CsvLogger {
    fn name(&self) -> &str {
        &self.name
    }

    fn log_metrics(&mut self, metrics: &[(String, f64)], step: u64) -> Result<()> {
        let mut columns = if self.columns.is_empty() {
            vec!["step".to_owned()]
        } else {
            self.columns.clone()
        };
        let mut row = vec![String::new(); columns.len()];
        row[0] = step.to_string();
        for (name, value) in metrics {
            let column = columns.iter().position(|known| known == name);
            let column = column.unwrap_or_else(|| {
                columns.push(name.clone());
                row.push(String::new());
                row.len() - 1
            });
            if !row[column].is_empty() {
                return Err(Error::argument(
                    format!("step {step} has two values for the metric {name:?}"),
                    "Give each metric one name of its own; `step` is the number of the step",
                ));
            }
            row[column] = number(*value);
        }
        if columns != self.columns {
            return self.widen(columns, &row);
        }
        let bytes = line(&row)?;
        let (file, path) = self.open()?;
        file.write_all(&bytes)
            .map_err(failed("write a row to", path))
    }

    /// Settings go beside the metrics, as `metrics.hparams.json`.
    fn log_hyperparams(&mut self, hyperparams: &serde_json::Value) -> Result<()> {
        let (_, path) = self.open()?;
        let path = path.with_extension("hparams.json");
        replace(&path, &serde_json::to_vec_pretty(hyperparams)?)
    }

    fn flush(&mut self) -> Result<()> {
        match &self.target {
            Target::Open { path, file } => file.sync_all().map_err(failed("flush", path)),
            _ => Ok(()), // nothing logged, nothing to lose
        }
    }
}

/// Make the next `version_N` in `folder`. Runs that start at the same moment get different ones, because only one of
/// them can make a folder.
fn next_version(folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder).map_err(failed("make the folder", folder))?;
    let mut next = 0u64;
    for entry in fs::read_dir(folder).map_err(failed("list", folder))? {
        let name = entry.map_err(failed("list", folder))?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("version_"));
        if let Some(number) = number.and_then(|text| text.parse::<u64>().ok()) {
            next = next.max(number.saturating_add(1));
        }
    }
    loop {
        let version = folder.join(format!("version_{next}"));
        match fs::create_dir(&version) {
            Ok(()) => return Ok(version),
            Err(why) if why.kind() == ErrorKind::AlreadyExists => next = next.saturating_add(1),
            Err(why) => return Err(failed("make the folder", &version)(why)),
        }
    }
}

/// Write `bytes` as the whole of `path`, in one step that a crash cannot split.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let write = || {
        let mut file = NamedTempFile::new_in(folder)?;
        if let Ok(metadata) = fs::metadata(path) {
            file.as_file().set_permissions(metadata.permissions())?; // temporary files are private
        }
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|refused| refused.error)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(failed("write", path))
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

fn failed<'a>(doing: &'a str, path: &'a Path) -> impl Fn(std::io::Error) -> Error + 'a {
    move |why| {
        Error::argument(
            format!("the CSV logger cannot {doing} {}: {why}", path.display()),
            "Give it a folder that this user may write to, with room left",
        )
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

    #[test]
    fn every_row_is_in_the_file_when_the_call_returns() {
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
    fn each_run_gets_the_next_version_and_silent_ranks_get_none() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("run/version_4")).unwrap();
        let mut silent = CsvLogger::new(folder.path(), "run");
        silent.flush().unwrap();
        assert_eq!(silent.path(), None);
        let mut runs = [
            CsvLogger::new(folder.path(), "run"),
            CsvLogger::new(folder.path(), "run"),
        ];
        for (run, version) in runs.iter_mut().zip(["version_5", "version_6"]) {
            log(run, 0, &[("a", 1.0)]).unwrap();
            assert!(run.path().unwrap().parent().unwrap().ends_with(version));
        }
    }

    #[test]
    fn a_metric_has_one_value_a_step() {
        let folder = tempfile::tempdir().unwrap();
        let mut logger = CsvLogger::new(folder.path(), "run");
        for twice in [[("a", 1.0), ("a", 2.0)], [("a", 1.0), ("step", 2.0)]] {
            let error = log(&mut logger, 3, &twice).unwrap_err().to_string();
            assert!(error.contains("step 3"), "{error}");
        }
        assert_eq!(logger.path(), None);
    }

    #[test]
    fn settings_stand_beside_the_metrics() {
        let folder = tempfile::tempdir().unwrap();
        let mut logger = CsvLogger::new(folder.path(), "run");
        logger
            .log_hyperparams(&serde_json::json!({"lr": 0.1}))
            .unwrap();
        log(&mut logger, 0, &[("a", 1.0)]).unwrap();
        let beside = logger
            .path()
            .unwrap()
            .with_file_name("metrics.hparams.json");
        let value: serde_json::Value = serde_json::from_slice(&fs::read(beside).unwrap()).unwrap();
        assert_eq!(value["lr"], 0.1);
        assert_eq!(text(&logger), "step,a\n0,1.0\n");
    }
}
