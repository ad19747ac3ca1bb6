//! Modules, the functions in them, and their launches.

use std::{
    collections::HashSet,
    ffi::{c_char, c_void},
    sync::Arc,
};

use crate::{
    code::{Code, Result},
    context::Context,
    device::{MULTIPROCESSORS, THREADS_PER_MULTIPROCESSOR},
    driver::within,
    kernels,
    outside::{self, In, Out},
    registry::{Handle, Registry},
};

const MOST_THREADS: u32 = 1024;

static MODULES: Registry<Module> = Registry::new();
static FUNCTIONS: Registry<Function> = Registry::new();

/// A module.
struct Module {
    entries: Option<HashSet<String>>, // None: machine code, which is not read
}

/// A kernel of a module.
struct Function {
    name: String,
    sizes: &'static [usize],
}

/// Machine code begins as an ELF file or a fat binary does; everything else is PTX, whose `.entry` names count.
fn load(module: &Out<Handle>, image: &[u8]) -> Result {
    let is_code = image.starts_with(b"\x7fELF") || image.starts_with(&[0x50, 0xed, 0x55, 0xba]);
    let entries = (!is_code).then(|| {
        let text = String::from_utf8_lossy(image);
        let after = text.split(".entry").skip(1);
        let name = |rest: &str| {
            let word = rest
                .trim_start()
                .split(|c: char| !c.is_alphanumeric() && c != '_' && c != '$');
            word.take(1).collect()
        };
        after.map(name).collect()
    });
    module.give(MODULES.add(Arc::new(Module { entries })))
}

