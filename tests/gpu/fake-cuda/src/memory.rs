//! Memory: what is allocated where, and what lies outside of it. Fresh and freed memory holds [`POISON`]; freed memory
//! is kept a while, so that whoever still reads it finds that.

use std::{
    alloc::{Layout, alloc, dealloc},
    collections::{BTreeMap, VecDeque},
    ffi::c_void,
    sync::{Arc, Mutex, atomic::Ordering},
};

use crate::{
    code::{Code, Result},
    driver::{self, settings, within},
    outside::Out,
    pool::{POOLS, Pool},
    registry::{Handle, lock},
    stream::Stream,
};

/// What memory holds that nobody has written.
pub const POISON: u8 = 0xa5;
const ALIGN: usize = 512;
const QUARANTINE: usize = 64 << 20; // bytes of freed memory that are kept

static MEMORY: Mutex<Memory> = Mutex::new(Memory {
    alive: BTreeMap::new(),
    freed: VecDeque::new(),
    freed_bytes: 0,
});

struct Memory {
    alive: BTreeMap<usize, Block>, // by address
    freed: VecDeque<Block>,
    freed_bytes: usize,
}

/// One allocation.
struct Block {
    base: *mut u8,
    bytes: usize,
    place: Place,
    is_leaving: bool, // its free is in a stream's queue
}

// SAFETY: a block is memory without thread affinity; the table gives out addresses only.
unsafe impl Send for Block {}

/// Where an allocation lies.
#[derive(Clone)]
pub enum Place {
    /// In page-locked memory of the host.
    Host,
    /// In a device's memory.
    Device(i32),
    /// In a device's memory, from a pool.
    Pool(Arc<Pool>),
}

impl Place {
    /// The device, where it is one.
    pub fn device(&self) -> Option<i32> {
        match self {
            Self::Host => None,
            Self::Device(device) => Some(*device),
            Self::Pool(pool) => Some(pool.device),
        }
    }
}

/// What is known of an address.
#[derive(Clone)]
pub struct Found {
    /// Where it lies.
    pub place: Place,
    /// The first address of its allocation.
    pub base: usize,
    /// The allocation's bytes.
    pub bytes: usize,
}

impl Memory {
    fn used(&self, device: i32) -> usize {
        let on_device = |block: &&Block| block.place.device() == Some(device);
        self.alive
            .values()
            .filter(on_device)
            .map(|block| block.bytes)
            .sum()
    }

    fn bury(&mut self, block: Block) {
        // SAFETY: the block's memory is alive until it leaves the quarantine, below.
        unsafe { block.base.write_bytes(POISON, block.bytes) };
        self.freed_bytes += block.bytes;
        self.freed.push_back(block);
        while self.freed_bytes > QUARANTINE
            && let Some(oldest) = self.freed.pop_front()
        {
            self.freed_bytes -= oldest.bytes;
            // SAFETY: allocated in `take` with this layout, and in no table any more.
            unsafe { dealloc(oldest.base, layout(oldest.bytes)) };
        }
    }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, ALIGN).expect("bytes that were allocated before, or checked")
}

/// `bytes` at a place. `stream`: in whose order, so that what is freed there before may be had again.
pub fn take(bytes: usize, place: Place, stream: Option<&Stream>) -> Result<usize> {
    if bytes == 0 || bytes > isize::MAX as usize - ALIGN {
        return Err(if bytes == 0 {
            Code::INVALID_VALUE
        } else {
            Code::OUT_OF_MEMORY
        });
    }
    let mut memory = lock(&MEMORY);
    if let Some(device) = place.device() {
        let returning = stream.map_or(0, |stream| stream.returning.load(Ordering::Acquire));
        let used = memory.used(device).saturating_sub(returning);
        if used.saturating_add(bytes) > settings().memory {
            return Err(Code::OUT_OF_MEMORY);
        }
    }
    // SAFETY: the layout has bytes, checked above.
    let base = unsafe { alloc(layout(bytes)) };
    if base.is_null() {
        return Err(Code::OUT_OF_MEMORY);
    }
    // SAFETY: these bytes were just allocated.
    unsafe { base.write_bytes(POISON, bytes) };
    if let Place::Pool(pool) = &place {
        pool.grow(bytes);
    }
    let block = Block {
        base,
        bytes,
        place,
        is_leaving: false,
    };
    memory.alive.insert(base.expose_provenance(), block);
    Ok(base.addr())
}

/// End an allocation now.
pub fn give_back(address: usize) -> Result {
    let mut memory = lock(&MEMORY);
    let block = memory.alive.remove(&address).ok_or(Code::INVALID_VALUE)?;
    if let Place::Pool(pool) = &block.place {
        pool.shrink(block.bytes);
    }
    memory.bury(block);
    Ok(())
}

/// What an address is in, if it is in anything.
pub fn find(address: usize) -> Option<Found> {
    let memory = lock(&MEMORY);
    let (base, block) = memory.alive.range(..=address).next_back()?;
    (address < base + block.bytes).then(|| Found {
        place: block.place.clone(),
        base: *base,
        bytes: block.bytes,
    })
}

/// The allocation that `bytes` at `address` lie in, or the error of touching something else.
pub fn inside(address: usize, bytes: usize) -> Result<Found> {
    let found = find(address).ok_or(Code::ILLEGAL_ADDRESS)?;
    let end = address.checked_add(bytes).ok_or(Code::ILLEGAL_ADDRESS)?;
    match end <= found.base + found.bytes {
        true => Ok(found),
        false => Err(Code::ILLEGAL_ADDRESS),
    }
}

