//! Strategies by name: each is a row of the engine's table of placements, and what it changes about the options. Lightning's
//! names are known, and [`register`] adds others.
//!
//! ```
//! use fabric::{Fabric, engine::shard::{placement::FSDP, plan::Reshard}, strategy::{self, Preset}};
//!
//! let keep = Preset::new("fsdp_keep", FSDP)
//!     .about("sharded, but blocks stay from their forward to the update")
//!     .with(|options| options.reshard_after_forward = Reshard::No);
//! strategy::register(keep)?;
//! let fabric = Fabric::builder().devices(2).strategy("fsdp_keep").build()?;
//! assert!(fabric.explain().contains("strategy = fsdp: asked for as fsdp_keep"));
//! # Ok::<(), fabric::Error>(())
//! ```

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use fabric_engine::shard::{
    placement::{DDP, FSDP, HSDP, Row, SINGLE, ZERO1, ZERO2},
    plan::{Options, Reshard},
};

use crate::error::{Error, Result};

type Change = Arc<dyn Fn(&mut Options) + Send + Sync>;

/// A strategy with a name.
#[derive(Clone)]
pub struct Preset {
    name: String,
    about: String,
    row: Row,
    change: Option<Change>,
}

impl Preset {
    /// `row` under another name.
    pub fn new(name: impl Into<String>, row: Row) -> Self {
        Self {
            name: name.into(),
            about: String::new(),
            row,
            change: None,
        }
    }

    /// What it is, in a few words.
    pub fn about(self, about: impl Into<String>) -> Self {
        Self {
            about: about.into(),
            ..self
        }
    }

    /// What it changes about the options that were given.
    pub fn with(self, change: impl Fn(&mut Options) + Send + Sync + 'static) -> Self {
        Self {
            change: Some(Arc::new(change)),
            ..self
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is, in a few words.
    pub fn description(&self) -> &str {
        &self.about
    }

    /// The placements.
    pub fn row(&self) -> Row {
        self.row
    }

    pub(crate) fn apply(&self, options: &mut Options) {
        if let Some(change) = &self.change {
            change(options);
        }
    }
}

impl fmt::Debug for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = f.debug_struct("Preset");
        text.field("name", &self.name).field("row", &self.row.name);
        text.finish_non_exhaustive()
    }
}

/// Lightning's names and ours.
fn built_in() -> Vec<Preset> {
    let plain = |name: &str, row: Row, about: &str| Preset::new(name, row).about(about);
    let offload = |name: &str, row: Row, about: &str| {
        plain(name, row, about).with(|options| options.offload = true)
    };
    let keep = |name: &str, row: Row, about: &str| {
        plain(name, row, about).with(|options| options.reshard_after_forward = Reshard::No)
    };
    let ranks = "as ddp: fabric.launch starts processes, fabric.launch_threads threads";
    let states = "as zero1, with what is updated in the host's memory";
    let slices = "as zero2, with what is updated in the host's memory";
    let shards = "as fsdp, with what is updated in the host's memory";
    vec![
        plain("single", SINGLE, "one device"),
        plain("ddp", DDP, "gradients averaged in buckets"),
        plain("zero1", ZERO1, "ddp with a sharded update"),
        plain("zero2", ZERO2, "zero1 with sharded gradients"),
        plain("fsdp", FSDP, "parameters sharded too, gathered by unit"),
        plain("hsdp", HSDP, "fsdp within groups, ddp across them"),
        plain("ddp_spawn", DDP, ranks),
        plain("ddp_fork", DDP, ranks),
        plain("ddp_notebook", DDP, ranks),
        plain(
            "ddp_find_unused_parameters_true",
            DDP,
            "as ddp, which always finds them",
        ),
        plain(
            "ddp_find_unused_parameters_false",
            DDP,
            "as ddp, which always finds them",
        ),
        plain("dp", DDP, "as ddp: each device has a rank of its own"),
        plain("deepspeed", ZERO2, "as zero2, DeepSpeed's default stage"),
        plain("deepspeed_stage_1", ZERO1, "as zero1"),
        offload("deepspeed_stage_1_offload", ZERO1, states),
        plain("deepspeed_stage_2", ZERO2, "as zero2"),
        offload("deepspeed_stage_2_offload", ZERO2, slices),
        plain("deepspeed_stage_3", FSDP, "as fsdp"),
        offload("deepspeed_stage_3_offload", FSDP, shards),
        plain("zero3", FSDP, "as fsdp"),
        offload("fsdp_cpu_offload", FSDP, shards),
        plain("full_shard", FSDP, "as fsdp"),
        keep(
            "shard_grad_op",
            FSDP,
            "as fsdp, but units stay from their forward to the update",
        ),
        plain("no_shard", DDP, "as ddp"),
        plain("hybrid_shard", HSDP, "as hsdp"),
        keep(
            "_hybrid_shard_zero2",
            HSDP,
            "as hsdp, but units stay from their forward to the update",
        ),
    ]
}

