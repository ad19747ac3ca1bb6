//! Ranks as threads of one process, each with a device of its own, a stream, and a communicator.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use fabric_engine::{
    comm::nccl::{Comm, Config, Id, Library, Operands, StreamHandle},
    kernels::Dtype,
};

/// How long anything may take that should not.
pub const LATE: Duration = Duration::from_secs(20);

/// One rank.
pub struct Rank {
    pub stream: Arc<CudaStream>,
    pub comm: Comm,
    pub rank: usize,
}

/// How a communicator is that gives up after a while.
pub fn config(deadline: Duration) -> Config {
    Config {
        deadline: Some(deadline),
        ..Config::default()
    }
}

/// A rank of a world that meets at `id`.
pub fn rank(library: &Arc<Library>, id: &Id, size: usize, rank: usize) -> Rank {
    let context = CudaContext::new(rank).unwrap();
    let stream = context.new_stream().unwrap();
    let comm = Comm::init(library, id, size, rank, config(LATE)).unwrap();
    Rank { stream, comm, rank }
}

/// Run `body` on `size` ranks at once, each on a thread.
pub fn world<T: Send>(size: usize, body: impl Fn(Rank) -> T + Sync) -> Vec<T> {
    world_with(&Library::load().unwrap(), size, body)
}

/// The same with a library of the caller's choice.
pub fn world_with<T: Send>(
    library: &Arc<Library>,
    size: usize,
    body: impl Fn(Rank) -> T + Sync,
) -> Vec<T> {
    let id = Id::create(library).unwrap();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..size)
            .map(|number| {
                let (body, id) = (&body, &id);
                scope.spawn(move || body(rank(library, id, size, number)))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

impl Rank {
    /// Bytes on this rank's device.
    pub fn put(&self, bytes: &[u8]) -> CudaSlice<u8> {
        self.stream.clone_htod(bytes).unwrap()
    }

    /// What lies there, when the stream has come so far.
    pub fn get(&self, slice: &CudaSlice<u8>) -> Vec<u8> {
        self.stream.clone_dtoh(slice).unwrap()
    }

    /// `numel` elements from one buffer into another.
    pub fn operands(
        &self,
        from: &CudaSlice<u8>,
        into: &CudaSlice<u8>,
        numel: usize,
        dtype: Dtype,
    ) -> Operands {
        Operands {
            from: address(from),
            into: address(into),
            numel,
            dtype,
        }
    }

    /// This rank's stream.
    pub fn handle(&self) -> StreamHandle {
        StreamHandle::from_raw(self.stream.cu_stream().cast())
    }
}

/// Where a buffer begins.
pub fn address(slice: &CudaSlice<u8>) -> u64 {
    slice.device_ptr(slice.stream()).0
}

/// Floats as bytes, and back.
pub fn bytes_of(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect()
}

pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks_exact(4)
        .map(|four| f32::from_ne_bytes(four.try_into().unwrap()))
        .collect()
}

/// Wait until something is so.
///
/// # Panics
/// When it is too late.
pub fn until(mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LATE;
    while !is_so() {
        assert!(
            Instant::now() < deadline,
            "not so after {} s",
            LATE.as_secs()
        );
        std::thread::yield_now();
    }
}
