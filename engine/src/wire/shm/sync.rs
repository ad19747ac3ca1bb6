//! What the flags are made of: the machine's atomics and futexes, or `loom`'s model of them.

#[cfg(not(loom))]
pub(super) use machine::*;
#[cfg(loom)]
pub(super) use model::*;

#[cfg(not(loom))]
mod machine {
    use std::time::Duration;

    pub(in super::super) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

    use rustix::thread::futex;

    /// A number that is slept on until it changes; it may be mapped by any number of processes.
    #[derive(Default)]
    #[repr(transparent)]
    pub(in super::super) struct Word(AtomicU32);

    impl Word {
        pub(in super::super) fn load(&self, order: Ordering) -> u32 {
            self.0.load(order)
        }

        pub(in super::super) fn store(&self, value: u32, order: Ordering) {
            self.0.store(value, order);
        }

        /// Sleep while it is `before`, at most `nap`; may wake early.
        pub(in super::super) fn wait(&self, before: u32, nap: Duration) {
            let nap = futex::Timespec {
                tv_sec: nap.as_secs() as i64,
                tv_nsec: nap.subsec_nanos().into(),
            };
            // However it ends (woken, changed before, timed out, a signal), the caller looks again.
            let _ = futex::wait(&self.0, futex::Flags::empty(), before, Some(&nap));
        }

        /// Wake all that sleep here.
        pub(in super::super) fn wake(&self) {
            let _ = futex::wake(&self.0, futex::Flags::empty(), i32::MAX as u32); // fails only for a bad address
        }
    }
}

/// A futex is a comparison and a sleep under the kernel's lock; nobody wakes by himself, so that a lost wake-up is a
/// deadlock, which `loom` reports.
#[cfg(loom)]
mod model {
    use std::time::Duration;

    pub(in super::super) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
    use loom::sync::{Condvar, Mutex};

    #[derive(Default)]
    pub(in super::super) struct Word {
        value: AtomicU32,
        kernel: Mutex<()>,
        changed: Condvar,
    }

    impl Word {
        pub(in super::super) fn load(&self, order: Ordering) -> u32 {
            self.value.load(order)
        }

        pub(in super::super) fn store(&self, value: u32, order: Ordering) {
            self.value.store(value, order);
        }

        pub(in super::super) fn wait(&self, before: u32, _nap: Duration) {
            let lock = self.kernel.lock().unwrap();
            if self.value.load(Ordering::Relaxed) == before {
                drop(self.changed.wait(lock).unwrap());
            }
        }

        pub(in super::super) fn wake(&self) {
            let _lock = self.kernel.lock().unwrap();
            self.changed.notify_all();
        }
    }
}
