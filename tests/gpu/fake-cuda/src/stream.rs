//! Streams: each a thread that works off a queue, with a random pause before each piece of work, so that what is not
//! ordered by a wait happens in any order.

use std::{
    collections::VecDeque,
    ffi::c_void,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::{
    code::{Code, Result},
    context::{self, Context},
    driver::{as_host_function, settings, within},
    outside::Out,
    registry::{Handle, Registry, lock},
};

const NON_BLOCKING: u32 = 1;

/// The streams that programs have made.
pub static STREAMS: Registry<Stream> = Registry::new();
static NUMBER: AtomicU64 = AtomicU64::new(0);

type Job = Box<dyn FnOnce() + Send>;

/// A stream.
pub struct Stream {
    /// The device's number.
    pub device: i32,
    /// Bytes that frees give back which are still in the queue: allocations that come after them may have these.
    pub returning: AtomicUsize,
    /// Its context's error.
    pub failed: Arc<AtomicI32>,
    is_blocking: bool,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    pushed: u64,
    done: u64,
    is_closed: bool,
}

impl Stream {
    /// A stream of a context of `device`, where `failed` keeps the context's error.
    pub fn new(device: i32, failed: Arc<AtomicI32>, is_blocking: bool) -> Arc<Self> {
        let stream = Arc::new(Self {
            device,
            returning: AtomicUsize::new(0),
            failed,
            is_blocking,
            queue: Mutex::default(),
            changed: Condvar::new(),
        });
        let own = stream.clone();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        std::thread::Builder::new()
            .name(format!("stream-{number}"))
            .spawn(move || own.run(Dice(settings().seed.wrapping_add(number))))
            .expect("a thread for a stream");
        stream
    }

    fn run(&self, mut dice: Dice) {
        loop {
            let mut queue = lock(&self.queue);
            while queue.jobs.is_empty() {
                if queue.is_closed {
                    return;
                }
                queue = self
                    .changed
                    .wait(queue)
                    .unwrap_or_else(|held| held.into_inner());
            }
            let job = queue.jobs.pop_front().expect("there is one");
            drop(queue);
            let pause = settings().delay_us;
            if pause > 0 {
                std::thread::sleep(Duration::from_micros(dice.roll() % (pause + 1)));
            }
            job();
            lock(&self.queue).done += 1;
            self.changed.notify_all();
        }
    }

    fn push(&self, job: Job) {
        let mut queue = lock(&self.queue);
        queue.jobs.push_back(job);
        queue.pushed += 1;
        self.changed.notify_all();
    }

    /// How much was submitted, if not all of it is done.
    fn pending(&self) -> Option<u64> {
        let queue = lock(&self.queue);
        (queue.done < queue.pushed).then_some(queue.pushed)
    }

    fn wait_until(&self, done: u64) {
        let queue = lock(&self.queue);
        let queue = self.changed.wait_while(queue, |queue| queue.done < done);
        drop(queue.unwrap_or_else(|held| held.into_inner()));
    }

    /// Wait for everything that was submitted so far.
    pub fn drain(&self) {
        if let Some(pushed) = self.pending() {
            self.wait_until(pushed);
        }
    }

    /// Whether everything that was submitted is done.
    pub fn is_idle(&self) -> bool {
        self.pending().is_none()
    }

    /// Let the thread end when the queue is empty.
    pub fn close(&self) {
        lock(&self.queue).is_closed = true;
        self.changed.notify_all();
    }
}

impl Context {
    /// Submit what happens also after an error: the bookkeeping of events.
    pub fn mark(&self, stream: &Arc<Stream>, job: impl FnOnce() + Send + 'static) {
        let _order = lock(&self.order);
        let after = |other: &Arc<Stream>| {
            if let Some(pushed) = other.pending() {
                let other = other.clone();
                stream.push(Box::new(move || other.wait_until(pushed)));
            }
        };
        if Arc::ptr_eq(stream, &self.null) {
            let others = lock(&self.streams).clone();
            others
                .iter()
                .filter(|other| other.is_blocking)
                .for_each(after);
        } else if stream.is_blocking {
            after(&self.null);
        }
        stream.push(Box::new(job));
    }

    /// Submit work. After an error nothing is done any more; the first error stays on the context.
    pub fn submit(&self, stream: &Arc<Stream>, work: impl FnOnce() -> Result + Send + 'static) {
        let failed = stream.failed.clone();
        self.mark(stream, move || {
            if failed.load(Ordering::Acquire) == 0
                && let Err(code) = work()
            {
                context::fail(&failed, code);
            }
        });
    }

    /// Wait for a stream; the legacy one has waited for all that block.
    pub fn settle(&self, stream: &Arc<Stream>) -> Result {
        if Arc::ptr_eq(stream, &self.null) {
            self.mark(stream, || {});
        }
        stream.drain();
        self.check()
    }
}

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let bits = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }
}

