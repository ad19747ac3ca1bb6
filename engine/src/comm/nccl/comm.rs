//! A communicator of NCCL's: how it comes to be, is asked how it is, splits, and ends.
//!
//! [Note: one caller at a time] NCCL lets one thread at a time use a communicator, and frees it when it is aborted. So
//! the handle is behind a lock that is held for one call, never while something is waited for; an open group keeps other
//! threads out ([`Inner::pin`]); whoever ends the communicator takes the handle out first. Nothing blocks within a call,
//! because communicators are non-blocking, so that an abort comes through while another thread waits.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread::ThreadId,
    time::Duration,
};

use super::{
    config::Config,
    group,
    library::Library,
    raw::{self, Code, RawComm, RawId},
};
use crate::error::{Error, Result};

const FIRST_NAP: Duration = Duration::from_micros(20);
const LONGEST_NAP: Duration = Duration::from_millis(2);

/// Where ranks meet: made by one, told to all.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Id([u8; 128]);

impl Id {
    /// A new one, which leads to this process.
    ///
    /// # Errors
    /// When NCCL finds no network interface.
    pub fn create(library: &Library) -> Result<Self> {
        let mut id = RawId([0; 128]);
        // SAFETY: a place for an id.
        let code = unsafe { (library.functions.unique_id)(&mut id) };
        library.check(None, "ncclGetUniqueId", code, std::ptr::null_mut())?;
        Ok(Self(id.0))
    }

    /// From bytes that another rank sent.
    pub fn from_bytes(bytes: [u8; 128]) -> Self {
        Self(bytes)
    }

    /// What to send to the others.
    pub fn bytes(&self) -> &[u8; 128] {
        &self.0
    }
}

impl std::fmt::Debug for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Id(..)") // it holds a secret
    }
}

/// What a communicator is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Everything that was started is with the device.
    Idle,
    /// Something is still being started.
    Busy,
}

/// A communicator. It may be shared among threads.
pub struct Comm(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) library: Arc<Library>,
    pub(super) rank: usize,
    pub(super) size: usize,
    config: Config,
    state: Mutex<State>,
    freed: Condvar, // no group is open any more
}

struct State {
    handle: Option<Handle>,
    pinned_by: Option<ThreadId>,
    /// The first error after which NCCL can only be aborted, or why there is no handle.
    end: Option<Error>,
}

#[derive(Clone, Copy)]
struct Handle(RawComm);

// SAFETY: NCCL's communicators are not bound to a thread; see [Note: one caller at a time].
unsafe impl Send for Handle {}

impl Comm {
    /// Meet the other ranks at `id`, each with the device that is current on its thread.
    ///
    /// # Errors
    /// When the ranks do not all come before the deadline, disagree, or cannot reach each other.
    pub fn init(
        library: &Arc<Library>,
        id: &Id,
        size: usize,
        rank: usize,
        config: Config,
    ) -> Result<Self> {
        if rank >= size || i32::try_from(size).is_err() {
            let what = format!("rank {rank} in a world of {size}");
            return Err(Error::argument(
                what,
                "Ranks are numbered from 0 to world size - 1",
            ));
        }
        let mut told = config.tell(library.version())?;
        let mut handle = std::ptr::null_mut();
        let raw: *mut _ = &mut told.raw;
        // SAFETY: a place for the handle, and a configuration that lives as long as the call; NCCL copies it.
        let code = unsafe {
            (library.functions.init)(
                &mut handle,
                size as i32,
                RawId(id.0),
                rank as i32,
                raw.cast(),
            )
        };
        if code != raw::IN_PROGRESS {
            library.check(Some(rank), "ncclCommInitRankConfig", code, handle)?;
        }
        let comm = Self::adopt(library, handle, size, rank, config);
        comm.0
            .settle("ncclCommInitRankConfig")
            .inspect_err(|error| comm.0.abort(error.clone()))?;
        Ok(comm)
    }