/// Everything on a device ends: its context does.
pub fn forget(device: i32) {
    let mut memory = lock(&MEMORY);
    let gone: Vec<_> = memory
        .alive
        .extract_if(.., |_, block| block.place.device() == Some(device))
        .collect();
    for (_, block) in gone {
        if let Place::Pool(pool) = &block.place {
            pool.shrink(block.bytes);
        }
        memory.bury(block);
    }
}

/// Allocations of a device that are alive.
pub fn live(device: i32) -> u64 {
    let memory = lock(&MEMORY);
    let on_device = |block: &&Block| block.place.device() == Some(device);
    memory.alive.values().filter(on_device).count() as u64
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(pointer: Out<usize>, bytes: usize) -> i32 {
    within("cuMemAlloc_v2", |context| {
        pointer.give(take(bytes, Place::Device(context.device), None)?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAllocManaged(_pointer: Out<usize>, _bytes: usize, _flags: u32) -> i32 {
    within("cuMemAllocManaged", |_| Err(Code::NOT_SUPPORTED)) // as the device's attribute says
}

/// Waits for all streams, as the driver does: nothing uses the memory any more.
#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(pointer: usize) -> i32 {
    within("cuMemFree_v2", |context| {
        if pointer == 0 {
            return Ok(());
        }
        if find(pointer).is_none_or(|found| found.base != pointer || found.place.device().is_none())
        {
            return Err(Code::INVALID_VALUE);
        }
        context.drain();
        give_back(pointer)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAllocAsync(pointer: Out<usize>, bytes: usize, stream: Handle) -> i32 {
    within("cuMemAllocAsync", |context| {
        let stream = context.stream(stream)?;
        let pool = crate::pool::current(context.device)?;
        pointer.give(take(bytes, Place::Pool(pool), Some(&stream))?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAllocFromPoolAsync(
    pointer: Out<usize>,
    bytes: usize,
    pool: Handle,
    stream: Handle,
) -> i32 {
    within("cuMemAllocFromPoolAsync", |context| {
        let (stream, pool) = (context.stream(stream)?, POOLS.get(pool)?);
        pointer.give(take(bytes, Place::Pool(pool), Some(&stream))?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeAsync(pointer: usize, stream: Handle) -> i32 {
    within("cuMemFreeAsync", |context| {
        let stream = context.stream(stream)?;
        if pointer == 0 {
            return Ok(());
        }
        let mut memory = lock(&MEMORY);
        let block = memory.alive.get_mut(&pointer).ok_or(Code::INVALID_VALUE)?;
        if block.is_leaving || block.place.device().is_none() {
            return Err(Code::INVALID_VALUE);
        }
        block.is_leaving = true;
        let bytes = block.bytes;
        drop(memory);
        stream.returning.fetch_add(bytes, Ordering::AcqRel);
        let own = stream.clone();
        context.mark(&stream, move || {
            let _ = give_back(pointer); // fails only when the context's end was quicker
            own.returning.fetch_sub(bytes, Ordering::AcqRel);
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostAlloc(pointer: Out<*mut c_void>, bytes: usize, _flags: u32) -> i32 {
    within("cuMemHostAlloc", |_| {
        let address = take(bytes, Place::Host, None)?;
        pointer.give(std::ptr::with_exposed_provenance_mut(address))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAllocHost_v2(pointer: Out<*mut c_void>, bytes: usize) -> i32 {
    within("cuMemAllocHost_v2", |_| {
        let address = take(bytes, Place::Host, None)?;
        pointer.give(std::ptr::with_exposed_provenance_mut(address))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(pointer: *mut c_void) -> i32 {
    within("cuMemFreeHost", |context| {
        let found = find(pointer.addr()).ok_or(Code::INVALID_VALUE)?;
        if found.base != pointer.addr() || found.place.device().is_some() {
            return Err(Code::INVALID_VALUE);
        }
        context.drain();
        give_back(found.base)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostGetDevicePointer_v2(
    device: Out<usize>,
    host: *mut c_void,
    _flags: u32,
) -> i32 {
    within("cuMemHostGetDevicePointer_v2", |_| {
        match find(host.addr()) {
            Some(found) if found.place.device().is_none() => device.give(host.addr()),
            _ => Err(Code::INVALID_VALUE),
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) -> i32 {
    within("cuMemGetInfo_v2", |context| {
        let used = lock(&MEMORY).used(context.device);
        free.give(settings().memory.saturating_sub(used))?;
        total.give(settings().memory)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetAddressRange_v2(base: Out<usize>, bytes: Out<usize>, pointer: usize) -> i32 {
    within("cuMemGetAddressRange_v2", |_| {
        let found = find(pointer).ok_or(Code::NOT_FOUND)?;
        base.offer(found.base);
        bytes.offer(found.bytes);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuPointerGetAttribute(data: *mut c_void, attribute: i32, pointer: usize) -> i32 {
    driver::call("cuPointerGetAttribute", || {
        driver::devices()?;
        let found = find(pointer).ok_or(Code::INVALID_VALUE)?;
        let device = found.place.device();
        let number = match attribute {
            2 => return as_out::<i32>(data).give(if device.is_some() { 2 } else { 1 }), // memory type
            3 | 4 => pointer,                       // as device, as host pointer
            8 => return as_out::<u8>(data).give(0), // managed
            9 => return as_out::<i32>(data).give(device.unwrap_or(-2)), // ordinal; -2: the host
            11 => found.base,
            12 => found.bytes,
            _ => return Err(Code::NOT_SUPPORTED),
        };
        as_out(data).give(number)
    })
}

fn as_out<T>(data: *mut c_void) -> Out<T> {
    Out::of(data.cast())
}
