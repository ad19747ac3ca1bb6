//! A logger that writes TensorBoard's event files: scalars, texts, and settings for its HParams page.

use std::{
    fs::{self, File},
    io::Write,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
};

use serde_json::Value;

use super::{
    Logger, RunFolder, Status,
    file::{append, failed},
    flat::flattened,
    prefixed,
    record::framed,
    wall_time,
    wire::Message,
};
use crate::Result;

const HP_METRIC: &str = "hp_metric";
const DT_STRING: u64 = 7;

/// Writes `root/name/version_N/events.out.tfevents.TIME.HOST.PID.N`; `tensorboard --logdir root` shows it.
///
/// ```no_run
/// use fabric::{Fabric, logger::TensorBoardLogger};
///
/// let fabric = Fabric::builder().logger(TensorBoardLogger::new("~/logs", "digits")).build()?;
/// fabric.launch(|fabric| {
///     fabric.log_hyperparams(&serde_json::json!({"lr": 0.1, "model": {"width": 64}}))?;
///     fabric.log("loss", 0.5, 0)?;
///     fabric.log("hp_metric", 0.75, 1) // what the HParams page compares runs by
/// })?;
/// # Ok::<(), fabric::Error>(())
/// ```
pub struct TensorBoardLogger {
    run: RunFolder,
    prefix: String,
    sub_dir: Option<String>,
    hp_metric: bool,
    open: Option<(PathBuf, File)>,
    has_hyperparams: bool,
}

impl TensorBoardLogger {
    /// Log into the next version of the experiment `name`.
    pub fn new(root: impl AsRef<std::path::Path>, name: &str) -> Self {
        Self::within(&RunFolder::new(root, name))
    }

    /// Log into the folder of a run: of a version of its own, say, or together with other loggers.
    pub fn within(run: &RunFolder) -> Self {
        Self {
            run: run.clone(),
            prefix: String::new(),
            sub_dir: None,
            hp_metric: true,
            open: None,
            has_hyperparams: false,
        }
    }

    /// Put `prefix-` before the name of every metric.
    pub fn prefix(mut self, prefix: &str) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Write into this folder below the run's.
    pub fn sub_dir(mut self, name: &str) -> Self {
        self.sub_dir = Some(name.into());
        self
    }

    /// Whether settings come with a metric `hp_metric` of -1 (they do): without any metric the HParams page shows no run.
    pub fn default_hp_metric(mut self, wanted: bool) -> Self {
        self.hp_metric = wanted;
        self
    }

    fn folder(&self) -> Result<PathBuf> {
        let folder = self.run.path()?;
        Ok(match &self.sub_dir {
            Some(name) => folder.join(name),
            None => folder,
        })
    }

    /// Write one event: what happened at `step`.
    fn write(&mut self, summary: Message, step: u64) -> Result<()> {
        if self.open.is_none() {
            let path = self.folder()?.join(file_name());
            let mut file = append(&path)?;
            let first = Message::new()
                .double(1, wall_time())
                .bytes(3, "brain.Event:2");
            file.write_all(&framed(&first.into_bytes()))
                .map_err(failed("write to", &path))?;
            self.open = Some((path, file));
        }
        let event = Message::new()
            .double(1, wall_time())
            .integer(2, step)
            .message(5, summary);
        let (path, file) = self.open.as_mut().expect("opened above");
        file.write_all(&framed(&event.into_bytes()))
            .map_err(failed("write to", path))
    }
}

