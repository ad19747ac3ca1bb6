//! Accelerators: what ranks can compute on, by name. Looking for one never fails: what is not there says what was looked for.
//!
//! ```
//! use fabric::accelerator::{self, Accelerator};
//!
//! /// An NPU with a driver of its own.
//! struct Npu;
//! impl Accelerator for Npu {
//!     fn name(&self) -> &str {
//!         "npu"
//!     }
//!     fn devices(&self) -> Result<Vec<String>, String> {
//!         Err("there is no /dev/npu0".into())
//!     }
//! }
//!
//! accelerator::register(Npu)?;
//! let error = fabric::Fabric::builder().accelerator("npu").build().err().expect("there is none here");
//! assert!(error.to_string().contains("/dev/npu0"));
//! # Ok::<(), fabric::Error>(())
//! ```

mod cpu;
mod cuda;
mod device;
mod metal;
mod tpu;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

pub use cpu::Cpu;
pub use cuda::Cuda;
pub use device::Device;
pub use metal::Metal;
pub use tpu::Tpu;

use fabric_engine::{
    comm::{Communicator, host::Host},
    kernels,
};

use crate::{Error, Result};

/// A kind of device. Those that Fabric knows are [`Cpu`], [`Cuda`], [`Metal`] and [`Tpu`]; [`register`] adds others.
pub trait Accelerator: Send + Sync {
    /// Its name, in lower case: what `Builder::accelerator` is given.
    fn name(&self) -> &str;

    /// Other names for it.
    fn aliases(&self) -> &[&str] {
        &[]
    }

    /// The devices of this machine that this process may use, as their makers call them, by number.
    ///
    /// # Errors
    /// When there is none: what was looked for, as the end of a sentence.
    fn devices(&self) -> std::result::Result<Vec<String>, String>;

    /// Whether ranks of this build can compute on it.
    ///
    /// # Errors
    /// When they cannot: what is missing, as the end of a sentence.
    fn backend(&self) -> std::result::Result<(), String> {
        Ok(())
    }

    /// Open the device of this number for a rank: what its memory is, and the queue of work on it. `None` is the host's
    /// memory, in which ranks then compute.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn open(&self, index: usize) -> Result<Option<Arc<dyn kernels::Device>>> {
        let _ = index;
        Ok(None)
    }

    /// The communicator over the memory of `device`, of the ranks of `host`, which connects their hosts. All ranks call
    /// this together.
    ///
    /// # Errors
    /// When there is none.
    fn connect(
        &self,
        host: Host,
        device: &Arc<dyn kernels::Device>,
    ) -> Result<Box<dyn Communicator>> {
        let _ = host;
        Err(Error::argument(
            format!("nothing connects ranks over {} memory", device.memory()),
            "Implement Accelerator::connect, or use one device",
        ))
    }

    /// How many ranks `devices("auto")` starts where `found` devices are.
    fn auto_count(&self, found: usize) -> usize {
        found
    }

    /// Whether each rank has a device of its own, which a number names. Ranks on a CPU share it.
    fn is_numbered(&self) -> bool {
        true
    }
}

/// What looking for one accelerator has brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// [`Accelerator::name`].
    pub name: String,
    /// [`Accelerator::aliases`].
    pub aliases: Vec<String>,
    /// [`Accelerator::devices`].
    pub devices: std::result::Result<Vec<String>, String>,
    /// [`Accelerator::backend`].
    pub backend: std::result::Result<(), String>,
    /// [`Accelerator::auto_count`] of the devices found.
    pub auto_count: usize,
    /// [`Accelerator::is_numbered`].
    pub is_numbered: bool,
}

impl Found {
    fn of(accelerator: &dyn Accelerator) -> Self {
        let devices = accelerator.devices();
        let aliases = accelerator.aliases().iter();
        Self {
            name: accelerator.name().into(),
            aliases: aliases.map(ToString::to_string).collect(),
            auto_count: accelerator.auto_count(devices.as_ref().map_or(0, Vec::len)),
            devices,
            backend: accelerator.backend(),
            is_numbered: accelerator.is_numbered(),
        }
    }

    /// Whether it is called so, in any case.
    pub fn is_called(&self, name: &str) -> bool {
        let mut names = self.aliases.iter().chain([&self.name]);
        names.any(|known| known.eq_ignore_ascii_case(name))
    }

    /// Whether ranks can run on it here and now.
    ///
    /// # Errors
    /// When they cannot: why.
    pub fn is_available(&self) -> std::result::Result<(), String> {
        let devices = self.devices.as_ref().map_err(Clone::clone)?;
        self.backend
            .as_ref()
            .map_err(|why| format!("{} found, but {why}", devices.join(", ")))
            .copied()
    }
}

