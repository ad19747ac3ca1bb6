//! The stand-in itself, by its C interface: calls in a wrong order are refused, as NCCL would or should.

use std::ffi::{CStr, c_char, c_int, c_void};

use cudarc::driver::CudaContext;
use gpu_suite::stage::with_fakes;
use libloading::{Library, Symbol};

const IN_PROGRESS: c_int = 7;
const INVALID_USAGE: c_int = 5;
const INVALID_ARGUMENT: c_int = 4;

#[repr(C)]
#[derive(Clone, Copy)]
struct Id([u8; 128]);

/// The configuration of 2.14.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

type Init = unsafe extern "C" fn(*mut *mut c_void, c_int, Id, c_int, *mut Config) -> c_int;
type OnComm = unsafe extern "C" fn(*mut c_void) -> c_int;

struct Nccl(Library);

impl Nccl {
    fn load() -> Self {
        // SAFETY: the stand-in does nothing when it is loaded.
        Self(unsafe { Library::new("libnccl.so.2") }.unwrap())
    }

    fn function<T>(&self, name: &str) -> Symbol<'_, T> {
        // SAFETY: the types in this file are those of the header.
        unsafe { self.0.get(name.as_bytes()) }.unwrap()
    }

    /// A communicator of one rank, not waited for.
    fn init(&self, blocking: c_int) -> (*mut c_void, c_int) {
        let (mut id, mut comm) = (Id([0; 128]), std::ptr::null_mut());
        let make = self.function::<unsafe extern "C" fn(*mut Id) -> c_int>("ncclGetUniqueId");
        // SAFETY: a place for the id.
        assert_eq!(unsafe { make(&mut id) }, 0);
        let mut config = Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21_400,
            blocking,
        };
        // SAFETY: a place for the handle, and a configuration.
        let code = unsafe {
            self.function::<Init>("ncclCommInitRankConfig")(&mut comm, 1, id, 0, &mut config)
        };
        (comm, code)
    }

    fn on(&self, name: &str, comm: *mut c_void) -> c_int {
        // SAFETY: the stand-in looks handles up.
        unsafe { self.function::<OnComm>(name)(comm) }
    }

    fn state(&self, comm: *mut c_void) -> c_int {
        let mut now = -1;
        let ask = self.function::<unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int>(
            "ncclCommGetAsyncError",
        );
        // SAFETY: a place for the answer.
        assert_eq!(unsafe { ask(comm, &mut now) }, 0);
        now
    }

    /// Wait, and count how often it was in progress.
    fn settle(&self, comm: *mut c_void) -> usize {
        let mut count = 0;
        crate::ranks::until(|| {
            let is_done = self.state(comm) != IN_PROGRESS;
            count += usize::from(!is_done);
            is_done
        });
        count
    }

    fn words(&self) -> String {
        let last =
            self.function::<unsafe extern "C" fn(*mut c_void) -> *const c_char>("ncclGetLastError");
        // SAFETY: any handle will do.
        let words = unsafe { last(std::ptr::null_mut()) };
        // SAFETY: a text that ends.
        let words = unsafe { CStr::from_ptr(words) };
        words.to_string_lossy().into_owned()
    }
}

#[test]
fn what_does_not_block_says_that_it_is_in_progress_and_waits_for_being_asked() {
    with_fakes(&[], || {
        let (nccl, _context) = (Nccl::load(), CudaContext::new(0).unwrap());
        let (comm, code) = nccl.init(0);
        assert_eq!(code, IN_PROGRESS);
        assert_eq!(nccl.on("ncclCommFinalize", comm), INVALID_USAGE);
        assert!(
            nccl.words().contains("before the previous operation"),
            "{}",
            nccl.words()
        );
        assert!(nccl.settle(comm) >= 2);
        assert_eq!(nccl.on("ncclCommDestroy", comm), INVALID_USAGE);
        assert!(
            nccl.words().contains("before ncclCommFinalize"),
            "{}",
            nccl.words()
        );
        assert_eq!(nccl.on("ncclCommFinalize", comm), IN_PROGRESS);
        assert_eq!(nccl.on("ncclCommDestroy", comm), INVALID_USAGE);
        assert!(nccl.settle(comm) >= 2);
        assert_eq!(nccl.on("ncclCommDestroy", comm), 0);
        for name in ["ncclCommDestroy", "ncclCommFinalize", "ncclCommAbort"] {
            assert_eq!(
                nccl.on(name, comm),
                INVALID_ARGUMENT,
                "{name} after the end"
            );
        }
    });
}

#[test]
fn what_blocks_is_over_when_it_returns() {
    with_fakes(&[], || {
        let (nccl, _context) = (Nccl::load(), CudaContext::new(0).unwrap());
        let (comm, code) = nccl.init(1);
        assert_eq!((code, nccl.state(comm)), (0, 0));
        assert_eq!(nccl.on("ncclCommDestroy", comm), 0);
        assert_eq!(nccl.on("ncclCommAbort", comm), INVALID_ARGUMENT);
    });
}

#[test]
fn a_group_that_was_not_opened_cannot_be_closed() {
    with_fakes(&[], || {
        let nccl = Nccl::load();
        let end = nccl.function::<unsafe extern "C" fn() -> c_int>("ncclGroupEnd");
        // SAFETY: it takes nothing.
        assert_eq!(unsafe { end() }, INVALID_USAGE);
        let (_, code) = nccl.init(2);
        assert_eq!(code, INVALID_ARGUMENT);
        assert!(
            nccl.words().contains("blocking attribute value 2"),
            "{}",
            nccl.words()
        );
    });
}
