//! A queue: one stream of one device.

use std::any::Any;
use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::ThreadId;

use cudarc::driver::{CudaContext, CudaStream, result, sys};

use super::driver::{ready, refused};
use super::functions::Functions;
use super::memory::{Piece, Recorded};
use super::pending::Pending;
use super::staging::Staging;
use crate::device::{self, Block, Device, Moment, Squares, Task};
use crate::dtype::Memory;
use crate::error::KernelError;
use crate::span::Span;

/// A stream of an NVIDIA device, and the memory that is allocated and freed in its order.
///
/// A tensor library's own stream becomes a queue by [`Queue::over`], so that Fabric's work is in order with the library's.
pub struct Queue {
    me: Weak<Queue>,
    ordinal: u32,
    thread: Option<ThreadId>, // whose own stream it is
    staging: Mutex<Staging>,  // freed before the stream
    stream: Arc<CudaStream>,
    functions: Arc<Functions>,
    pending: Mutex<Pending>,
    failed: Mutex<Option<KernelError>>, // the first work that was lost
}

/// The queues there are, by context, stream, and thread where the stream is each thread's own: one stream has one queue, or
/// what two put off would be out of order.
type Known = HashMap<(usize, usize, Option<ThreadId>), Weak<Queue>>;

/// The handle that means the calling thread's own stream (`cudaStreamPerThread`).
const PER_THREAD: usize = 2;

fn known() -> MutexGuard<'static, Known> {
    static KNOWN: OnceLock<Mutex<Known>> = OnceLock::new();
    let known = KNOWN.get_or_init(Mutex::default).lock();
    known.unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    /// A new stream of the device with this ordinal.
    ///
    /// # Errors
    /// When there is no driver, no such device, or it is too old for the kernels.
    pub fn open(ordinal: u32) -> Result<Arc<Self>, KernelError> {
        ready().map_err(|what| KernelError::Driver {
            memory: Memory::Cuda(ordinal),
            doing: "open the device".into(),
            what,
        })?;
        let context = CudaContext::new(ordinal as usize);
        let context = context.map_err(refused(ordinal, "open the device"))?;
        Self::new_stream(ordinal, &context)
    }

    /// Another stream of the same device.
    ///
    /// # Errors
    /// The driver's refusal.
    pub fn fork(&self) -> Result<Arc<Self>, KernelError> {
        // A context of its own: cudarc keeps a library's slices in order by events once there are two streams in one, and the
        // library has not asked for a second.
        let context = CudaContext::new(self.ordinal as usize);
        let context = context.map_err(refused(self.ordinal, "open another stream"))?;
        Self::new_stream(self.ordinal, &context)
    }

    fn new_stream(ordinal: u32, context: &Arc<CudaContext>) -> Result<Arc<Self>, KernelError> {
        let stream = context.new_stream();
        Self::over(stream.map_err(refused(ordinal, "open a stream"))?)
    }

    /// The queue over a stream that somebody else has made, and works on too: this one's work is in order with theirs. Where
    /// it is each thread's own stream, the queue is the calling thread's.
    ///
    /// # Errors
    /// When the device is too old for the kernels, or the driver refuses.
    pub fn over(stream: Arc<CudaStream>) -> Result<Arc<Self>, KernelError> {
        let context = stream.context();
        let is_per_thread = stream.cu_stream().addr() == PER_THREAD;
        let thread = is_per_thread.then(|| std::thread::current().id());
        let key = (context.cu_ctx().addr(), stream.cu_stream().addr(), thread);
        let mut known = known();
        if let Some(queue) = known.get(&key).and_then(Weak::upgrade) {
            return Ok(queue);
        }
        known.retain(|_, queue| queue.strong_count() > 0);
        let ordinal = context.ordinal() as u32;
        let bound = context.bind_to_thread();
        bound.map_err(refused(ordinal, "use the device"))?;
        keep_freed(context).map_err(refused(ordinal, "set up the device's memory pool"))?;
        let functions = Functions::of(context)?;
        let queue = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            ordinal,
            thread,
            stream,
            functions,
            pending: Mutex::default(),
            staging: Mutex::default(),
            failed: Mutex::default(),
        });
        known.insert(key, Arc::downgrade(&queue));
        Ok(queue)
    }

    /// The device's number among those that this process sees.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// The stream, for those who bring work of their own.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The stream as other libraries take it (`cudaStream_t`).
    pub fn raw_stream(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    /// Make the device the calling thread's: other libraries ask for it.
    ///
    /// # Errors
    /// The driver's refusal.
    pub fn bind(&self) -> Result<(), KernelError> {
        let bound = self.context().bind_to_thread();
        bound.map_err(refused(self.ordinal, "use the device"))
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        self.stream.context()
    }

    pub(super) fn functions(&self) -> &Functions {
        &self.functions
    }

    /// The handle that keeps it.
    pub fn handle(&self) -> Arc<Queue> {
        self.me.upgrade().expect("it is being used, so it lives")
    }

    pub(super) fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn staging(&self) -> MutexGuard<'_, Staging> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn weak(&self) -> Weak<Queue> {
        self.me.clone()
    }

    /// Keep an error, perhaps of work that somebody else has put off: from now on every call returns it, because what was
    /// to be computed never will be. The first one stays.
    pub(super) fn remember(&self, error: KernelError) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.get_or_insert(error);
    }

    fn tell(&self) -> Result<(), KernelError> {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.clone().map_or(Ok(()), Err)
    }

    /// Bind, and say whether work was lost: the begin of every call.
    pub(super) fn begin(&self) -> Result<(), KernelError> {
        self.tell()?;
        if self
            .thread
            .is_some_and(|thread| thread != std::thread::current().id())
        {
            return Err(KernelError::Driver {
                memory: Memory::Cuda(self.ordinal),
                doing: "work on a thread's own stream".into(),
                what: "this is another thread, whose stream is another one, so that nothing would be in order. Open the \
                       library's device on a stream that all threads share (candle: Device::new_cuda_with_stream)"
                    .into(),
            });
        }
        self.bind()
    }

    /// Give the driver what was put off. The memory that was kept for it is let go afterwards.
    pub(super) fn launch_pending(&self) -> Result<(), KernelError> {
        self.launch_then(|| Ok(()))
    }

    /// The same, and before other queues go on, `more`.
    pub(super) fn launch_then(
        &self,
        more: impl FnOnce() -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let pending; // let go after the turn: what was kept is a library's, which may have locks of its own
        let _turn = self.functions.turns().take();
        pending = std::mem::take(&mut *self.pending());
        let launched = pending.launch_then(self, more);
        let launched = launched.inspect_err(|error| self.remember(error.clone()));
        // They came later: this queue takes nothing more while it has guests.
        let guests = pending.guests().map(|guest| guest.launch_pending());
        guests.fold(launched, Result::and)
    }

    /// "; 3 of 80 GiB are free", where the driver says so.
    pub(super) fn free_text(&self) -> String {
        match self.context().mem_get_info() {
            Ok((free, total)) => format!(" ({free} of {total} are free)"),
            Err(_) => String::new(),
        }
    }
}

