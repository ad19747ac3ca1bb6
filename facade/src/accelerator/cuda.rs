//! NVIDIA's GPUs: listed by the driver's library in a build with the feature `cuda`, and otherwise through what the
//! kernel's driver says of itself, so that a machine without one, or without any of NVIDIA's libraries, is no trouble.

#[cfg(any(test, not(feature = "cuda")))]
use std::{fs, path::Path};

#[cfg(feature = "cuda")]
use {
    fabric_engine::{
        Error as EngineError,
        comm::{Communicator, host::Host, nccl::Nccl},
        kernels,
    },
    std::sync::Arc,
};

use super::Accelerator;

/// "cuda".
pub struct Cuda;

impl Accelerator for Cuda {
    fn name(&self) -> &str {
        "cuda"
    }

    #[cfg(feature = "cuda")]
    fn devices(&self) -> Result<Vec<String>, String> {
        kernels::cuda::devices()
    }

    #[cfg(not(feature = "cuda"))]
    fn devices(&self) -> Result<Vec<String>, String> {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        find(Path::new("/proc/driver/nvidia"), visible.as_deref())
    }

    #[cfg(not(feature = "cuda"))]
    fn backend(&self) -> Result<(), String> {
        Err("this program was built without them: build it with --features cuda".into())
    }

    #[cfg(feature = "cuda")]
    fn open(&self, index: usize) -> crate::Result<Option<Arc<dyn kernels::Device>>> {
        let queue = kernels::cuda::Queue::open(index as u32);
        let queue = queue.map_err(|error| EngineError::library("open the device", error))?;
        Ok(Some(queue))
    }

    #[cfg(feature = "cuda")]
    fn connect(
        &self,
        host: Host,
        device: &Arc<dyn kernels::Device>,
    ) -> crate::Result<Box<dyn Communicator>> {
        Ok(Box::new(Nccl::over(host, device)?))
    }
}

#[cfg(any(test, not(feature = "cuda")))]
struct Card {
    name: String,
    uuid: String,
}

/// The cards under `driver` that `visible` (CUDA_VISIBLE_DEVICES) leaves, in its order.
#[cfg(any(test, not(feature = "cuda")))]
fn find(driver: &Path, visible: Option<&str>) -> Result<Vec<String>, String> {
    let cards = cards(driver);
    if cards.is_empty() {
        return Err(format!(
            "no NVIDIA driver with a GPU was found ({} lists none)",
            driver.join("gpus").display()
        ));
    }
    let Some(visible) = visible else {
        return Ok(cards.into_iter().map(|card| card.name).collect());
    };
    // As the driver reads it: the first entry that names no card ends the list.
    let named = |entry: &str| match entry.parse::<usize>() {
        Ok(index) => cards.get(index),
        Err(_) => cards
            .iter()
            .find(|card| entry.starts_with("GPU-") && card.uuid.starts_with(entry)),
    };
    let chosen = visible.split(',').map_while(|entry| named(entry.trim()));
    let names: Vec<_> = chosen.map(|card| card.name.clone()).collect();
    if names.is_empty() {
        return Err(format!(
            "CUDA_VISIBLE_DEVICES = '{visible}' hides all {} GPUs",
            cards.len()
        ));
    }
    Ok(names)
}

/// The driver's cards in the order of their bus.
#[cfg(any(test, not(feature = "cuda")))]
fn cards(driver: &Path) -> Vec<Card> {
    let folders = fs::read_dir(driver.join("gpus"));
    let mut folders: Vec<_> = folders.into_iter().flatten().flatten().collect();
    folders.sort_by_key(fs::DirEntry::file_name);
    let card = |folder: fs::DirEntry| {
        let text = fs::read_to_string(folder.path().join("information")).ok()?;
        let field = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_string())
        };
        Some(Card {
            name: field("Model")?,
            uuid: field("GPU UUID").unwrap_or_default(),
        })
    };
    folders.into_iter().filter_map(card).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn driver(cards: &[(&str, &str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (bus, model, uuid) in cards {
            let card = folder.path().join("gpus").join(bus);
            fs::create_dir_all(&card).unwrap();
            let text = format!("Model: \t\t {model}\nIRQ:   \t\t 44\nGPU UUID: \t {uuid}\n");
            fs::write(card.join("information"), text).unwrap();
        }
        folder
    }

    #[test]
    fn cards_are_listed_by_their_bus_and_narrowed_by_visible_devices() {
        let folder = driver(&[
            ("0000:b1:00.0", "NVIDIA L4", "GPU-bbbb-1"),
            ("0000:17:00.0", "NVIDIA H200", "GPU-aaaa-2"),
        ]);
        let find = |visible| find(folder.path(), visible);
        assert_eq!(find(None).unwrap(), ["NVIDIA H200", "NVIDIA L4"]);
        assert_eq!(find(Some("1,0")).unwrap(), ["NVIDIA L4", "NVIDIA H200"]);
        assert_eq!(find(Some("GPU-bbbb")).unwrap(), ["NVIDIA L4"]);
        assert_eq!(find(Some("0,7,1")).unwrap(), ["NVIDIA H200"]);
        for hidden in ["", "-1", "9", "MIG-1"] {
            let why = find(Some(hidden)).unwrap_err();
            assert!(why.contains("hides all 2"), "{why}");
        }
    }

    #[test]
    fn no_driver_is_an_answer() {
        let folder = driver(&[]);
        let why = find(folder.path(), None).unwrap_err();
        assert!(why.contains("no NVIDIA driver"), "{why}");
    }
}
