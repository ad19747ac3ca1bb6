//! What callers hand in: places for answers, texts, bytes. The only file that trusts their pointers, other than for
//! the memory that is copied.

use std::ffi::{CStr, c_char, c_void};

use crate::code::{Code, Result};

/// Where a caller wants an answer.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// A place whose type the call's other arguments say.
    pub fn of(place: *mut T) -> Self {
        Self(place)
    }

    /// Answer.
    pub fn give(&self, value: T) -> Result {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, checked above; the driver's interface demands a place that may be written.
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    /// Answer, where the caller wants one.
    pub fn offer(&self, value: T) {
        if !self.0.is_null() {
            let _ = self.give(value);
        }
    }
}

impl Out<c_char> {
    /// Answer with at most `room` bytes, the last of which is 0.
    pub fn write(&self, text: &str, room: i32) -> Result {
        let room = usize::try_from(room).map_err(|_| Code::INVALID_VALUE)?;
        if self.0.is_null() || room == 0 {
            return Err(Code::INVALID_VALUE);
        }
        let bytes = text.bytes().take(room - 1).chain([0]);
        for (index, byte) in bytes.enumerate() {
            let place = self.0.wrapping_add(index);
            // SAFETY: `index` is below `room`, for which the interface demands space.
            unsafe { place.write(byte as c_char) };
        }
        Ok(())
    }
}

/// A value, or an array, of a caller's.
#[repr(transparent)]
pub struct In<T>(*const T);

impl<T: Copy> In<T> {
    /// Values whose type the call's other arguments say.
    pub fn of(values: *const T) -> Self {
        Self(values)
    }

    /// The element at `index`.
    pub fn at(&self, index: usize) -> Result<T> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let place = self.0.wrapping_add(index);
        // SAFETY: not null, checked above; callers of this function ask for elements that the interface demands.
        Ok(unsafe { place.read_unaligned() })
    }
}

impl In<c_char> {
    /// A text that ends with a 0.
    pub fn text(&self) -> Result<String> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, checked above; the interface demands a text that ends.
        let text = unsafe { CStr::from_ptr(self.0) };
        Ok(text.to_string_lossy().into_owned())
    }
}

/// The values of a kernel's arguments, copied at the launch.
pub fn arguments(pointers: *mut *mut c_void, sizes: &[usize]) -> Result<Vec<Vec<u8>>> {
    let pointers = In::of(pointers.cast_const());
    let mut values = Vec::with_capacity(sizes.len());
    for (index, &size) in sizes.iter().enumerate() {
        let from = In::of(pointers.at(index)?.cast_const().cast::<u8>());
        values.push((0..size).map(|byte| from.at(byte)).collect::<Result<_>>()?);
    }
    Ok(values)
}
