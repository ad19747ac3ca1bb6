//! A communicator: from its first rank's arrival to its end.

use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{
        Arc, Condvar, LazyLock, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use fabric_engine::{
    comm::{Aborter, Communicator},
    kernels::Dtype,
    rendezvous::Member,
};

use crate::{
    code::{Code, Result},
    cuda::Handle,
    task::Task,
};

const POLLS: u32 = 2; // how often what was started says that it is in progress

/// By handle. Numbers are never given twice.
static COMMS: LazyLock<Mutex<HashMap<usize, Arc<Comm>>>> = LazyLock::new(Mutex::default);
static NUMBER: AtomicUsize = AtomicUsize::new(1);

/// A communicator.
pub struct Comm {
    pub number: usize,
    /// This rank's number, and how many there are; of a split that is known only after its ranks have met.
    place: OnceLock<(usize, usize)>,
    pub context: Handle,
    pub is_blocking: bool,
    pub done: Handle, // an event: the last operation is over
    pub host: Mutex<Option<Link>>,
    pub state: Mutex<State>,
    pub changed: Condvar,
    pub started: AtomicU64, // operations that have come to their turn in a stream
    ops: Mutex<Vec<Option<(Dtype, f64)>>>,
}

/// What the ranks talk over.
pub struct Link {
    pub communicator: Box<dyn Communicator>,
    pub _member: Option<Arc<Member>>, // a world of one has none; the others learn from its end that this rank leaves
}

/// What is known of it.
pub struct State {
    pub phase: Phase,
    pub code: i32, // what went wrong on its own
    pub words: String,
    pub deferred: Option<Vec<Task>>,
    pub polls: u32,
    pub splits: u32, // that have begun on it and are not over
    pub in_flight: u64,
    pub launched: u64,
    pub aborter: Option<Aborter>,
}

/// Where it is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Joining,
    Ready,
    Finalizing,
    Finalized,
    Aborted,
}

impl Comm {
    /// One that waits for the others.
    pub fn new(context: Handle, is_blocking: bool, done: Handle) -> Arc<Self> {
        Arc::new(Self {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            place: OnceLock::new(),
            context,
            is_blocking,
            done,
            host: Mutex::new(None),
            state: Mutex::new(State {
                phase: Phase::Joining,
                code: 0,
                words: String::new(),
                deferred: None,
                polls: 0,
                splits: 0,
                in_flight: 0,
                launched: 0,
                aborter: None,
            }),
            changed: Condvar::new(),
            started: AtomicU64::new(0),
            ops: Mutex::default(),
        })
    }

    /// Say which rank this is, of how many.
    pub fn settle(&self, rank: usize, size: usize) {
        let _ = self.place.set((rank, size));
    }

    /// This rank's number.
    pub fn rank(&self) -> usize {
        self.place.get().map_or(0, |place| place.0)
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.place.get().map_or(0, |place| place.1)
    }

    /// Its handle.
    pub fn publish(self: &Arc<Self>) -> *mut c_void {
        comms().insert(self.number << 8, self.clone());
        std::ptr::without_provenance_mut(self.number << 8)
    }

    /// What a handle stands for.
    pub fn get(handle: *mut c_void) -> Result<Arc<Self>> {
        let found = comms().get(&handle.addr()).cloned();
        found.ok_or_else(|| Code::ARGUMENT.because("comm is NULL, or was aborted or destroyed"))
    }

    /// From now on the handle stands for nothing.
    pub fn forget(&self) {
        comms().remove(&(self.number << 8));
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// The link to the other ranks; the lock is held while an operation runs.
    pub fn link(&self) -> MutexGuard<'_, Option<Link>> {
        self.host.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// That something new may be called.
    pub fn ready(&self) -> Result {
        let state = self.state();
        match state.phase {
            _ if state.code != 0 => Err(Code(state.code).because(state.words.clone())),
            Phase::Ready if !state.is_busy() => Ok(()),
            Phase::Ready | Phase::Joining => Err(Code::USAGE.because(
                "Attempt to use communicator before the previous operation returned ncclSuccess",
            )),
            _ => Err(Code::USAGE.because("the communicator was finalized")),
        }
    }

    /// It has failed by itself; the first error stays.
    pub fn fail(&self, code: Code, words: String) {
        let mut state = self.state();
        if state.code == 0 && state.phase != Phase::Aborted {
            (state.code, state.words) = (code.0, words);
        }
        self.changed.notify_all();
    }

    /// What a call of it returns that has started something.
    pub fn begun(&self) -> Result {
        match self.is_blocking {
            true => self.until(|state| {
                state.splits == 0 && !matches!(state.phase, Phase::Joining | Phase::Finalizing)
            }),
            false => {
                self.state().polls = POLLS;
                Err(Code::IN_PROGRESS)
            }
        }
    }

    /// Wait for it to be so, or to fail.
    fn until(&self, is_so: impl Fn(&State) -> bool) -> Result {
        let waits = |state: &mut State| !is_so(state) && state.code == 0;
        let state = self.changed.wait_while(self.state(), waits);
        let state = state.unwrap_or_else(|held| held.into_inner());
        match state.code {
            0 => Ok(()),
            code => Err(Code(code).because(state.words.clone())),
        }
    }

    /// Wait until somebody aborts it.
    pub fn until_aborted(&self) {
        let waits = |state: &mut State| state.phase != Phase::Aborted;
        drop(self.changed.wait_while(self.state(), waits));
    }

    /// Wait until nothing of it is in a stream.
    pub fn until_idle(&self) -> Result {
        self.until(|state| state.in_flight == 0 || state.phase == Phase::Aborted)
    }

    /// A reduction of its own.
    pub fn make_op(&self, dtype: Dtype, factor: f64) -> i32 {
        let mut ops = self.ops.lock().unwrap_or_else(|held| held.into_inner());
        ops.push(Some((dtype, factor)));
        ops.len() as i32 + 4
    }

    /// Which it is.
    pub fn own_op(&self, number: i32) -> Result<(Dtype, f64)> {
        let ops = self.ops.lock().unwrap_or_else(|held| held.into_inner());
        let found = usize::try_from(number - 5)
            .ok()
            .and_then(|index| *ops.get(index)?);
        found.ok_or_else(|| Code::ARGUMENT.because(format!("invalid reduction {number}")))
    }

    /// Its end.
    pub fn end_op(&self, number: i32) -> Result {
        self.own_op(number)?;
        let mut ops = self.ops.lock().unwrap_or_else(|held| held.into_inner());
        ops[number as usize - 5] = None;
        Ok(())
    }
}

impl State {
    /// Whether something was started that has not been asked for often enough, or is not over.
    pub fn is_busy(&self) -> bool {
        self.polls > 0
            || self.splits > 0
            || self.deferred.is_some()
            || matches!(self.phase, Phase::Joining | Phase::Finalizing)
    }
}

fn comms() -> MutexGuard<'static, HashMap<usize, Arc<Comm>>> {
    COMMS.lock().unwrap_or_else(|held| held.into_inner())
}
