//! The kernels as the driver knows them: modules that are built in, loaded when the first of their kernels is needed.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaContext, result, sys};

use super::abi::THREADS;
use super::driver::refused;
use super::turns::Turns;
use crate::dtype::Memory;
use crate::error::KernelError;

/// A source that was compiled: PTX for every device, and machine code for those that have instructions of their own.
struct Module {
    ptx: &'static str,
    /// By the major number of the compute capability.
    cubins: &'static [(i32, &'static [u8])],
}

/// Bytes where a driver that maps the ELF file in them finds its headers aligned.
#[repr(C, align(64))]
struct Aligned<T>(T);

macro_rules! module {
    ($name:literal $(, $major:literal => $cubin:literal)*) => {
        Module {
            ptx: include_str!(concat!("../../cuda/built/", $name, ".ptx")),
            cubins: &[$(($major, &Aligned(*include_bytes!(concat!("../../cuda/built/", $cubin, ".cubin"))).0)),*],
        }
    };
}

static MODULES: &[Module] = &[
    module!("block", 9 => "block.sm_90", 10 => "block.sm_100"),
    module!("fill"),
    module!("fold"),
    module!("fold_f8"),
    module!("move"),
    module!("move_f8", 9 => "move_f8.sm_90", 10 => "move_f8.sm_100"),
    module!("optim"),
    module!("squares"),
    module!("stochastic"),
];

/// The module of each kernel, as the PTX says.
fn index() -> &'static HashMap<&'static str, usize> {
    static INDEX: OnceLock<HashMap<&'static str, usize>> = OnceLock::new();
    INDEX.get_or_init(|| {
        let names = |(number, module): (usize, &'static Module)| {
            let entries = module.ptx.split(".entry ").skip(1);
            entries.map(move |text| (text.split('(').next().unwrap_or_default().trim(), number))
        };
        MODULES.iter().enumerate().flat_map(names).collect()
    })
}

/// A kernel that is loaded.
#[derive(Copy, Clone)]
pub(super) struct Function {
    handle: sys::CUfunction,
    /// Blocks that the device runs at once.
    most_blocks: u32,
}

/// The kernels of one device. They are loaded into its primary context, and stay.
pub(super) struct Functions {
    context: Arc<CudaContext>,
    major: i32,
    multiprocessors: u32,
    loaded: Mutex<Loaded>,
    turns: Turns,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<usize, sys::CUmodule>,
    functions: HashMap<String, Function>,
}

// SAFETY: handles of modules and functions are numbers to the driver, which any thread may name once the context is bound to
// it. Test: `tests/gpu`, several ranks as threads.
unsafe impl Send for Loaded {}

/// Whether a driver says that it does not understand a cubin.
fn is_too_new(error: result::DriverError) -> bool {
    use sys::CUresult as Code;
    matches!(
        error.0,
        Code::CUDA_ERROR_NO_BINARY_FOR_GPU
            | Code::CUDA_ERROR_INVALID_IMAGE
            | Code::CUDA_ERROR_INVALID_SOURCE
            | Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
    )
}

/// The oldest devices for which the kernels are compiled: those with bf16.
const OLDEST_MAJOR: i32 = 8;

impl Functions {
    /// Those of the device of `context`.
    pub(super) fn of(context: &Arc<CudaContext>) -> Result<Arc<Self>, KernelError> {
        static ALL: OnceLock<Mutex<HashMap<usize, Arc<Functions>>>> = OnceLock::new();
        let all = ALL.get_or_init(Mutex::default).lock();
        let mut all = all.unwrap_or_else(PoisonError::into_inner);
        let key = context.cu_ctx().addr();
        if let Some(functions) = all.get(&key) {
            return Ok(functions.clone());
        }
        let ordinal = context.ordinal() as u32;
        let ask = || refused(ordinal, "ask what the device is");
        let (major, minor) = context.compute_capability().map_err(ask())?;
        if major < OLDEST_MAJOR {
            return Err(KernelError::Driver {
                memory: Memory::Cuda(ordinal),
                doing: "load the kernels".into(),
                what: format!(
                    "its compute capability is {major}.{minor}, and they need {OLDEST_MAJOR}.0 or newer"
                ),
            });
        }
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let functions = Arc::new(Self {
            context: context.clone(),
            major,
            multiprocessors: context.attribute(count).map_err(ask())?.max(1) as u32,
            loaded: Mutex::default(),
            turns: Turns::default(),
        });
        all.insert(key, functions.clone());
        Ok(functions)
    }