impl Queue {
    /// Do nothing of what comes before the event.
    fn wait_event(&self, recorded: &Recorded) -> Result<(), KernelError> {
        // Not `CudaStream::wait`, which wants the event to be of one and the same context object.
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: stream and event live during the call; the driver keeps what it needs of the event. Test: `tests/gpu`, queues.
        let waits =
            unsafe { result::stream::wait_event(self.raw(), recorded.event.cu_event(), flags) };
        waits.map_err(refused(self.ordinal, "wait for an event"))
    }
}

/// Let the driver's pool keep what is freed, for the next allocation, rather than give it back at every synchronisation.
fn keep_freed(context: &CudaContext) -> Result<(), result::DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    // SAFETY: the device is that of a living context. Test: `tests/gpu`, memory.
    let pool = unsafe { result::device::get_mem_pool(context.cu_device()) }?;
    let mut threshold = u64::MAX;
    let name = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a 64-bit number, which is read during the call. As above.
    unsafe { result::mem_pool::set_attribute(pool, name, (&raw mut threshold).cast()) }
}

impl Device for Queue {
    fn memory(&self) -> Memory {
        Memory::Cuda(self.ordinal)
    }

    fn share(&self) -> Arc<dyn Device> {
        self.handle()
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn Block>, KernelError> {
        self.begin()?;
        Ok(Arc::new(Piece::zeroed(self.handle(), bytes.max(1))?))
    }

    fn run(&self, task: Task<'_>) -> Result<(), KernelError> {
        self.begin()?;
        if device::may_put_off(self) {
            return self.enter(task);
        }
        device::flush_waiting()?;
        self.enter(task)?;
        self.launch_pending()
    }

    fn squares(&self, spans: &[Span<'_>]) -> Result<Squares, KernelError> {
        self.begin()?;
        device::flush_waiting()?;
        self.launch_pending()?;
        self.sum_squares(spans)
    }

    fn keep(&self, hold: Box<dyn Any + Send>) {
        self.pending().hold(hold);
    }

    fn flush(&self) -> Result<(), KernelError> {
        self.begin()?;
        self.launch_pending()
    }

    fn moment(&self) -> Result<Arc<dyn Moment>, KernelError> {
        self.begin()?;
        self.launch_pending()?;
        let event = self.stream.record_event(None);
        let event = event.map_err(refused(self.ordinal, "record an event"))?;
        let ordinal = self.ordinal;
        Ok(Arc::new(Recorded { ordinal, event }))
    }

    fn wait_for(&self, moment: &dyn Moment) -> Result<(), KernelError> {
        self.begin()?;
        self.launch_pending()?;
        let Some(recorded) = moment.as_any().downcast_ref::<Recorded>() else {
            return Err(KernelError::Driver {
                memory: Memory::Cuda(self.ordinal),
                doing: "wait for a moment".into(),
                what: "it is not of a CUDA device; wait for it on the host (Moment::block)".into(),
            });
        };
        self.wait_event(recorded)
    }

    fn settle(&self) -> Result<(), KernelError> {
        self.begin()?;
        self.launch_pending()?;
        let settled = self.stream.synchronize();
        settled.map_err(refused(self.ordinal, "wait for the device"))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Queue(cuda:{}, {:?})", self.ordinal, self.raw_stream())
    }
}
