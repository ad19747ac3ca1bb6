//! Copies and fills. Host memory that is not page-locked is copied at the call on its way in, and waited for on its way
//! out, as the driver does; page-locked memory is read and written when its turn comes.

use std::ffi::c_void;

use crate::{
    code::{Code, Result},
    context::Context,
    driver::within,
    memory::{find, inside},
    registry::Handle,
};

/// One end of a copy.
#[derive(Clone, Copy)]
struct End {
    address: usize,
    is_device: bool,
}

fn host(address: usize) -> End {
    End {
        address,
        is_device: false,
    }
}

fn device(address: usize) -> End {
    End {
        address,
        is_device: true,
    }
}

/// What the address itself says.
fn either(address: usize) -> End {
    End {
        address,
        is_device: find(address).is_some_and(|found| found.place.device().is_some()),
    }
}

impl End {
    /// Memory of the host that the driver does not know.
    fn is_pageable(self) -> bool {
        !self.is_device && find(self.address).is_none()
    }

    /// That the memory is there; of the host's the caller says so.
    fn check(self, bytes: usize) -> Result {
        match self.is_device {
            true => inside(self.address, bytes).map(drop),
            false => Ok(()),
        }
    }
}

fn carry(source: usize, target: usize, bytes: usize) {
    let source = std::ptr::with_exposed_provenance::<u8>(source);
    let target = std::ptr::with_exposed_provenance_mut::<u8>(target);
    // SAFETY: device memory was checked to be allocated; for host memory the interface demands that it is valid.
    unsafe { std::ptr::copy(source, target, bytes) };
}

/// Queue a copy. `waits`: the caller's own wish.
fn copy(
    context: &Context,
    target: End,
    source: End,
    bytes: usize,
    stream: Handle,
    waits: bool,
) -> Result {
    let stream = context.stream(stream)?;
    if bytes == 0 {
        return Ok(());
    }
    if target.address == 0 || source.address == 0 {
        return Err(Code::INVALID_VALUE);
    }
    if source.is_pageable() {
        let mut staged = vec![0; bytes].into_boxed_slice();
        carry(
            source.address,
            staged.as_mut_ptr().expose_provenance(),
            bytes,
        );
        context.submit(&stream, move || {
            target.check(bytes)?;
            carry(staged.as_ptr().expose_provenance(), target.address, bytes);
            Ok(())
        });
    } else {
        context.submit(&stream, move || {
            source.check(bytes)?;
            target.check(bytes)?;
            carry(source.address, target.address, bytes);
            Ok(())
        });
    }
    let waits = waits && !(source.is_device && target.is_device);
    if waits || target.is_pageable() {
        context.settle(&stream)?;
    }
    Ok(())
}

const NULL: Handle = Handle(std::ptr::null_mut());

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoD_v2(to: usize, from: *const c_void, bytes: usize) -> i32 {
    within("cuMemcpyHtoD_v2", |context| {
        copy(
            context,
            device(to),
            host(from.expose_provenance()),
            bytes,
            NULL,
            true,
        )
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(
    to: usize,
    from: *const c_void,
    bytes: usize,
    stream: Handle,
) -> i32 {
    within("cuMemcpyHtoDAsync_v2", |context| {
        copy(
            context,
            device(to),
            host(from.expose_provenance()),
            bytes,
            stream,
            false,
        )
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, from: usize, bytes: usize) -> i32 {
    within("cuMemcpyDtoH_v2", |context| {
        copy(
            context,
            host(to.expose_provenance()),
            device(from),
            bytes,
            NULL,
            true,
        )
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: usize,
    bytes: usize,
    stream: Handle,
) -> i32 {
    within("cuMemcpyDtoHAsync_v2", |context| {
        copy(
            context,
            host(to.expose_provenance()),
            device(from),
            bytes,
            stream,
            false,
        )
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoD_v2(to: usize, from: usize, bytes: usize) -> i32 {
    within("cuMemcpyDtoD_v2", |context| {
        copy(context, device(to), device(from), bytes, NULL, true)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: usize, from: usize, bytes: usize, stream: Handle) -> i32 {
    within("cuMemcpyDtoDAsync_v2", |context| {
        copy(context, device(to), device(from), bytes, stream, false)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpy(to: usize, from: usize, bytes: usize) -> i32 {
    within("cuMemcpy", |context| {
        copy(context, either(to), either(from), bytes, NULL, true)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyAsync(to: usize, from: usize, bytes: usize, stream: Handle) -> i32 {
    within("cuMemcpyAsync", |context| {
        copy(context, either(to), either(from), bytes, stream, false)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyPeer(
    to: usize,
    _target: Handle,
    from: usize,
    _source: Handle,
    bytes: usize,
) -> i32 {
    within("cuMemcpyPeer", |context| {
        copy(context, device(to), device(from), bytes, NULL, true)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyPeerAsync(
    to: usize,
    _target: Handle,
    from: usize,
    _source: Handle,
    bytes: usize,
    stream: Handle,
) -> i32 {
    within("cuMemcpyPeerAsync", |context| {
        copy(context, device(to), device(from), bytes, stream, false)
    })
}

/// Queue a fill with `count` copies of a pattern.
fn fill<const N: usize>(
    context: &Context,
    to: usize,
    pattern: [u8; N],
    count: usize,
    stream: Handle,
) -> Result {
    let stream = context.stream(stream)?;
    if !to.is_multiple_of(N) {
        return Err(Code::INVALID_VALUE);
    }
    if count == 0 {
        return Ok(());
    }
    let bytes = count.checked_mul(N).ok_or(Code::INVALID_VALUE)?;
    context.submit(&stream, move || {
        inside(to, bytes)?;
        for index in 0..count {
            let place = std::ptr::with_exposed_provenance_mut::<[u8; N]>(to + index * N);
            // SAFETY: all of it was just found to be allocated, and a pattern of bytes needs no alignment.
            unsafe { place.write(pattern) };
        }
        Ok(())
    });
    Ok(())
}

macro_rules! fills {
    ($($now:ident $later:ident $value:ty;)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $now(to: usize, value: $value, count: usize) -> i32 {
            within(stringify!($now), |context| fill(context, to, value.to_ne_bytes(), count, NULL))
        }

        #[unsafe(no_mangle)]
        extern "C" fn $later(to: usize, value: $value, count: usize, stream: Handle) -> i32 {
            within(stringify!($later), |context| fill(context, to, value.to_ne_bytes(), count, stream))
        }
    )*};
}

fills! {
    cuMemsetD8_v2 cuMemsetD8Async u8;
    cuMemsetD16_v2 cuMemsetD16Async u16;
    cuMemsetD32_v2 cuMemsetD32Async u32;
}