    /// Whose turn it is to launch.
    pub(super) fn turns(&self) -> &Turns {
        &self.turns
    }

    /// The kernel of this name; the context is bound to this thread.
    fn load(&self, name: &str) -> Result<Function, KernelError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = loaded.functions.get(name) {
            return Ok(*function);
        }
        let ordinal = self.context.ordinal() as u32;
        let doing = || refused(ordinal, format!("load the kernel '{name}'"));
        let number = *index().get(name).unwrap_or_else(|| {
            panic!("the kernel '{name}' is not built in: `Task` and `kernels/cuda` differ")
        });
        let module = match loaded.modules.get(&number) {
            Some(module) => *module,
            None => {
                let module = self.load_module(&MODULES[number]).map_err(doing())?;
                loaded.modules.insert(number, module);
                module
            }
        };
        let text = CString::new(name).expect("names of kernels hold no zero");
        // SAFETY: the module was loaded above or before, and is never unloaded. Test: `tests/gpu`, kernels.
        let handle = unsafe { result::module::get_function(module, text) }.map_err(doing())?;
        // SAFETY: the function was found just now. As above.
        let blocks = unsafe {
            result::occupancy::max_active_block_per_multiprocessor(handle, THREADS as i32, 0)
        };
        let blocks = blocks.map_err(doing())?.max(1) as u32;
        let function = Function {
            handle,
            most_blocks: blocks * self.multiprocessors,
        };
        loaded.functions.insert(name.into(), function);
        Ok(function)
    }

    fn load_module(&self, module: &Module) -> Result<sys::CUmodule, result::DriverError> {
        let mut cubins = module.cubins.iter();
        if let Some((_, cubin)) = cubins.find(|(major, _)| *major == self.major) {
            // SAFETY: the image is a whole cubin, which says its own length. Test: `tests/gpu`, kernels.
            match unsafe { result::module::load_data(cubin.as_ptr().cast()) } {
                // A driver older than the compiler of the machine code still compiles the PTX.
                Err(error) if is_too_new(error) => {}
                loaded => return loaded,
            }
        }
        let text = CString::new(module.ptx).expect("PTX holds no zero");
        // SAFETY: the image is a text that ends with a zero, and lives during the call. As above.
        unsafe { result::module::load_data(text.as_ptr().cast()) }
    }

    /// Launch `name` over `chunks` chunks of work: as many blocks as the device runs at once, or fewer.
    ///
    /// # Safety
    /// `arguments` are pointers to values of the types that the kernel takes, in order, and all memory that they name may be
    /// used on `stream` from now on until it was reached.
    pub(super) unsafe fn launch(
        &self,
        name: &str,
        chunks: u64,
        stream: sys::CUstream,
        arguments: &mut [*mut c_void],
    ) -> Result<(), KernelError> {
        let function = self.load(name)?;
        let blocks = chunks.clamp(1, u64::from(function.most_blocks)) as u32;
        let (grid, block) = ((blocks, 1, 1), (THREADS, 1, 1));
        // SAFETY: the function is loaded; the caller vouches for the arguments. Test: `tests/gpu`, kernels.
        let launched =
            unsafe { result::launch_kernel(function.handle, grid, block, 0, stream, arguments) };
        let ordinal = self.context.ordinal() as u32;
        launched.map_err(refused(ordinal, format!("launch '{name}'")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_is_aligned_and_every_kernel_has_a_module() {
        for module in MODULES {
            for (_, cubin) in module.cubins {
                assert_eq!(cubin.as_ptr().addr() % 64, 0);
                assert_eq!(cubin[..4], *b"\x7fELF");
            }
        }
        assert!(index().contains_key("copy_bytes") && index().contains_key("squares_end"));
    }
}
