//! How communicators come to be, say how they are, and end.

use std::{
    collections::HashMap,
    ffi::c_void,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};

use fabric_engine::{
    clock::Clock,
    comm::{Collectives, host, solo::Solo},
    rendezvous::{Member, Options, Secret},
};

use crate::{
    code::{Code, Result},
    comm::{Comm, Link, Phase},
    cuda, group, log,
    settings::{call, version},
    work,
};

const MAGIC: &[u8; 9] = b"fake-nccl";
const PATIENCE: Duration = Duration::from_secs(60); // after that a meeting is given up, abort or not
const ARENA_BYTES: usize = 1 << 30;

/// Where the ids of this process lead, until rank 0 comes.
static DOORS: LazyLock<Mutex<HashMap<u16, TcpListener>>> = LazyLock::new(Mutex::default);

/// 128 bytes: the magic, the port, and a secret.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Id(pub [u8; 128]);

impl Id {
    /// A new one, whose door is open.
    pub fn new() -> Result<Self> {
        let failed = |what: String| Code::SYSTEM.because(what);
        let door = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .map_err(|error| failed(error.to_string()))?;
        let port = door
            .local_addr()
            .map_err(|error| failed(error.to_string()))?
            .port();
        let secret = Secret::random_text().map_err(|error| failed(error.to_string()))?;
        let mut id = Self([0; 128]);
        id.0[..9].copy_from_slice(MAGIC);
        id.0[9..11].copy_from_slice(&port.to_le_bytes());
        id.0[11..75].copy_from_slice(secret.as_bytes());
        doors().insert(port, door);
        Ok(id)
    }

    /// The port that it leads to.
    pub fn port(&self) -> Result<u16> {
        match &self.0[..9] == MAGIC {
            true => Ok(u16::from_le_bytes([self.0[9], self.0[10]])),
            false => Err(Code::ARGUMENT.because("not an id of this library")),
        }
    }

    fn join(&self, port: u16, rank: usize, size: usize) -> fabric_engine::Result<Link> {
        if size == 1 {
            return Ok(Link {
                communicator: Box::new(Solo::new(Clock::machine())),
                _member: None,
            });
        }
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut options = Options::new(rank, size, address, Secret::from_bytes(&self.0[11..75]));
        options.patience = PATIENCE;
        let door = (rank == 0).then(|| doors().remove(&port)).flatten();
        let member = match door {
            Some(door) => Member::host(options, door),
            None => Member::join(options),
        }?;
        let member = Arc::new(member);
        let options = host::Options {
            arena_bytes: ARENA_BYTES,
            ..host::Options::default()
        };
        let communicator = Box::new(host::Host::best(&member, options)?);
        Ok(Link {
            communicator,
            _member: Some(member),
        })
    }
}

fn doors() -> std::sync::MutexGuard<'static, HashMap<u16, TcpListener>> {
    DOORS.lock().unwrap_or_else(|held| held.into_inner())
}

/// Meet the others, beside the caller.
fn begin(comm: &Arc<Comm>, id: Id) -> Result {
    let (own, port) = (comm.clone(), id.port()?);
    beside(move || meet(&own, &id, port))
}

/// Meet them, on this thread.
pub fn meet(comm: &Comm, id: &Id, port: u16) {
    match id.join(port, comm.rank(), comm.size()) {
        Ok(link) => {
            let mut slot = comm.link();
            let mut state = comm.state();
            if state.phase == Phase::Joining {
                state.aborter = Some(link.communicator.aborter());
                state.phase = Phase::Ready;
                *slot = Some(link);
            }
        }
        Err(error) => comm.fail(Code::of(&error), error.to_string()),
    }
    comm.changed.notify_all();
}

/// Do something on a thread of its own.
pub fn beside(body: impl FnOnce() + Send + 'static) -> Result {
    let thread = std::thread::Builder::new()
        .name("fake-nccl".into())
        .spawn(body);
    thread
        .map(drop)
        .map_err(|error| Code::SYSTEM.because(error.to_string()))
}

/// Whether a configuration asks for blocking. It must be one: its size, its magic, and a version that fits.
pub fn is_blocking(config: *const u8) -> Result<bool> {
    if config.is_null() {
        return Ok(true);
    }
    let word = |at: usize| {
        let place = config.wrapping_add(at).cast::<i32>();
        // SAFETY: the interface demands a configuration, whose first 20 bytes every version has.
        unsafe { place.read_unaligned() }
    };
    let (size, magic, since, blocking) = (word(0), word(8) as u32, word(12), word(16));
    if magic != 0xcafe_beef {
        return Err(Code::ARGUMENT
            .because("ncclConfig_t argument not initialized via NCCL_CONFIG_INITIALIZER"));
    }
    if size < 24 || since > version() {
        return Err(Code::ARGUMENT.because(format!(
            "a configuration of {size} bytes, of version {since}"
        )));
    }
    match blocking {
        i32::MIN | 1 => Ok(true),
        0 => Ok(false),
        other => {
            Err(Code::ARGUMENT.because(format!("Invalid config blocking attribute value {other}")))
        }
    }
}