    fn adopt(
        library: &Arc<Library>,
        handle: RawComm,
        size: usize,
        rank: usize,
        config: Config,
    ) -> Self {
        Self(Arc::new(Inner {
            library: library.clone(),
            rank,
            size,
            config,
            state: Mutex::new(State {
                handle: Some(Handle(handle)),
                pinned_by: None,
                end: None,
            }),
            freed: Condvar::new(),
        }))
    }

    /// This rank's number.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// Ranks in the group.
    pub fn size(&self) -> usize {
        self.0.size
    }

    /// The library that it is of.
    pub fn library(&self) -> &Arc<Library> {
        &self.0.library
    }

    /// How it is. Errors of what runs on the device show here, and nowhere else: whoever waits for a stream asks.
    ///
    /// # Errors
    /// What has befallen it, such as the end of another rank; it can then only be aborted.
    pub fn async_error(&self) -> Result<Progress> {
        self.0.ask("the communicator")
    }

    /// End everything that runs on it, also what waits on a device, from any thread. It is unusable afterwards and says
    /// `reason`; doing so twice is no mistake.
    ///
    /// # Errors
    /// When a group that it is in is open, on this thread, or for too long on another.
    pub fn abort(&self, reason: impl Into<String>) -> Result<()> {
        if group::is_open_with(&self.0) {
            let what = format!("rank {}: abort within a group", self.0.rank);
            return Err(Error::argument(
                what,
                "Let the group end first; an error in it does that",
            ));
        }
        let error = Error::Aborted {
            rank: self.0.rank,
            reason: reason.into(),
        };
        drop(self.0.unpinned("abort")?);
        self.0.abort(error);
        Ok(())
    }

    /// The group of all ranks that give the same color, ordered by `key`, then by rank. `None`: this rank is in none. All
    /// ranks must split together.
    ///
    /// # Errors
    /// When the library is older than 2.18, or the new group does not come to be.
    pub fn split(&self, color: Option<u32>, key: u32, config: Config) -> Result<Option<Comm>> {
        let inner = &self.0;
        let functions = &inner.library.functions;
        let Some(split) = functions.split else {
            return Err(inner
                .library
                .lacks(Some(inner.rank), "ncclCommSplit", "2.18"));
        };
        if group::is_open() {
            let what = format!("rank {}: split within a group", inner.rank);
            return Err(Error::argument(what, "Split before the group, or after it"));
        }
        let number = |number: u32| {
            let what = || format!("rank {}: split by {number}", inner.rank);
            i32::try_from(number)
                .map_err(|_| Error::argument(what(), "NCCL takes colors and keys below 2^31"))
        };
        let told_color = color.map_or(Ok(raw::NO_COLOR), number)?;
        let (key, mut told) = (number(key)?, config.tell(inner.library.version())?);
        let mut handle = std::ptr::null_mut();
        let raw: *mut _ = &mut told.raw;
        inner.call("ncclCommSplit", |comm| {
            // SAFETY: a communicator that is alive, kept so by the lock; a place for the new one; NCCL copies the rest.
            unsafe { split(comm, told_color, key, &mut handle, raw.cast()) }
        })?;
        if color.is_none() {
            return Ok(None);
        }
        let mut comm = Self::adopt(&inner.library, handle, inner.size, inner.rank, config);
        comm.0
            .settle("ncclCommSplit")
            .inspect_err(|error| comm.0.abort(error.clone()))?;
        let (mut size, mut rank) = (0, 0);
        comm.0.side_call("ncclCommCount", |comm| {
            // SAFETY: a communicator that is alive, kept so by the lock, and a place for the number.
            unsafe { (functions.count)(comm, &mut size) }
        })?;
        comm.0.side_call("ncclCommUserRank", |comm| {
            // SAFETY: as above.
            unsafe { (functions.user_rank)(comm, &mut rank) }
        })?;
        let new = Arc::get_mut(&mut comm.0).expect("nobody else has seen it");
        (new.size, new.rank) = (size as usize, rank as usize);
        Ok(Some(comm))
    }