/// The bytes of an image, whose length it says itself: PTX ends with a 0; of machine code the first bytes are enough.
fn image(start: In<c_char>) -> Result<Vec<u8>> {
    if start.at(0)? == 0x7f || start.at(0)? == 0x50 && start.at(1)? as u8 == 0xed {
        return (0..4).map(|index| Ok(start.at(index)? as u8)).collect();
    }
    Ok(start.text()?.into_bytes())
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadData(module: Out<Handle>, start: In<c_char>) -> i32 {
    within("cuModuleLoadData", |_| load(&module, &image(start)?))
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadDataEx(
    module: Out<Handle>,
    start: In<c_char>,
    _count: u32,
    _options: Handle,
    _values: Handle,
) -> i32 {
    within("cuModuleLoadDataEx", |_| load(&module, &image(start)?))
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadFatBinary(module: Out<Handle>, start: In<c_char>) -> i32 {
    within("cuModuleLoadFatBinary", |_| load(&module, &image(start)?))
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoad(module: Out<Handle>, path: In<c_char>) -> i32 {
    within("cuModuleLoad", |_| {
        let bytes = std::fs::read(path.text()?).map_err(|_| Code::FILE_NOT_FOUND)?;
        load(&module, &bytes)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: Handle) -> i32 {
    within("cuModuleUnload", |_| MODULES.remove(module).map(drop))
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunction(function: Out<Handle>, module: Handle, name: In<c_char>) -> i32 {
    within("cuModuleGetFunction", |_| {
        let (module, name) = (MODULES.get(module)?, name.text()?);
        if module
            .entries
            .as_ref()
            .is_some_and(|entries| !entries.contains(&name))
        {
            return Err(Code::NOT_FOUND);
        }
        let sizes = kernels::arguments(&name).ok_or(Code::NOT_FOUND)?;
        function.give(FUNCTIONS.add(Arc::new(Function { name, sizes })))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetGlobal_v2(
    _at: Out<usize>,
    _bytes: Out<usize>,
    module: Handle,
    _name: In<c_char>,
) -> i32 {
    within("cuModuleGetGlobal_v2", |_| {
        MODULES.get(module)?;
        Err(Code::NOT_FOUND) // these kernels have none
    })
}

/// A launch as it was asked for.
struct Launch {
    grid: [u32; 3],
    block: [u32; 3],
    stream: Handle,
}

impl Launch {
    fn submit(self, context: &Context, function: Handle, pointers: *mut *mut c_void) -> Result {
        let function = FUNCTIONS.get(function)?;
        let stream = context.stream(self.stream)?;
        let flat = self.grid[1..] == [1, 1] && self.block[1..] == [1, 1];
        let threads = self.block[0];
        if !flat || self.grid[0] == 0 || threads == 0 || threads > MOST_THREADS {
            return Err(Code::INVALID_VALUE);
        }
        let mut values = outside::arguments(pointers, function.sizes)?;
        let own = context.peers_and_self();
        context.submit(&stream, move || {
            kernels::check(&function.name, &values, &own)?;
            let mut pointers: Vec<_> = values
                .iter_mut()
                .map(|value| value.as_mut_ptr().cast())
                .collect();
            kernels::launch(&function.name, self.grid[0], threads, &mut pointers)
        });
        Ok(())
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernel(
    function: Handle,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    _shared_bytes: u32,
    stream: Handle,
    arguments: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> i32 {
    within("cuLaunchKernel", |context| {
        let launch = Launch {
            grid: [grid_x, grid_y, grid_z],
            block: [block_x, block_y, block_z],
            stream,
        };
        launch.submit(context, function, arguments)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchCooperativeKernel(
    _function: Handle,
    _grid_x: u32,
    _grid_y: u32,
    _grid_z: u32,
    _block_x: u32,
    _block_y: u32,
    _block_z: u32,
    _shared_bytes: u32,
    _stream: Handle,
    _arguments: *mut *mut c_void,
) -> i32 {
    within("cuLaunchCooperativeKernel", |_| Err(Code::NOT_SUPPORTED))
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(function: Handle, attribute: i32, _value: i32) -> i32 {
    within("cuFuncSetAttribute", |_| {
        FUNCTIONS.get(function)?;
        match attribute {
            8..=15 => Ok(()),
            _ => Err(Code::INVALID_VALUE),
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncGetAttribute(value: Out<i32>, attribute: i32, function: Handle) -> i32 {
    within("cuFuncGetAttribute", |_| {
        FUNCTIONS.get(function)?;
        match attribute {
            0 => value.give(MOST_THREADS as i32),
            4 => value.give(32), // registers
            1..=15 => value.give(0),
            _ => Err(Code::INVALID_VALUE),
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetCacheConfig(function: Handle, _config: i32) -> i32 {
    within("cuFuncSetCacheConfig", |_| {
        FUNCTIONS.get(function).map(drop)
    })
}

fn occupancy(blocks: &Out<i32>, function: Handle, block: i32) -> Result {
    FUNCTIONS.get(function)?;
    if block <= 0 {
        return Err(Code::INVALID_VALUE);
    }
    let fits = if block as u32 > MOST_THREADS {
        0
    } else {
        THREADS_PER_MULTIPROCESSOR / block
    };
    blocks.give(fits.min(32))
}

#[unsafe(no_mangle)]
extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    blocks: Out<i32>,
    function: Handle,
    block: i32,
    _shared: usize,
) -> i32 {
    within("cuOccupancyMaxActiveBlocksPerMultiprocessor", |_| {
        occupancy(&blocks, function, block)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    blocks: Out<i32>,
    function: Handle,
    block: i32,
    _shared: usize,
    _flags: u32,
) -> i32 {
    within(
        "cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags",
        |_| occupancy(&blocks, function, block),
    )
}

fn potential(grid: &Out<i32>, block: &Out<i32>, function: Handle, limit: i32) -> Result {
    FUNCTIONS.get(function)?;
    let threads = if limit <= 0 {
        MOST_THREADS as i32
    } else {
        limit.min(MOST_THREADS as i32)
    };
    grid.give(MULTIPROCESSORS * (THREADS_PER_MULTIPROCESSOR / threads).min(32))?;
    block.give(threads)
}

#[unsafe(no_mangle)]
extern "C" fn cuOccupancyMaxPotentialBlockSize(
    grid: Out<i32>,
    block: Out<i32>,
    function: Handle,
    _shared_by_block: Handle,
    _shared: usize,
    limit: i32,
) -> i32 {
    within("cuOccupancyMaxPotentialBlockSize", |_| {
        potential(&grid, &block, function, limit)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuOccupancyMaxPotentialBlockSizeWithFlags(
    grid: Out<i32>,
    block: Out<i32>,
    function: Handle,
    _shared_by_block: Handle,
    _shared: usize,
    limit: i32,
    _flags: u32,
) -> i32 {
    within("cuOccupancyMaxPotentialBlockSizeWithFlags", |_| {
        potential(&grid, &block, function, limit)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuOccupancyAvailableDynamicSMemPerBlock(
    bytes: Out<usize>,
    function: Handle,
    _blocks: i32,
    _block: i32,
) -> i32 {
    within("cuOccupancyAvailableDynamicSMemPerBlock", |_| {
        FUNCTIONS.get(function)?;
        bytes.give(48 << 10)
    })
}
