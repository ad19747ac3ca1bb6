//! The output of an operation that was there before the operation: all that is left to do is to hand it over.

use std::sync::Mutex;

use candle_core::{CpuStorage, CudaStorage, Result, Storage, bail};

/// Memory that an operation was made with, and that is its output.
pub(crate) struct Made(Mutex<Option<Storage>>);

impl Made {
    pub(crate) fn new(memory: Storage) -> Self {
        Self(Mutex::new(Some(memory)))
    }

    /// For the forward on a CPU.
    pub(crate) fn on_cpu(&self) -> Result<CpuStorage> {
        match self.only()? {
            Storage::Cpu(memory) => Ok(memory),
            _ => bail!("an output that was made elsewhere than its operation"),
        }
    }

    /// For the forward on a CUDA device.
    pub(crate) fn on_cuda(&self) -> Result<CudaStorage> {
        match self.only()? {
            Storage::Cuda(memory) => Ok(memory),
            _ => bail!("an output that was made elsewhere than its operation"),
        }
    }

    fn only(&self) -> Result<Storage> {
        let mut memory = self.0.lock().unwrap_or_else(|held| held.into_inner());
        match memory.take() {
            Some(memory) => Ok(memory),
            None => bail!("an operation whose output was made beforehand runs forward once"),
        }
    }
}