fn create(context: &Context, stream: &Out<Handle>, flags: u32) -> Result {
    if flags > NON_BLOCKING {
        return Err(Code::INVALID_VALUE);
    }
    stream.give(STREAMS.add(context.open(flags != NON_BLOCKING)))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(stream: Out<Handle>, flags: u32) -> i32 {
    within("cuStreamCreate", |context| create(context, &stream, flags))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreateWithPriority(stream: Out<Handle>, flags: u32, _priority: i32) -> i32 {
    within("cuStreamCreateWithPriority", |context| {
        create(context, &stream, flags)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: Handle) -> i32 {
    within("cuStreamDestroy_v2", |context| {
        let found = STREAMS.remove(stream)?;
        found.close(); // what is queued is still done
        lock(&context.streams).retain(|other| !Arc::ptr_eq(other, &found) || !other.is_idle());
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: Handle) -> i32 {
    within("cuStreamSynchronize", |context| {
        context.settle(&context.stream(stream)?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(stream: Handle) -> i32 {
    within("cuStreamQuery", |context| {
        match context.stream(stream)?.is_idle() {
            true => Ok(()),
            false => Err(Code::NOT_READY),
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamGetFlags(stream: Handle, flags: Out<u32>) -> i32 {
    within("cuStreamGetFlags", |context| {
        flags.give(u32::from(!context.stream(stream)?.is_blocking))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamGetPriority(stream: Handle, priority: Out<i32>) -> i32 {
    within("cuStreamGetPriority", |context| {
        context.stream(stream)?;
        priority.give(0)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamIsCapturing(stream: Handle, status: Out<i32>) -> i32 {
    within("cuStreamIsCapturing", |context| {
        context.stream(stream)?;
        status.give(0)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(_stream: Handle, _mode: i32) -> i32 {
    within("cuStreamBeginCapture_v2", |_| Err(Code::NOT_SUPPORTED))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamEndCapture(_stream: Handle, _graph: Out<Handle>) -> i32 {
    within("cuStreamEndCapture", |_| Err(Code::NOT_SUPPORTED))
}

/// A caller's pointer, on its way to a stream's thread.
struct Sent(*mut c_void);

// SAFETY: whoever hands a host function its data promises that the driver's thread may use it.
unsafe impl Send for Sent {}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchHostFunc(
    stream: Handle,
    function: Option<unsafe extern "C" fn(*mut c_void)>,
    data: *mut c_void,
) -> i32 {
    within("cuLaunchHostFunc", |context| {
        let function = function.ok_or(Code::INVALID_VALUE)?;
        let data = Sent(data);
        context.submit(&context.stream(stream)?, move || {
            let Sent(data) = { data };
            as_host_function(|| {
                // SAFETY: the interface demands a function that may be called once with this data, on any thread.
                unsafe { function(data) };
            });
            Ok(())
        });
        Ok(())
    })
}
