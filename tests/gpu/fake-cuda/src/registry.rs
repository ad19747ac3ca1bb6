//! Handles, and what they stand for. A number is never given twice, so that a handle used after its end is unknown.

use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::code::{Code, Result};

static NEXT: AtomicUsize = AtomicUsize::new(1);

/// An opaque pointer of the driver's interface.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handle(pub *mut c_void);

impl Handle {
    /// One that nobody has.
    pub fn fresh() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed) * 0x100;
        Self(std::ptr::without_provenance_mut(number))
    }

    /// Its number.
    pub fn number(self) -> usize {
        self.0.addr()
    }
}

/// What handles of one kind stand for.
pub struct Registry<T>(Mutex<Option<HashMap<usize, Arc<T>>>>);

impl<T> Registry<T> {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Keep `value`, and give it a handle.
    pub fn add(&self, value: Arc<T>) -> Handle {
        let handle = Handle::fresh();
        self.put(handle, value);
        handle
    }

    /// Keep `value` under a handle that was made for it.
    pub fn put(&self, handle: Handle, value: Arc<T>) {
        let mut table = self.lock();
        table.get_or_insert_default().insert(handle.number(), value);
    }

    /// What `handle` stands for.
    pub fn get(&self, handle: Handle) -> Result<Arc<T>> {
        let table = self.lock();
        let found = table.as_ref().and_then(|table| table.get(&handle.number()));
        found.cloned().ok_or(Code::INVALID_HANDLE)
    }

    /// The same, which from now on is unknown.
    pub fn remove(&self, handle: Handle) -> Result<Arc<T>> {
        let mut table = self.lock();
        let found = table
            .as_mut()
            .and_then(|table| table.remove(&handle.number()));
        found.ok_or(Code::INVALID_HANDLE)
    }

    fn lock(&self) -> MutexGuard<'_, Option<HashMap<usize, Arc<T>>>> {
        lock(&self.0)
    }
}

/// The contents of a mutex; nothing in here panics halfway through a change.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|held| held.into_inner())
}
