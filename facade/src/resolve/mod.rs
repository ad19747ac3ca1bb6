//! From what was asked for to what will be done: a pure function of the request, the environment's ranks and the machine's
//! devices, in which every choice has its reason.

mod devices;
mod overrides;
mod wire;

use std::time::Duration;

use fabric_engine::shard::placement::{Row, SINGLE};

pub use crate::precision::Precision;
use crate::{
    accelerator::{Device, Found, Hardware},
    checkpoint::StateDictType,
    environment::{Detection, Place},
    error::{Error, Result},
    strategy::{self, Preset, Strategy},
};
pub use devices::Devices;
pub(crate) use overrides::seconds;
pub use wire::Wire;

/// What was asked for, in the user's words.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// "auto", "cpu", ...
    pub accelerator: Option<String>,
    /// "auto", "single", "ddp", ..., or one that was made.
    pub strategy: Option<Strategy>,
    /// How many devices of each machine, or which.
    pub devices: Devices,
    /// How many machines.
    pub num_nodes: Option<usize>,
    /// "32-true", "bf16-mixed", ...
    pub precision: Option<String>,
    /// "full" or "sharded".
    pub state_dict_type: Option<String>,
    /// "auto", "shm", "unix" or "tcp".
    pub wire: Option<String>,
    /// How long one collective may take.
    pub timeout: Option<Duration>,
}

/// What will be done.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The accelerator's name.
    pub accelerator: String,
    /// The devices of this machine's ranks, by local rank. Ranks on a CPU have no device of their own: these are just numbers.
    pub device_indices: Vec<usize>,
    /// Machines.
    pub num_nodes: usize,
    /// Ranks.
    pub world_size: usize,
    /// The placements of the strategy.
    pub strategy: Row,
    /// The strategy, as it was asked for.
    pub preset: Preset,
    /// The precision.
    pub precision: Precision,
    /// The form of checkpoints.
    pub state_dict_type: StateDictType,
    /// What connects the ranks.
    pub wire: Wire,
    /// How long one collective may take, where that was asked for.
    pub timeout: Option<Duration>,
    /// Whether each rank has a device of its own: [`Found::is_numbered`].
    pub is_numbered: bool,
    /// Each choice with its reason, a line each.
    pub reasons: Vec<String>,
}

impl Resolved {
    /// Ranks on this machine.
    pub fn devices(&self) -> usize {
        self.device_indices.len()
    }

    /// The device of this machine's rank number `local_rank`.
    pub fn device(&self, local_rank: usize) -> Device {
        let index = self.device_indices.get(local_rank).copied();
        Device {
            accelerator: self.accelerator.clone(),
            index: index.filter(|_| self.is_numbered),
        }
    }
}

/// Resolve a request on this `hardware`, where a launcher may have started ranks already, of which this is one.
///
/// # Errors
/// When a name is unknown, a device is not there, or the choices contradict each other or the ranks that were started.
pub fn resolve(
    request: &Request,
    started_by: Option<&Detection>,
    hardware: &Hardware,
) -> Result<Resolved> {
    let mut reasons = Vec::new();
    let found = accelerator(request.accelerator.as_deref(), hardware, &mut reasons)?;
    if let Some(detection) = started_by {
        reasons.push(detection.reason.clone());
        reasons.extend(detection.remarks.iter().cloned());
    }
    let place = started_by.and_then(|detection| detection.place.as_ref());
    let (device_indices, num_nodes, world_size) = match place {
        Some(place) => started(request, place, found)?,
        None => asked(request, found, &mut reasons)?,
    };
    let preset = strategy(request, world_size, num_nodes, &mut reasons)?;
    let row = preset.row();
    let precision = precision(request.precision.as_deref(), &mut reasons)?;
    let state_dict_type = match request.state_dict_type.as_deref() {
        // As Lightning's: what is sharded is saved in shards.
        None if row.shard.shards_param() => {
            reasons.push(format!("state_dict_type = sharded: {} is", row.name));
            StateDictType::Sharded
        }
        None => StateDictType::Full,
        Some(text) => {
            reasons.push(format!("state_dict_type = {}: asked for", text.trim()));
            StateDictType::parse(text)?
        }
    };
    let wire = match request.wire.as_deref() {
        None => Wire::Auto,
        Some(text) => Wire::parse("wire", text)?,
    };
    if request.timeout.is_some_and(|timeout| timeout.is_zero()) {
        return Err(Error::argument(
            "timeout = 0 s",
            "Give how long one collective may take, like Duration::from_secs(600)",
        ));
    }
    reasons.extend(request.timeout.map(|timeout| {
        let seconds = timeout.as_secs_f64();
        format!("timeout = {seconds} s for one collective: asked for")
    }));
    Ok(Resolved {
        accelerator: found.name.clone(),
        device_indices,
        num_nodes,
        world_size,
        strategy: row,
        preset,
        precision,
        state_dict_type,
        wire,
        timeout: request.timeout,
        is_numbered: found.is_numbered,
        reasons,
    })
}