/// A machine's accelerators, in the order in which "auto" prefers them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hardware(pub Vec<Found>);

impl Hardware {
    /// Look for every accelerator that is registered.
    pub fn look() -> Self {
        let known = registry().clone();
        Self(known.iter().map(|known| Found::of(&**known)).collect())
    }

    /// The accelerator of this name.
    ///
    /// # Errors
    /// When none has it: lists the known.
    pub fn named(&self, name: &str) -> Result<&Found> {
        let found = self.0.iter().find(|found| found.is_called(name));
        found.ok_or_else(|| {
            let known: Vec<_> = self.0.iter().map(|found| found.name.as_str()).collect();
            Error::argument(
                format!("accelerator '{name}' is not known"),
                format!("Choose one of auto, gpu, {}", known.join(", ")),
            )
        })
    }

    /// The names of those on which ranks can run here and now.
    pub fn available(&self) -> Vec<&str> {
        let runs = self.0.iter().filter(|found| found.is_available().is_ok());
        runs.map(|found| found.name.as_str()).collect()
    }
}

type Registry = Vec<Arc<dyn Accelerator>>;

fn registry() -> MutexGuard<'static, Registry> {
    static REGISTRY: OnceLock<Mutex<Registry>> = OnceLock::new();
    let built_in = || -> Mutex<Registry> {
        Mutex::new(vec![
            Arc::new(Tpu),
            Arc::new(Metal),
            Arc::new(Cuda),
            Arc::new(Cpu),
        ])
    };
    let registry = REGISTRY.get_or_init(built_in).lock();
    registry.unwrap_or_else(PoisonError::into_inner)
}

fn position(known: &Registry, name: &str) -> Option<usize> {
    known.iter().position(|known| {
        let mut aliases = known.aliases().iter();
        known.name().eq_ignore_ascii_case(name)
            || aliases.any(|alias| alias.eq_ignore_ascii_case(name))
    })
}

/// The accelerator of this name.
pub(crate) fn named(name: &str) -> Option<Arc<dyn Accelerator>> {
    let known = registry();
    position(&known, name).map(|index| known[index].clone())
}

/// Add an accelerator of your own; "auto" prefers it to those that were there.
///
/// # Errors
/// When its name is taken: [`replace`] would take its place.
pub fn register(accelerator: impl Accelerator + 'static) -> Result<()> {
    let mut known = registry();
    let name = accelerator.name();
    if ["auto", "gpu"].contains(&name) || position(&known, name).is_some() {
        return Err(Error::argument(
            format!("there is an accelerator '{name}' already"),
            "Choose another name, or accelerator::replace it",
        ));
    }
    known.insert(0, Arc::new(accelerator));
    Ok(())
}

/// Put an accelerator in the place of the one that has its name, or add it.
pub fn replace(accelerator: impl Accelerator + 'static) {
    let mut known = registry();
    match position(&known, accelerator.name()) {
        Some(index) => known[index] = Arc::new(accelerator),
        None => known.insert(0, Arc::new(accelerator)),
    }
}

/// Forget the accelerator of this name; whether there was one.
pub fn remove(name: &str) -> bool {
    let mut known = registry();
    let index = position(&known, name);
    index.map(|index| known.remove(index)).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Named(&'static str, usize);

    impl Accelerator for Named {
        fn name(&self) -> &str {
            self.0
        }
        fn devices(&self) -> std::result::Result<Vec<String>, String> {
            Ok(vec!["a card".into(); self.1])
        }
    }

    #[test]
    fn a_name_is_registered_once_replaced_and_removed() {
        register(Named("abacus", 1)).unwrap();
        let taken = register(Named("abacus", 2)).unwrap_err().to_string();
        assert!(taken.contains("'abacus' already"), "{taken}");
        assert!(register(Named("gpu", 2)).is_err());
        replace(Named("abacus", 3));
        let hardware = Hardware::look();
        assert_eq!(hardware.named("ABACUS").unwrap().auto_count, 3);
        assert!(remove("abacus") && !remove("abacus"));
        let unknown = Hardware::look().named("abacus").unwrap_err().to_string();
        assert!(
            unknown.contains("auto, gpu,") && unknown.contains("cuda, cpu"),
            "{unknown}"
        );
    }

    #[test]
    fn looking_never_fails_and_says_what_is_missing() {
        let hardware = Hardware::look();
        for name in ["tpu", "metal", "mps", "cuda", "cpu"] {
            let found = hardware.named(name).unwrap();
            if let Err(why) = found.is_available() {
                assert!(why.len() > 20, "{name}: {why}");
            }
        }
        assert!(hardware.available().contains(&"cpu"));
    }
}