/// Names that Lightning knows and that cannot be run: why not, and what to take instead.
const REFUSED: [(&str, &str, &str); 6] = [
    (
        "deepspeed_stage_3_offload_nvme",
        "keeps parameters on a disk, which is not built",
        "Use deepspeed_stage_3_offload, which keeps what is updated in the host's memory",
    ),
    (
        "model_parallel",
        "needs tensor parallelism, which is not built",
        "Use fsdp or hsdp: their shards need no change of the model's arithmetic",
    ),
    ("xla", TPU, TPU_HINT),
    ("xla_fsdp", TPU, TPU_HINT),
    ("single_xla", TPU, TPU_HINT),
    ("single_tpu", TPU, TPU_HINT),
];
const TPU: &str = "is for TPUs, on which this build cannot compute";
const TPU_HINT: &str = "Use ddp or fsdp on the accelerators that `fabric env` lists as available";

/// The strategy of this name, in any case.
///
/// # Errors
/// When it is unknown (lists the known), or cannot be run (says why).
pub fn named(name: &str) -> Result<Preset> {
    let name = name.trim();
    let known = registry();
    if let Some(preset) = position(&known, name).map(|index| known[index].clone()) {
        return Ok(preset);
    }
    let mut refused = REFUSED.into_iter();
    if let Some((name, why, hint)) = refused.find(|(known, ..)| known.eq_ignore_ascii_case(name)) {
        return Err(Error::argument(format!("strategy '{name}' {why}"), hint));
    }
    let known: Vec<_> = known.iter().map(Preset::name).collect();
    Err(Error::argument(
        format!("strategy '{name}' is not known"),
        format!("Choose one of auto, {}", known.join(", ")),
    ))
}

/// All that can be run, in the order of registration.
pub fn available() -> Vec<Preset> {
    registry().clone()
}

/// Add a strategy of your own.
///
/// # Errors
/// When its name is taken: [`replace`] would take its place.
pub fn register(preset: Preset) -> Result<()> {
    let mut known = registry();
    if preset.name.eq_ignore_ascii_case("auto") || position(&known, &preset.name).is_some() {
        return Err(Error::argument(
            format!("there is a strategy '{}' already", preset.name),
            "Choose another name, or strategy::replace it",
        ));
    }
    known.push(preset);
    Ok(())
}

/// Put a strategy in the place of the one that has its name, or add it.
pub fn replace(preset: Preset) {
    let mut known = registry();
    match position(&known, &preset.name) {
        Some(index) => known[index] = preset,
        None => known.push(preset),
    }
}

/// Forget the strategy of this name; whether there was one.
pub fn remove(name: &str) -> bool {
    let mut known = registry();
    let index = position(&known, name);
    index.map(|index| known.remove(index)).is_some()
}