impl Logger for TensorBoardLogger {
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
        self.folder().map(Some)
    }

    /// As `f32`, TensorBoard's type for scalars.
    fn log_metrics(&mut self, metrics: &[(String, f64)], step: u64) -> Result<()> {
        let summary = metrics
            .iter()
            .fold(Message::new(), |summary, (name, value)| {
                let name = prefixed(&self.prefix, name);
                summary.message(1, Message::new().bytes(1, name).float(2, *value as f32))
            });
        self.write(summary, step)
    }

    fn log_hyperparams(&mut self, hyperparams: &Value) -> Result<()> {
        let flat = flattened(hyperparams);
        if self.hp_metric {
            self.log_metrics(&[(HP_METRIC.into(), -1.0)], 0)?;
        }
        let metric = prefixed(&self.prefix, HP_METRIC);
        let infos = flat
            .iter()
            .fold(Message::new(), |experiment, (name, value)| {
                let info = Message::new().bytes(1, name).integer(4, kind(value));
                experiment.message(4, info)
            });
        let metric = Message::new().message(1, Message::new().bytes(2, metric));
        let experiment = match self.hp_metric {
            true => infos.message(5, metric),
            false => infos,
        };
        let session = flat.iter().fold(Message::new(), |session, (name, value)| {
            let entry = Message::new().bytes(1, name).message(2, plain(value));
            session.message(1, entry)
        });
        let session = session.double(5, wall_time());
        let summary = Message::new()
            .message(1, about_hyperparams("_hparams_/experiment", 2, experiment))
            .message(
                1,
                about_hyperparams("_hparams_/session_start_info", 3, session),
            );
        self.has_hyperparams = true;
        self.write(summary, 0)
    }

    /// Shown as Markdown.
    fn log_text(&mut self, name: &str, text: &str, step: u64) -> Result<()> {
        let shape = Message::new().message(2, Message::new().integer(1, 1));
        let tensor = Message::new()
            .integer(1, DT_STRING)
            .message(2, shape)
            .bytes(8, text);
        let name = format!("{}/text_summary", prefixed(&self.prefix, name));
        let value = Message::new()
            .bytes(1, name)
            .message(8, tensor)
            .message(9, plugin("text", []));
        self.write(Message::new().message(1, value), step)
    }

    fn flush(&mut self) -> Result<()> {
        match &self.open {
            Some((path, file)) => file.sync_all().map_err(failed("flush", path)),
            None => Ok(()),
        }
    }

    /// The HParams page shows how the run has ended; it knows no interruption, which is a failure there.
    fn finalize(&mut self, status: Status) -> Result<()> {
        if self.has_hyperparams {
            let code = match status {
                Status::Success => 1,
                Status::Failed | Status::Interrupted => 2,
            };
            let end = Message::new().integer(1, code).double(2, wall_time());
            let end = about_hyperparams("_hparams_/session_end_info", 4, end);
            self.write(Message::new().message(1, end), 0)?;
        }
        self.flush()
    }
}

/// A summary's value that is for the HParams plugin alone: `content` as field `field` of its data.
fn about_hyperparams(tag: &str, field: u32, content: Message) -> Message {
    let data = Message::new().integer(1, 0).message(field, content);
    Message::new()
        .bytes(1, tag)
        .message(9, plugin("hparams", data.into_bytes()))
}

fn plugin(name: &str, content: impl AsRef<[u8]>) -> Message {
    let data = Message::new().bytes(1, name).bytes(2, content);
    Message::new().message(1, data)
}

/// The type of a setting: text, truth or number.
fn kind(value: &Value) -> u64 {
    match value {
        Value::Bool(_) => 2,
        Value::Number(_) => 3,
        _ => 1,
    }
}