/// The accelerator: "auto" takes the first that can run, "gpu" the first such that is one.
fn accelerator<'a>(
    name: Option<&str>,
    hardware: &'a Hardware,
    reasons: &mut Vec<String>,
) -> Result<&'a Found> {
    let name = name.unwrap_or("auto").trim();
    let is = |known: &str| name.eq_ignore_ascii_case(known);
    if !is("auto") && !is("gpu") {
        let found = hardware.named(name)?;
        found.is_available().map_err(|why| {
            Error::argument(
                format!("accelerator '{}' cannot be used here: {why}", found.name),
                format!(
                    "Choose one of those that can: {}",
                    hardware.available().join(", ")
                ),
            )
        })?;
        reasons.push(format!("accelerator = {}: asked for", found.name));
        return Ok(found);
    }
    let gpus = ["metal", "cuda"];
    let mut candidates = hardware.0.iter();
    let mut passed = Vec::new(); // what is there, and cannot be used
    let chosen = candidates.find(|found| {
        if is("gpu") && !gpus.contains(&found.name.as_str()) {
            return false;
        }
        match (found.is_available(), &found.devices) {
            (Ok(()), _) => return true,
            (Err(why), Ok(_)) => passed.push(format!("{} was passed over: {why}", found.name)),
            (Err(why), Err(_)) if is("gpu") => passed.push(format!("{}: {why}", found.name)),
            _ => {}
        }
        false
    });
    let Some(found) = chosen else {
        return Err(Error::argument(
            format!(
                "there is no {name} that this build can use ({})",
                passed.join("; ")
            ),
            format!(
                "Choose one of those that can be used: {}",
                hardware.available().join(", ")
            ),
        ));
    };
    let mut why = format!(
        "accelerator = {}: \"{name}\" takes the first that can be used",
        found.name
    );
    for reason in passed {
        why += &format!("; {reason}");
    }
    reasons.push(why);
    Ok(found)
}

/// Devices, machines and ranks, where a launcher has started them: what was asked for must be what is there, because a
/// rank that believes in another world trains on another share of the data.
fn started(request: &Request, place: &Place, found: &Found) -> Result<(Vec<usize>, usize, usize)> {
    let asked = match &request.devices {
        Devices::Auto | Devices::All => None,
        Devices::Count(count) => Some(*count),
        Devices::List(list) => Some(list.len()),
        Devices::Unreadable(text) => return Err(devices::unreadable(text)),
    };
    place.validate(asked, request.num_nodes)?;
    let list = match &request.devices {
        Devices::List(list) if list.len() == place.local_world => match found.is_numbered {
            true => request.devices.among(found)?,
            false => list.clone(), // it says how many
        },
        _ => (0..place.local_world).collect(),
    };
    Ok((list, place.nodes, place.world))
}

/// Devices, machines and ranks, where `launch` will start them.
fn asked(
    request: &Request,
    found: &Found,
    reasons: &mut Vec<String>,
) -> Result<(Vec<usize>, usize, usize)> {
    let devices = request.devices.among(found)?;
    let count = devices.len();
    reasons.push(match &request.devices {
        Devices::Auto if found.is_numbered => {
            format!(
                "devices = {count}: \"auto\" on {} is all of them",
                found.name
            )
        }
        Devices::Auto => format!("devices = {count}: \"auto\" on a CPU is one process"),
        Devices::All => format!("devices = {count}: all were asked for"),
        devices => format!("devices = {devices}: asked for"),
    });
    let nodes = request.num_nodes.unwrap_or(1);
    if nodes == 0 {
        return Err(Error::argument(
            "num_nodes = 0 was asked for",
            "Ask for at least one machine",
        ));
    }
    if nodes > 1 {
        reasons.push(format!("num_nodes = {nodes}: asked for"));
    }
    let world = count.checked_mul(nodes).ok_or_else(|| {
        Error::argument(
            format!("{count} devices on each of {nodes} machines"),
            "Ask for fewer",
        )
    })?;
    Ok((devices, nodes, world))
}

fn precision(name: Option<&str>, reasons: &mut Vec<String>) -> Result<Precision> {
    let Some(text) = name else {
        reasons.push("precision = 32-true: the default".into());
        return Ok(Precision::F32);
    };
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
    Ok(precision)
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

fn strategy(
    request: &Request,
    world: usize,
    nodes: usize,
    reasons: &mut Vec<String>,
) -> Result<Preset> {
    let asked = request.strategy.as_ref().map(Strategy::preset);
    let Some(preset) = asked.transpose()?.flatten() else {
        let (name, why) = match (world, nodes) {
            (1, _) => ("single", "one device"),
            (_, 1) => ("ddp", "several devices"),
            _ => ("ddp", "several machines"),
        };
        reasons.push(format!("strategy = {name}: \"auto\" with {why}"));
        return strategy::named(name);
    };
    let (row, name) = (preset.row(), preset.name());
    if row == SINGLE && world > 1 {
        return Err(Error::argument(
            format!("strategy '{name}' with {world} devices"),
            "Use strategy \"ddp\" for several devices, or one device",
        ));
    }
    reasons.push(match (row.name == name, preset.description()) {
        (true, _) => format!("strategy = {name}: asked for"),
        (false, "") => format!("strategy = {}: asked for as {name}", row.name),
        (false, about) => format!("strategy = {}: asked for as {name} ({about})", row.name),
    });
    Ok(preset)
}

#[cfg(test)]
mod tests;