fn registry() -> MutexGuard<'static, Vec<Preset>> {
    static REGISTRY: OnceLock<Mutex<Vec<Preset>>> = OnceLock::new();
    let registry = REGISTRY.get_or_init(|| Mutex::new(built_in())).lock();
    registry.unwrap_or_else(PoisonError::into_inner)
}

fn position(known: &[Preset], name: &str) -> Option<usize> {
    let called = |preset: &Preset| preset.name.eq_ignore_ascii_case(name);
    known.iter().position(called)
}

/// What [`crate::Builder::strategy`] takes: a name, or a strategy itself.
#[derive(Clone, Debug)]
pub enum Strategy {
    /// By name, or "auto".
    Named(String),
    /// This one, registered or not.
    Preset(Preset),
}

impl Strategy {
    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::Named(name) => name.trim(),
            Self::Preset(preset) => &preset.name,
        }
    }

    /// Itself; `None` for "auto".
    ///
    /// # Errors
    /// As [`named`].
    pub fn preset(&self) -> Result<Option<Preset>> {
        match self {
            Self::Named(_) if self.name().eq_ignore_ascii_case("auto") => Ok(None),
            Self::Named(_) => named(self.name()).map(Some),
            Self::Preset(preset) => Ok(Some(preset.clone())),
        }
    }
}

impl From<&str> for Strategy {
    fn from(name: &str) -> Self {
        Self::Named(name.into())
    }
}

impl From<&String> for Strategy {
    fn from(name: &String) -> Self {
        Self::Named(name.clone())
    }
}

impl From<String> for Strategy {
    fn from(name: String) -> Self {
        Self::Named(name)
    }
}

impl From<Preset> for Strategy {
    fn from(preset: Preset) -> Self {
        Self::Preset(preset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Section 2.3 of the inventory: every name that Lightning registers either runs or says why not.
    #[test]
    fn line_42_all_of_lightnings_names_are_known() {
        let runs = [
            ("ddp", "ddp"),
            ("ddp_spawn", "ddp"),
            ("ddp_fork", "ddp"),
            ("ddp_notebook", "ddp"),
            ("ddp_find_unused_parameters_true", "ddp"),
            ("dp", "ddp"),
            ("deepspeed", "zero2"),
            ("deepspeed_stage_1", "zero1"),
            ("deepspeed_stage_1_offload", "zero1"),
            ("deepspeed_stage_2", "zero2"),
            ("deepspeed_stage_2_offload", "zero2"),
            ("deepspeed_stage_3", "fsdp"),
            ("deepspeed_stage_3_offload", "fsdp"),
            ("fsdp", "fsdp"),
            ("fsdp_cpu_offload", "fsdp"),
        ];
        for (name, row) in runs {
            let preset = named(&name.to_uppercase()).unwrap();
            assert_eq!(preset.row().name, row, "{name}");
            let mut options = Options::default();
            preset.apply(&mut options);
            assert_eq!(options.offload, name.ends_with("offload"), "{name}");
        }
        for name in [
            "deepspeed_stage_3_offload_nvme",
            "single_xla",
            "xla",
            "xla_fsdp",
            "single_tpu",
            "model_parallel",
        ] {
            let why = named(name).unwrap_err().to_string();
            assert!(why.contains(name) && why.contains("Use "), "{why}");
        }
    }

    #[test]
    fn an_unknown_name_is_told_the_known() {
        let why = named("dpp").unwrap_err().to_string();
        assert!(
            why.contains("Choose one of auto, single, ddp, zero1"),
            "{why}"
        );
    }

    #[test]
    fn line_3_a_name_is_registered_once_replaced_and_removed() {
        register(Preset::new("mine", FSDP)).unwrap();
        let taken = register(Preset::new("MINE", DDP)).unwrap_err().to_string();
        assert!(taken.contains("already"), "{taken}");
        replace(Preset::new("mine", DDP));
        assert_eq!(named("Mine").unwrap().row(), DDP);
        assert!(remove("mine") && !remove("mine"));
        assert!(named("mine").is_err());
    }
}