/// A setting as a `google.protobuf.Value`; what is neither number, truth nor text is its JSON.
fn plain(value: &Value) -> Message {
    match value {
        Value::Bool(truth) => Message::new().integer(4, u64::from(*truth)),
        Value::Number(number) => Message::new().double(2, number.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => Message::new().bytes(3, text),
        other => Message::new().bytes(3, other.to_string()),
    }
}

/// `events.out.tfevents.TIME.HOST.PID.N`, in which N counts this process's files.
fn file_name() -> String {
    static FILES: AtomicU64 = AtomicU64::new(0);
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host: String = host
        .trim()
        .chars()
        .map(|letter| if letter == '/' { '_' } else { letter })
        .collect();
    let host = if host.is_empty() { "localhost" } else { &host };
    let number = FILES.fetch_add(1, Ordering::Relaxed);
    let (time, process) = (wall_time() as u64, std::process::id());
    format!("events.out.tfevents.{time:010}.{host}.{process}.{number}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::{
            read_records,
            wire::read::{Field, Fields, fields},
        },
        *,
    };

    /// The events of the only file in `folder`.
    fn events(folder: &std::path::Path) -> Vec<Fields> {
        let files: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        assert_eq!(files.len(), 1, "{files:?}");
        let name = files[0].file_name().unwrap().to_str().unwrap();
        let parts: Vec<_> = name
            .strip_prefix("events.out.tfevents.")
            .unwrap()
            .split('.')
            .collect();
        assert_eq!(parts[parts.len() - 2], std::process::id().to_string());
        let bytes = fs::read(&files[0]).unwrap();
        read_records(&bytes)
            .unwrap()
            .into_iter()
            .map(fields)
            .collect()
    }

    /// The values of an event: tag and fields.
    fn values(event: &Fields) -> Vec<(String, Fields)> {
        let summary = event.get(5).unwrap().fields();
        let values = summary.all(1).map(|value| value.fields());
        values
            .map(|value| (value.get(1).unwrap().text().to_string(), value))
            .collect()
    }

    // LOG-03, line 54
    #[test]
    fn line_54_scalars_are_read_again_with_every_checksum() {
        let root = tempfile::tempdir().unwrap();
        let mut logger = TensorBoardLogger::new(root.path(), "run")
            .prefix("a")
            .sub_dir("train");
        let logged = [("x", 0.1), ("y", f64::NAN), ("z", f64::NEG_INFINITY)];
        let metrics = logged.map(|(name, value)| (name.to_string(), value));
        for step in [0, 1, 1 << 40] {
            logger.log_metrics(&metrics, step).unwrap();
        }
        assert_eq!(logger.version().unwrap().unwrap(), "0");
        std::mem::forget(logger); // as a kill would: nothing runs afterwards
        let events = events(&root.path().join("run/version_0/train"));
        assert_eq!(events[0].get(3).unwrap().text(), "brain.Event:2");
        assert_eq!(events.len(), 4);
        for (event, step) in events[1..].iter().zip([0, 1, 1 << 40]) {
            assert_eq!(event.get(2), Some(&Field::Integer(step)));
            assert!(event.get(1).unwrap().double() > 1e9);
            for ((tag, value), (name, number)) in values(event).iter().zip(logged) {
                assert_eq!(*tag, format!("a-{name}"));
                assert_eq!(
                    value.get(2),
                    Some(&Field::Four((number as f32).to_le_bytes()))
                );
            }
        }
    }

    // LOG-03, LOG-05, line 54
    #[test]
    fn settings_are_flat_typed_and_have_a_metric_and_an_end() {
        let root = tempfile::tempdir().unwrap();
        let mut logger = TensorBoardLogger::new(root.path(), "");
        let settings = json!({"lr": 0.5, "model": {"deep": true, "name": "gpt", "sizes": [1, 2]}});
        logger.log_hyperparams(&settings).unwrap();
        logger.finalize(Status::Failed).unwrap();
        let events = events(&root.path().join("version_0"));
        assert_eq!(values(&events[1])[0].0, "hp_metric");
        let plugins: Vec<_> = events[2..].iter().flat_map(values).collect();
        let content = |index: usize, field: u64| {
            let data = plugins[index]
                .1
                .get(9)
                .unwrap()
                .fields()
                .get(1)
                .unwrap()
                .fields();
            assert_eq!(data.get(1).unwrap().text(), "hparams");
            data.get(2).unwrap().fields().get(field).unwrap().fields()
        };
        let experiment = content(0, 2);
        let infos: Vec<_> = experiment.all(4).map(Field::fields).collect();
        let names: Vec<_> = infos
            .iter()
            .map(|info| info.get(1).unwrap().text().to_string())
            .collect();
        assert_eq!(names, ["lr", "model/deep", "model/name", "model/sizes"]);
        let kinds = [3, 2, 1, 1].map(Field::Integer);
        assert!(
            infos
                .iter()
                .zip(kinds)
                .all(|(info, kind)| info.get(4) == Some(&kind))
        );
        let metric = experiment.get(5).unwrap().fields().get(1).unwrap().fields();
        assert_eq!(metric.get(2).unwrap().text(), "hp_metric");
        let session = content(1, 3);
        let entries: Vec<_> = session.all(1).map(Field::fields).collect();
        assert_eq!(
            entries[0].get(2).unwrap().fields().get(2).unwrap().double(),
            0.5
        );
        assert_eq!(
            entries[3].get(2).unwrap().fields().get(3).unwrap().text(),
            "[1,2]"
        );
        assert_eq!(content(2, 4).get(1), Some(&Field::Integer(2)));
    }

    #[test]
    fn texts_are_tensors_of_the_text_plugin() {
        let root = tempfile::tempdir().unwrap();
        let mut logger = TensorBoardLogger::new(root.path(), "run").default_hp_metric(false);
        logger.log_text("said", "*good* day", 3).unwrap();
        let events = events(&root.path().join("run/version_0"));
        let (tag, value) = values(&events[1]).remove(0);
        assert_eq!(tag, "said/text_summary");
        let tensor = value.get(8).unwrap().fields();
        assert_eq!(tensor.get(1), Some(&Field::Integer(DT_STRING)));
        assert_eq!(tensor.get(8).unwrap().text(), "*good* day");
    }

    // Nothing is written by a run that logs nothing.
    #[test]
    fn a_silent_run_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        TensorBoardLogger::new(root.path(), "run")
            .finalize(Status::Success)
            .unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
