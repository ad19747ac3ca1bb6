//! Several calls as one: nothing starts before the outermost group ends, so that sends and receives which need each other
//! do not wait for each other.

use std::{cell::RefCell, sync::Arc};

use super::{comm::Inner, library::Library, raw};
use crate::error::Result;

thread_local! {
    static OPEN: RefCell<Option<Open>> = const { RefCell::new(None) };
}

/// The group that this thread has open.
struct Open {
    depth: usize,
    members: Vec<Arc<Inner>>,
}

/// Make the calls of `body` as one group. Groups may be nested; the outermost starts everything. An error within, or a
/// panic, ends the group too: what was called before it is started, as on other ranks.
///
/// # Errors
/// The first of the body's error, that of starting the group, and that of bringing it to the device.
pub fn group<R>(library: &Library, body: impl FnOnce() -> Result<R>) -> Result<R> {
    // SAFETY: it takes nothing.
    let code = unsafe { (library.functions.group_start)() };
    library.check(None, "ncclGroupStart", code, std::ptr::null_mut())?;
    OPEN.with_borrow_mut(|open| {
        let open = open.get_or_insert_with(|| Open {
            depth: 0,
            members: Vec::new(),
        });
        open.depth += 1;
    });
    let mut end = End {
        library,
        is_open: true,
    };
    let result = body();
    let ended = end.now();
    let value = result?;
    ended.map(|()| value)
}

/// The duty to end a group, also when its body panics.
struct End<'a> {
    library: &'a Library,
    is_open: bool,
}

impl End<'_> {
    fn now(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.is_open) {
            return Ok(());
        }
        // SAFETY: it takes nothing; the start that it belongs to was this thread's.
        let code = unsafe { (self.library.functions.group_end)() };
        let members = OPEN.with_borrow_mut(|open| {
            let inner = open.as_mut().expect("opened by `group`");
            inner.depth -= 1;
            match inner.depth {
                0 => open.take().expect("it is there").members,
                _ => Vec::new(),
            }
        });
        let mut result = Ok(());
        for member in &members {
            if !matches!(code, raw::SUCCESS | raw::IN_PROGRESS) {
                let error = member.blame("ncclGroupEnd", code);
                result = result.and(Err(error));
            }
            member.unpin();
        }
        if members.is_empty() {
            self.library
                .check(None, "ncclGroupEnd", code, std::ptr::null_mut())?;
        }
        if code == raw::IN_PROGRESS {
            for member in &members {
                result = result.and(member.settle("ncclGroupEnd"));
            }
        }
        result
    }
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        let _ = self.now(); // only after a panic, which says more
    }
}

/// Count a communicator into this thread's group, if one is open: nobody else may use or end it until the group has ended.
pub(super) fn join(comm: &Arc<Inner>, operation: &str) -> Result<bool> {
    if !is_open() {
        return Ok(false);
    }
    let is_new = comm.pin(operation)?;
    if is_new {
        OPEN.with_borrow_mut(|open| {
            let open = open.as_mut().expect("it is open");
            open.members.push(comm.clone());
        });
    }
    Ok(true)
}

/// Whether this thread has a group open.
pub(super) fn is_open() -> bool {
    OPEN.with_borrow(Option::is_some)
}

/// Whether this thread has a group open that a communicator is in.
pub(super) fn is_open_with(comm: &Arc<Inner>) -> bool {
    OPEN.with_borrow(|open| {
        let members = open.iter().flat_map(|open| &open.members);
        members.into_iter().any(|member| Arc::ptr_eq(member, comm))
    })
}
