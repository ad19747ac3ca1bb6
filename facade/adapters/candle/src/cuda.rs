//! Candle's CUDA memory as the engine's: lent where it lies, and worked on in the order of candle's own stream.
//!
//! This is the crate's unsafe room: addresses of candle's memory become spans here, and nowhere else.
//!
//! [Note: one stream] Whatever candle does to a tensor it does on its device's stream, in whose order it frees memory too, and
//! the queue over that stream is the engine's: what Fabric does is in order with what candle does. That holds for work that
//! is put off as long as the memory is kept, which [`Buffer::hold`] sees to. Between streams of one context, cudarc keeps
//! order by events: `device_ptr` makes the asking stream wait for the last write, and the guard that it returns records the
//! use when it is dropped. (It does so from the first stream that a context was asked for, thus always under
//! `Device::new_cuda_with_stream`, and never under `Device::new_cuda`.) A guard that is dropped before the work was given would
//! be too early for a second stream, and on a single one it says nothing new; so it is dropped at once, and memory of
//! another stream than its device's, which nobody but a caller of cudarc can make, is refused.

use std::{
    collections::HashMap,
    ops::{Deref, Range},
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{
    CudaDevice, CudaStorage, Device, Result, Storage, bail,
    cuda_backend::{
        CudaStorageSlice,
        cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut},
    },
};
use fabric_engine::{
    buffer::Buffer,
    kernels::{
        Device as Kernels, Dtype, Span, SpanMut,
        cuda::{Queue, ready},
    },
};

use crate::away::wrapped;

/// The mark of absence in CUDA memory. One byte, because there is no allocation of none.
pub(crate) fn mark(device: &CudaDevice) -> Result<CudaStorage> {
    Ok(CudaStorage {
        slice: CudaStorageSlice::F4(device.alloc_zeros::<u8>(1)?),
        device: device.clone(),
    })
}

/// The queue over a device's stream.
pub(crate) fn queue(device: &CudaDevice) -> Result<Arc<dyn Kernels>> {
    Ok(over(device)?)
}

fn over(device: &CudaDevice) -> Result<Arc<Queue>> {
    Queue::over(device.cuda_stream()).map_err(wrapped)
}

/// The device of this number: one in this process, on a stream that all its threads share.
pub(crate) fn tensor_device(ordinal: usize) -> Result<Device> {
    /// With its queue, which then stays the same one.
    type Opened = HashMap<usize, (Device, Arc<dyn Kernels>)>;
    static OPENED: Mutex<Option<Opened>> = Mutex::new(None);

    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let opened = opened.get_or_insert_default();
    if let Some((device, _)) = opened.get(&ordinal) {
        return Ok(device.clone());
    }
    ready().map_err(candle_core::Error::msg)?;
    let device = CudaDevice::new_with_stream(ordinal)?;
    let queue = queue(&device)?;
    let device = Device::Cuda(device);
    opened.insert(ordinal, (device.clone(), queue));
    Ok(device)
}

/// A range of CUDA memory, lent for reading as long as its storage is locked.
pub(crate) struct Lent<S> {
    place: Place,
    _storage: S, // the guard of candle's lock
}

impl<S: Deref<Target = Storage>> Lent<S> {
    /// The elements of `range`, whose type is `dtype`.
    pub(crate) fn new(storage: S, range: Range<usize>, dtype: Dtype) -> Result<Self> {
        let Storage::Cuda(cuda) = &*storage else {
            bail!("memory that is not a CUDA device's");
        };
        let queue = over(&cuda.device)?;
        let place = Place::new(queue, range, dtype, |stream| address(&cuda.slice, stream))?;
        Ok(Self {
            place,
            _storage: storage,
        })
    }

    pub(crate) fn span(&self) -> Span<'_> {
        self.place.span()
    }
}

/// A range of CUDA memory, open for writing.
pub(crate) struct Open<'a> {
    place: Place,
    _storage: &'a mut CudaStorage,
}

impl<'a> Open<'a> {
    /// The elements of `range`, whose type is `dtype`.
    pub(crate) fn new(
        storage: &'a mut CudaStorage,
        range: Range<usize>,
        dtype: Dtype,
    ) -> Result<Self> {
        let queue = over(&storage.device)?;
        let slice = &mut storage.slice;
        let place = Place::new(queue, range, dtype, |stream| address_mut(slice, stream))?;
        Ok(Self {
            place,
            _storage: storage,
        })
    }
}

impl Buffer for Open<'_> {
    fn dtype(&self) -> Dtype {
        self.place.dtype
    }
    fn numel(&self) -> usize {
        self.place.len
    }
    fn span(&self) -> Option<Span<'_>> {
        Some(self.place.span())
    }
    fn span_mut(&mut self) -> Option<SpanMut<'_>> {
        Some(self.place.span_mut())
    }
}

