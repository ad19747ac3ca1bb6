//! From what was asked for to what will be done: a pure function, in which every choice has its reason.

use fabric_engine::shard::placement::{DDP, ROWS, Row, SINGLE};

pub use crate::precision::Precision;
use crate::{
    checkpoint::StateDictType,
    error::{Error, Result},
};

/// How many devices, or which.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Devices {
    /// As many as make sense: on a CPU, one.
    #[default]
    Auto,
    /// So many.
    Count(usize),
}

impl From<usize> for Devices {
    fn from(count: usize) -> Self {
        Self::Count(count)
    }
}

impl Devices {
    /// Read "auto" or a number.
    ///
    /// # Errors
    /// When the text is neither.
    pub fn parse(text: &str) -> Result<Self> {
        let text = text.trim();
        if text.eq_ignore_ascii_case("auto") {
            return Ok(Self::Auto);
        }
        text.parse().map(Self::Count).map_err(|_| {
            Error::argument(
                format!("devices = '{text}'"),
                "Give a number of processes, like 2, or \"auto\"",
            )
        })
    }
}

/// What was asked for, in the user's words.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// "auto", "cpu", ...
    pub accelerator: Option<String>,
    /// "auto", "single", "ddp", ...
    pub strategy: Option<String>,
    /// How many processes.
    pub devices: Devices,
    /// "32-true", "bf16-mixed", ...
    pub precision: Option<String>,
    /// "full" or "sharded".
    pub state_dict_type: Option<String>,
}

/// What will be done.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The accelerator's name.
    pub accelerator: &'static str,
    /// Processes on this machine.
    pub devices: usize,
    /// The strategy.
    pub strategy: Row,
    /// The precision.
    pub precision: Precision,
    /// The form of checkpoints.
    pub state_dict_type: StateDictType,
    /// Each choice with its reason, a line each.
    pub reasons: Vec<String>,
}

/// Resolve a request in a world of `outside` ranks that were started already, if any.
///
/// # Errors
/// When a name is unknown, or the choices contradict each other.
pub fn resolve(request: &Request, outside: Option<usize>) -> Result<Resolved> {
    let mut reasons = Vec::new();
    let accelerator = accelerator(request.accelerator.as_deref(), &mut reasons)?;
    let devices = match (&request.devices, outside) {
        (Devices::Count(0), _) => {
            return Err(Error::argument(
                "0 devices were asked for",
                "Ask for at least one: devices(1), or --devices 1",
            ));
        }
        (Devices::Count(count), None) => {
            reasons.push(format!("devices = {count}: asked for"));
            *count
        }
        (Devices::Auto, None) => {
            reasons.push("devices = 1: \"auto\" on a CPU is one process".into());
            1
        }
        (_, Some(world)) => {
            reasons.push(format!("{world} ranks: the environment has started them"));
            world
        }
    };
    let strategy = strategy(request.strategy.as_deref(), devices, &mut reasons)?;
    let precision = match request.precision.as_deref() {
        None => {
            reasons.push("precision = 32-true: the default".into());
            Precision::F32
        }
        Some(text) => {
            let precision = Precision::parse(text)?;
            let how = if Precision::is_discouraged(text) {
                format!(
                    "asked for as \"{}\", which is better written out",
                    text.trim()
                )
            } else {
                "asked for".into()
            };
            reasons.push(format!("precision = {precision}: {how}"));
            precision
        }
    };
    let state_dict_type = match request.state_dict_type.as_deref() {
        // As Lightning's: what is sharded is saved in shards.
        None if strategy.shard.shards_param() => {
            reasons.push(format!("state_dict_type = sharded: {} is", strategy.name));
            StateDictType::Sharded
        }
        None => StateDictType::Full,
        Some(text) => {
            reasons.push(format!("state_dict_type = {}: asked for", text.trim()));
            StateDictType::parse(text)?
        }
    };
    Ok(Resolved {
        accelerator,
        devices,
        strategy,
        precision,
        state_dict_type,
        reasons,
    })
}

