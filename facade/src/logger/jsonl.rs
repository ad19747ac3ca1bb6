//! A logger that writes one JSON object a line: for programs that read a run while it goes on.

use std::{fs::File, io::Write, path::PathBuf};

use serde_json::{Map, Value, json};

use super::{
    Logger, RunFolder, Status,
    file::{append_lines, failed},
    prefixed, wall_time,
};
use crate::{Result, number::Number};

/// Writes `metrics.jsonl`. A line is one of
///
/// ```text
/// {"time":1767225600.25,"hyperparams":{"lr":0.1}}
/// {"time":1767225600.5,"step":0,"metrics":{"loss":0.5,"norm":"NaN"}}
/// {"time":1767225600.5,"step":0,"text":{"sample":"once upon a time"}}
/// {"time":1767225601.0,"status":"success"}
/// ```
///
/// JSON has no NaN and no infinities: those are the texts "NaN", "Infinity" and "-Infinity". A run that goes on in the same
/// version writes behind what is there.
///
/// ```
/// use fabric::logger::{JsonlLogger, Logger};
///
/// let folder = tempfile::tempdir()?;
/// let mut logger = JsonlLogger::new(folder.path(), "runs");
/// logger.log_metrics(&[("loss".into(), 0.5)], 7)?;
/// let text = std::fs::read_to_string(folder.path().join("runs/version_0/metrics.jsonl"))?;
/// let line: serde_json::Value = serde_json::from_str(&text)?;
/// assert_eq!((&line["step"], &line["metrics"]["loss"]), (&7.into(), &0.5.into()));
/// # Ok::<(), fabric::Error>(())
/// ```
pub struct JsonlLogger {
    run: RunFolder,
    prefix: String,
    file: Option<(PathBuf, File)>,
}

impl JsonlLogger {
    /// Log to `root/name/version_N/metrics.jsonl`.
    pub fn new(root: impl AsRef<std::path::Path>, name: &str) -> Self {
        Self::within(&RunFolder::new(root, name))
    }

    /// Log into the folder of a run: of a version of its own, say, or together with other loggers.
    pub fn within(run: &RunFolder) -> Self {
        let (run, prefix, file) = (run.clone(), String::new(), None);
        Self { run, prefix, file }
    }

    /// Put `prefix-` before the name of every metric.
    pub fn prefix(mut self, prefix: &str) -> Self {
        self.prefix = prefix.into();
        self
    }

    fn write(&mut self, mut line: Value) -> Result<()> {
        line["time"] = wall_time().into();
        let mut bytes = serde_json::to_vec(&line)?;
        bytes.push(b'\n');
        if self.file.is_none() {
            let path = self.run.path()?.join("metrics.jsonl");
            let file = append_lines(&path)?;
            self.file = Some((path, file));
        }
        let (path, file) = self.file.as_mut().expect("opened above");
        file.write_all(&bytes)
            .map_err(failed("write a line to", path))
    }
}

impl Logger for JsonlLogger {
    fn name(&self) -> &str {
        self.run.name()
    }

    fn version(&mut self) -> Result<Option<String>> {
        self.run.version_text().map(Some)
    }

    fn root_dir(&self) -> Option<PathBuf> {
        Some(self.run.root().into())
    }

    fn log_dir(&mut self) -> Result<Option<PathBuf>> {
        self.run.path().map(Some)
    }

    fn log_metrics(&mut self, metrics: &[(String, f64)], step: u64) -> Result<()> {
        let metrics = metrics.iter();
        let metrics: Map<_, _> = metrics
            .map(|(name, value)| (prefixed(&self.prefix, name), json!(Number(*value))))
            .collect();
        self.write(json!({"step": step, "metrics": metrics}))
    }

    fn log_hyperparams(&mut self, hyperparams: &Value) -> Result<()> {
        self.write(json!({ "hyperparams": hyperparams }))
    }

    fn log_text(&mut self, name: &str, text: &str, step: u64) -> Result<()> {
        let name = prefixed(&self.prefix, name);
        self.write(json!({"step": step, "text": {name: text}}))
    }

    fn flush(&mut self) -> Result<()> {
        match &self.file {
            Some((path, file)) => file.sync_all().map_err(failed("flush", path)),
            None => Ok(()),
        }
    }

    fn finalize(&mut self, status: Status) -> Result<()> {
        if self.file.is_some() {
            self.write(json!({ "status": status.name() }))?;
        }
        self.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(logger: &JsonlLogger) -> Vec<Value> {
        let text = std::fs::read_to_string(&logger.file.as_ref().unwrap().0).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect()
    }

    #[test]
    fn settings_numbers_texts_and_the_end_are_lines() {
        let folder = tempfile::tempdir().unwrap();
        let mut logger = JsonlLogger::new(folder.path(), "run").prefix("a");
        let metrics = [
            ("x".to_string(), 1e300),
            ("y".to_string(), f64::NAN),
            ("z".to_string(), f64::NEG_INFINITY),
            ("w".to_string(), f64::INFINITY),
        ];
        logger
            .log_hyperparams(&json!({"model": {"width": 3}}))
            .unwrap();
        logger.log_metrics(&metrics, 9).unwrap();
        logger.log_text("said", "good \"day\"", 10).unwrap();
        logger.finalize(Status::Interrupted).unwrap();
        let lines = lines(&logger);
        assert!(
            lines
                .iter()
                .all(|line| line["time"].as_f64().unwrap() > 1e9)
        );
        assert_eq!(lines[0]["hyperparams"]["model"]["width"], 3);
        let expected = json!({"a-x": 1e300, "a-y": "NaN", "a-z": "-Infinity", "a-w": "Infinity"});
        assert_eq!(
            (&lines[1]["metrics"], &lines[1]["step"]),
            (&expected, &json!(9))
        );
        assert_eq!(lines[2]["text"]["a-said"], "good \"day\"");
        assert_eq!(
            (lines.len(), &lines[3]["status"]),
            (4, &json!("interrupted"))
        );
    }

    #[test]
    fn a_version_goes_on_and_a_silent_run_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        for step in 0..3 {
            let mut logger =
                JsonlLogger::within(&RunFolder::new(folder.path(), "run").version("mine"));
            logger.log_metrics(&[("a".into(), 1.0)], step).unwrap();
            assert_eq!(lines(&logger).len() as u64, step + 1);
        }
        let mut silent = JsonlLogger::new(folder.path(), "silent");
        silent.finalize(Status::Success).unwrap();
        assert!(!folder.path().join("silent").exists());
    }
}