    /// Wait until everything that was started is over, on all ranks, and end it.
    ///
    /// # Errors
    /// What befell it, or that the end did not come in time: it is then aborted.
    pub fn finish(self) -> Result<()> {
        if group::is_open_with(&self.0) {
            let what = format!("rank {}: finish within a group", self.0.rank);
            return Err(Error::argument(what, "Let the group end first"));
        }
        self.0.finish()
    }
}

impl std::fmt::Debug for Comm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Comm(rank {} of {})", self.0.rank, self.0.size)
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics halfway through a change.
        self.state.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// The state, once no other thread has a group open with this communicator.
    fn unpinned(&self, operation: &str) -> Result<MutexGuard<'_, State>> {
        let own = std::thread::current().id();
        let is_others = |state: &mut State| state.pinned_by.is_some_and(|thread| thread != own);
        let patience = self.config.patience();
        let (mut state, _) = self
            .freed
            .wait_timeout_while(self.state(), patience, is_others)
            .unwrap_or_else(|held| held.into_inner());
        match is_others(&mut state) {
            true => Err(self.late(operation, patience)),
            false => Ok(state),
        }
    }

    /// One call of NCCL's with the handle. Within a group it only counts as made; otherwise it is waited for until it
    /// is with the device.
    pub(super) fn call(
        self: &Arc<Self>,
        operation: &str,
        function: impl FnOnce(RawComm) -> Code,
    ) -> Result<()> {
        let is_grouped = group::join(self, operation)?;
        let mut state = self.unpinned(operation)?;
        let Some(handle) = state.handle else {
            return Err(self.gone(&state, operation));
        };
        let code = function(handle.0);
        if let Err(error) = self
            .library
            .check(Some(self.rank), operation, code, handle.0)
        {
            if is_fatal(code) {
                state.end.get_or_insert_with(|| error.clone());
            }
            return Err(error);
        }
        drop(state);
        match code == raw::IN_PROGRESS && !is_grouped {
            true => self.settle(operation),
            false => Ok(()),
        }
    }

    /// The same for what neither starts anything nor belongs to a group.
    pub(super) fn side_call(
        &self,
        operation: &str,
        function: impl FnOnce(RawComm) -> Code,
    ) -> Result<()> {
        let state = self.unpinned(operation)?;
        let Some(handle) = state.handle else {
            return Err(self.gone(&state, operation));
        };
        let code = function(handle.0);
        self.library
            .check(Some(self.rank), operation, code, handle.0)
    }

    /// Keep other threads out while this one's group is open. False: it did already.
    pub(super) fn pin(&self, operation: &str) -> Result<bool> {
        let mut state = self.unpinned(operation)?;
        if state.handle.is_none() {
            return Err(self.gone(&state, operation));
        }
        let is_new = state.pinned_by.is_none();
        state.pinned_by = Some(std::thread::current().id());
        Ok(is_new)
    }

    /// Let them in again.
    pub(super) fn unpin(&self) {
        self.state().pinned_by = None;
        self.freed.notify_all();
    }

    /// What went wrong with a group that this communicator is in.
    pub(super) fn blame(&self, operation: &str, code: Code) -> Error {
        let mut state = self.state();
        let handle = state.handle.map_or(std::ptr::null_mut(), |handle| handle.0);
        let error = self.library.error(Some(self.rank), operation, code, handle);
        if is_fatal(code) {
            state.end.get_or_insert_with(|| error.clone());
        }
        error
    }

    /// How it is, right now.
    fn ask(&self, operation: &str) -> Result<Progress> {
        let mut state = self.state();
        let Some(handle) = state.handle else {
            return Err(self.gone(&state, operation));
        };
        let mut now = raw::SUCCESS;
        // SAFETY: a communicator that is alive, kept so by the lock, and a place for its state.
        let code = unsafe { (self.library.functions.async_error)(handle.0, &mut now) };
        self.library
            .check(Some(self.rank), "ncclCommGetAsyncError", code, handle.0)?;
        match now {
            raw::SUCCESS => Ok(Progress::Idle),
            raw::IN_PROGRESS => Ok(Progress::Busy),
            code => {
                let error = self
                    .library
                    .error(Some(self.rank), operation, code, handle.0);
                Err(state.end.get_or_insert(error).clone())
            }
        }
    }

    /// Wait until nothing is in progress.
    pub(super) fn settle(&self, operation: &str) -> Result<()> {
        let (clock, patience) = (&self.config.clock, self.config.patience());
        let deadline = clock.now().saturating_add(patience);
        let mut nap = FIRST_NAP;
        loop {
            if self.ask(operation)? == Progress::Idle {
                return Ok(());
            }
            if clock.now() >= deadline {
                let error = self.late(operation, patience);
                self.state().end.get_or_insert_with(|| error.clone());
                return Err(error);
            }
            // The first error of the group ends the nap.
            if let Some(error) = self.config.signal.wait(nap) {
                self.state().end.get_or_insert_with(|| error.clone());
                return Err(error);
            }
            nap = (nap * 2).min(LONGEST_NAP);
        }
    }

    /// Let everything come to its end; only what has failed is left for [`Inner::abort`].
    fn finish(&self) -> Result<()> {
        let functions = &self.library.functions;
        let state = self.unpinned("ncclCommFinalize")?;
        match (&state.end, state.handle) {
            (_, None) => return Ok(()), // aborted, and said so
            (Some(error), _) => return Err(error.clone()),
            _ => drop(state),
        }
        self.side_call("ncclCommFinalize", |comm| {
            // SAFETY: a communicator that is alive, kept so by the lock.
            unsafe { (functions.finalize)(comm) }
        })?;
        self.settle("ncclCommFinalize")?;
        let Some(handle) = self.take(self.over("the end")) else {
            return Ok(());
        };
        // SAFETY: nobody else has the handle any more, and nothing is in progress on it.
        let code = unsafe { (functions.destroy)(handle.0) };
        self.library.check(
            Some(self.rank),
            "ncclCommDestroy",
            code,
            std::ptr::null_mut(),
        )
    }

    /// End it at once, if nobody has yet; later calls say `why`.
    fn abort(&self, why: Error) {
        if let Some(handle) = self.take(why) {
            // SAFETY: nobody else has the handle any more.
            let code = unsafe { (self.library.functions.abort)(handle.0) };
            if let Err(error) =
                self.library
                    .check(Some(self.rank), "ncclCommAbort", code, std::ptr::null_mut())
            {
                tracing::warn!(%error, "what NCCL has for this communicator is left behind");
            }
        }
    }

    fn take(&self, why: Error) -> Option<Handle> {
        let mut state = self.state();
        let handle = state.handle.take();
        if handle.is_some() {
            state.end.get_or_insert(why);
        }
        handle
    }

    fn gone(&self, state: &State, operation: &str) -> Error {
        state.end.clone().unwrap_or_else(|| self.over(operation))
    }

    fn over(&self, what: &str) -> Error {
        Error::Aborted {
            rank: self.rank,
            reason: format!("its NCCL communicator has ended ({what})"),
        }
    }

    fn late(&self, operation: &str, after: Duration) -> Error {
        Error::Timeout {
            rank: self.rank,
            operation: operation.into(),
            waiting_for: (0..self.size).filter(|peer| *peer != self.rank).collect(),
            after,
        }
    }
}

// Of the inside, not of `Comm`: a group that is open keeps what it has been used on.
impl Drop for Inner {
    fn drop(&mut self) {
        // The others will wait in vain for a rank that panics: they are better told at once.
        let result = match std::thread::panicking() {
            true => Err(self.over("a panic")),
            false => self.finish(),
        };
        if let Err(error) = result {
            self.abort(error);
        }
    }
}

/// Whether a communicator that said so can only be aborted: not after a mistake in a call.
fn is_fatal(code: Code) -> bool {
    !matches!(code, raw::INVALID_ARGUMENT | raw::INVALID_USAGE)
}