fn init(into: *mut *mut c_void, size: i32, id: Id, rank: i32, config: *const u8) -> Result {
    if into.is_null() || rank < 0 || rank >= size {
        return Err(Code::ARGUMENT.because(format!("Invalid rank requested : {rank}/{size}")));
    }
    let is_blocking = is_blocking(config)?;
    let context = cuda::current()?;
    let comm = Comm::new(context, is_blocking, cuda::event()?);
    comm.settle(rank as usize, size as usize);
    log::note(format!(
        "ncclCommInitRankConfig comm={} rank={rank} size={size}",
        comm.number
    ));
    begin(&comm, id)?;
    // SAFETY: not null, and the interface demands a place.
    unsafe { into.write(comm.publish()) };
    match group::adopt(&comm) {
        true => Ok(()),
        false => comm.begun(),
    }
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetVersion(number: *mut i32) -> i32 {
    call("ncclGetVersion", || {
        if number.is_null() {
            return Err(Code::ARGUMENT);
        }
        // SAFETY: not null, and the interface demands a place.
        unsafe { number.write(version()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetUniqueId(id: *mut Id) -> i32 {
    call("ncclGetUniqueId", || {
        let new = Id::new()?;
        // SAFETY: the interface demands a place.
        unsafe { id.write(new) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommInitRank(comm: *mut *mut c_void, size: i32, id: Id, rank: i32) -> i32 {
    group::member("ncclCommInitRank", || {
        init(comm, size, id, rank, std::ptr::null())
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommInitRankConfig(
    comm: *mut *mut c_void,
    size: i32,
    id: Id,
    rank: i32,
    config: *const u8,
) -> i32 {
    group::member("ncclCommInitRankConfig", || {
        init(comm, size, id, rank, config)
    })
}

/// How it is. What waits to be started is, once this was asked often enough.
fn ask(comm: &Arc<Comm>) -> Result<i32> {
    let mut state = comm.state();
    if state.code != 0 {
        let words = state.words.clone();
        return Ok(Code(state.code).because(words).0);
    }
    let failed = state
        .aborter
        .as_ref()
        .and_then(|aborter| aborter.signal().first());
    if let Some(error) = failed.filter(|_| state.phase == Phase::Ready) {
        let code = Code::of(&error);
        (state.code, state.words) = (code.0, error.to_string());
        comm.changed.notify_all();
        return Ok(code.0);
    }
    if state.polls > 0 {
        state.polls -= 1;
        return Ok(Code::IN_PROGRESS.0);
    }
    if let Some(tasks) = state.deferred.take() {
        drop(state);
        if let Err(code) = work::launch(comm, tasks) {
            let mut state = comm.state();
            state.code = code.0;
            return Ok(code.0);
        }
        return Ok(Code::SUCCESS);
    }
    match state.is_busy() {
        true => Ok(Code::IN_PROGRESS.0),
        false => Ok(Code::SUCCESS),
    }
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommGetAsyncError(comm: *mut c_void, code: *mut i32) -> i32 {
    call("ncclCommGetAsyncError", || {
        let now = ask(&Comm::get(comm)?)?;
        // SAFETY: the interface demands a place.
        unsafe { code.write(now) };
        Ok(())
    })
}

fn number(
    name: &str,
    comm: *mut c_void,
    into: *mut i32,
    which: impl FnOnce(&Comm) -> usize,
) -> i32 {
    call(name, || {
        let comm = Comm::get(comm)?;
        comm.ready()?;
        // SAFETY: the interface demands a place.
        unsafe { into.write(which(&comm) as i32) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommCount(comm: *mut c_void, count: *mut i32) -> i32 {
    number("ncclCommCount", comm, count, |comm| comm.size())
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommUserRank(comm: *mut c_void, rank: *mut i32) -> i32 {
    number("ncclCommUserRank", comm, rank, |comm| comm.rank())
}

fn finalize(comm: &Arc<Comm>) -> Result {
    comm.ready()?;
    comm.state().phase = Phase::Finalizing;
    let own = comm.clone();
    beside(move || {
        let result = own
            .until_idle()
            .map_err(|code| (code, "an operation of it failed".to_string()));
        let mut slot = own.link();
        let result = result.and_then(|()| match &mut *slot {
            Some(link) => link
                .communicator
                .barrier()
                .map_err(|error| (Code::of(&error), error.to_string())),
            None => Ok(()),
        });
        let link = slot.take();
        drop(slot);
        let mut state = own.state();
        if state.phase == Phase::Finalizing {
            match result {
                Ok(()) => state.phase = Phase::Finalized,
                Err((code, words)) => (state.code, state.words) = (code.0, words),
            }
        }
        drop(state);
        own.changed.notify_all();
        drop(link);
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommFinalize(comm: *mut c_void) -> i32 {
    call("ncclCommFinalize", || {
        let comm = Comm::get(comm)?;
        log::note(format!(
            "ncclCommFinalize comm={} rank={}",
            comm.number,
            comm.rank()
        ));
        finalize(&comm)?;
        comm.begun()
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommDestroy(comm: *mut c_void) -> i32 {
    call("ncclCommDestroy", || {
        let comm = Comm::get(comm)?;
        log::note(format!(
            "ncclCommDestroy comm={} rank={}",
            comm.number,
            comm.rank()
        ));
        let state = comm.state();
        match state.phase {
            Phase::Finalized if !state.is_busy() => drop(state),
            Phase::Ready if comm.is_blocking => {
                drop(state);
                finalize(&comm)?;
                comm.begun()?;
            }
            _ => {
                return Err(Code::USAGE.because("ncclCommDestroy before ncclCommFinalize was over"));
            }
        }
        comm.forget();
        let _ = cuda::within(comm.context, || {
            cuda::end_event(comm.done);
            Ok(())
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommAbort(comm: *mut c_void) -> i32 {
    call("ncclCommAbort", || {
        let comm = Comm::get(comm)?;
        log::note(format!(
            "ncclCommAbort comm={} rank={}",
            comm.number,
            comm.rank()
        ));
        comm.forget();
        let mut state = comm.state();
        state.phase = Phase::Aborted;
        let aborter = state.aborter.take();
        drop(state);
        comm.changed.notify_all();
        if let Some(aborter) = aborter {
            aborter.abort("ncclCommAbort");
        }
        // What runs lets go of the link now; whoever has it last ends it.
        beside(move || drop(comm.link().take()))
    })
}