/// Where elements are. Whoever makes it keeps candle's lock on their storage beside it.
struct Place {
    address: usize,
    len: usize,
    dtype: Dtype,
    queue: Arc<Queue>,
}

/// Memory of candle's as the driver knows it.
struct Found {
    dtype: Option<Dtype>,
    start: u64,
    len: usize,
}

impl Place {
    /// `range` of the memory that `find` finds on the queue's stream.
    fn new(
        queue: Arc<Queue>,
        range: Range<usize>,
        dtype: Dtype,
        find: impl FnOnce(&CudaStream) -> Result<Found>,
    ) -> Result<Self> {
        queue.bind().map_err(wrapped)?;
        let found = find(queue.stream())?;
        if found.dtype != Some(dtype) || range.end > found.len {
            bail!(
                "elements {range:?} of {dtype} are wanted, and there are {} of {:?}",
                found.len,
                found.dtype
            );
        }
        Ok(Self {
            address: found.start as usize + range.start * dtype.size(),
            len: range.len(),
            dtype,
            queue,
        })
    }

    fn span(&self) -> Span<'_> {
        let ptr = std::ptr::without_provenance(self.address);
        // SAFETY: `Place::new` has found so many elements of this type there, in memory of the queue's device, and the lock on
        // their storage, which lives as long as this place, lets nobody free or exchange them; candle zeroes or writes memory
        // before it gives it away, and what it does to it later is in the queue's order ([Note: one stream]). Tests: those of
        // tests/candle, on a device.
        unsafe { Span::from_raw(ptr, self.dtype, self.len, Some(&*self.queue)) }
    }

    fn span_mut(&mut self) -> SpanMut<'_> {
        let ptr = std::ptr::without_provenance_mut(self.address);
        // SAFETY: as above, and the storage is borrowed for writing, by `Open` alone, so that no other span lies over it.
        unsafe { SpanMut::from_raw(ptr, self.dtype, self.len, Some(&*self.queue)) }
    }
}

/// Where memory starts, to be read by work on `stream`.
fn address(slice: &CudaStorageSlice, stream: &CudaStream) -> Result<Found> {
    fn of<T>(slice: &CudaSlice<T>, dtype: Dtype, stream: &CudaStream) -> Result<Found> {
        check_stream(slice, stream)?;
        let (start, guard) = slice.device_ptr(stream);
        drop(guard); // [Note: one stream]
        Ok(Found {
            dtype: Some(dtype),
            start,
            len: slice.len(),
        })
    }
    match slice {
        CudaStorageSlice::F64(slice) => of(slice, Dtype::F64, stream),
        CudaStorageSlice::F32(slice) => of(slice, Dtype::F32, stream),
        CudaStorageSlice::F16(slice) => of(slice, Dtype::F16, stream),
        CudaStorageSlice::BF16(slice) => of(slice, Dtype::BF16, stream),
        CudaStorageSlice::U8(slice) => of(slice, Dtype::U8, stream),
        CudaStorageSlice::U32(slice) => of(slice, Dtype::U32, stream),
        CudaStorageSlice::I64(slice) => of(slice, Dtype::I64, stream),
        _ => Ok(NOTHING),
    }
}

/// Where memory starts, to be written by work on `stream`.
fn address_mut(slice: &mut CudaStorageSlice, stream: &CudaStream) -> Result<Found> {
    fn of<T>(slice: &mut CudaSlice<T>, dtype: Dtype, stream: &CudaStream) -> Result<Found> {
        check_stream(slice, stream)?;
        let len = slice.len();
        let (start, guard) = slice.device_ptr_mut(stream);
        drop(guard); // [Note: one stream]
        Ok(Found {
            dtype: Some(dtype),
            start,
            len,
        })
    }
    match slice {
        CudaStorageSlice::F64(slice) => of(slice, Dtype::F64, stream),
        CudaStorageSlice::F32(slice) => of(slice, Dtype::F32, stream),
        CudaStorageSlice::F16(slice) => of(slice, Dtype::F16, stream),
        CudaStorageSlice::BF16(slice) => of(slice, Dtype::BF16, stream),
        CudaStorageSlice::U8(slice) => of(slice, Dtype::U8, stream),
        CudaStorageSlice::U32(slice) => of(slice, Dtype::U32, stream),
        CudaStorageSlice::I64(slice) => of(slice, Dtype::I64, stream),
        _ => Ok(NOTHING),
    }
}

/// A type that the engine does not know, or the mark of absence.
const NOTHING: Found = Found {
    dtype: None,
    start: 0,
    len: 0,
};

fn check_stream<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> Result<()> {
    if &**slice.stream() != stream {
        bail!(
            "a tensor's memory belongs to another stream than its device's, so that nothing keeps Fabric's work and candle's in \
             order: copy it into a tensor that candle has made"
        );
    }
    Ok(())
}
