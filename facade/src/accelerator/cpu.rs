//! The processor: always there, shared by all ranks.

use super::Accelerator;

/// "cpu".
pub struct Cpu;

impl Accelerator for Cpu {
    fn name(&self) -> &str {
        "cpu"
    }

    fn devices(&self) -> Result<Vec<String>, String> {
        let model = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = model.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == "model name").then(|| value.trim().to_string())
        });
        let model = model.unwrap_or_else(|| std::env::consts::ARCH.to_string());
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(vec![format!("{model} ({cores} cores)")])
    }

    fn auto_count(&self, _found: usize) -> usize {
        1 // as Lightning's: more is a choice, because ranks then share the cores
    }

    fn is_numbered(&self) -> bool {
        false
    }
}