fn accelerator(name: Option<&str>, reasons: &mut Vec<String>) -> Result<&'static str> {
    let name = name.unwrap_or("auto").trim().to_ascii_lowercase();
    match name.as_str() {
        "auto" => reasons.push("accelerator = cpu: the only one that this version drives".into()),
        "cpu" => reasons.push("accelerator = cpu: asked for".into()),
        "cuda" | "gpu" | "mps" | "metal" | "tpu" => {
            return Err(Error::argument(
                format!("accelerator '{name}' is not driven by this version"),
                "Use accelerator(\"cpu\")",
            ));
        }
        _ => {
            return Err(Error::argument(
                format!("accelerator '{name}' is not known"),
                "Choose one of auto, cpu",
            ));
        }
    }
    Ok("cpu")
}

/// Refuse a group that was asked for where nothing is grouped.
pub(crate) fn check_group(row: &Row, group: Option<usize>) -> Result<()> {
    match group {
        Some(ranks) if row.replica.is_none() => Err(Error::argument(
            format!("groups of {ranks} under '{}', which has none", row.name),
            "Choose 'hsdp', which shards within groups, or leave the group out",
        )),
        _ => Ok(()),
    }
}

/// The strategy of this name.
pub(crate) fn row(name: &str) -> Result<Row> {
    Row::named(name).ok_or_else(|| {
        let known = ROWS.map(|row| row.name).join(", ");
        Error::argument(
            format!("strategy '{name}' is not known"),
            format!("Choose one of auto, {known}"),
        )
    })
}

fn strategy(name: Option<&str>, devices: usize, reasons: &mut Vec<String>) -> Result<Row> {
    let name = name.unwrap_or("auto").trim();
    if name.eq_ignore_ascii_case("auto") {
        let (row, why) = match devices {
            1 => (SINGLE, "one device"),
            _ => (DDP, "several devices"),
        };
        reasons.push(format!("strategy = {}: \"auto\" with {why}", row.name));
        return Ok(row);
    }
    let row = row(name)?;
    if row == SINGLE && devices > 1 {
        return Err(Error::argument(
            format!("strategy 'single' with {devices} devices"),
            "Use strategy \"ddp\" for several devices, or one device",
        ));
    }
    reasons.push(format!("strategy = {}: asked for", row.name));
    Ok(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(strategy: &str, devices: usize) -> Request {
        Request {
            strategy: Some(strategy.into()),
            devices: devices.into(),
            ..Request::default()
        }
    }

    #[test]
    fn auto_is_single_on_one_device_and_ddp_on_several() {
        assert_eq!(resolve(&Request::default(), None).unwrap().strategy, SINGLE);
        assert_eq!(resolve(&request("auto", 3), None).unwrap().strategy, DDP);
        assert_eq!(resolve(&request("AUTO", 1), Some(4)).unwrap().devices, 4);
    }

    #[test]
    fn bad_requests_say_what_to_do() {
        let text = |request: Request| resolve(&request, None).unwrap_err().to_string();
        assert!(text(request("ddp", 0)).contains("Ask for at least one"));
        assert!(text(request("dpp", 2)).contains("Choose one of auto, single, ddp"));
        assert!(text(request("single", 2)).contains("Use strategy \"ddp\""));
        let precision = Request {
            precision: Some("31-true".into()),
            ..Request::default()
        };
        assert!(text(precision).contains("32-true, 64-true"));
        let accelerator = Request {
            accelerator: Some("cuda".into()),
            ..Request::default()
        };
        assert!(text(accelerator).contains("Use accelerator(\"cpu\")"));
    }

    #[test]
    fn every_choice_has_a_reason() {
        let resolved = resolve(&request("ddp", 2), None).unwrap();
        assert_eq!(resolved.reasons.len(), 4);
        assert!(
            resolved
                .reasons
                .contains(&"strategy = ddp: asked for".to_string())
        );
    }

    #[test]
    fn an_old_spelling_of_a_precision_is_remarked_on() {
        let reason = |text: &str| {
            let request = Request {
                precision: Some(text.into()),
                ..Request::default()
            };
            resolve(&request, None).unwrap().reasons.pop().unwrap()
        };
        assert_eq!(reason("BF16-Mixed"), "precision = bf16-mixed: asked for");
        assert_eq!(
            reason("16"),
            "precision = 16-mixed: asked for as \"16\", which is better written out"
        );
    }

    #[test]
    fn devices_are_read_from_text() {
        assert_eq!(Devices::parse("auto").unwrap(), Devices::Auto);
        assert_eq!(Devices::parse(" 4 ").unwrap(), Devices::Count(4));
        assert!(
            Devices::parse("many")
                .unwrap_err()
                .to_string()
                .contains("devices = 'many'")
        );
    }
}
