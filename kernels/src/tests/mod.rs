//! What kernels promise, checked against the oracle and against arithmetic that is neither's.

mod casts;
mod combine;
mod equality;
mod exact;
mod optim;
mod refusals;
mod specials;
mod steps;

use std::sync::Arc;

use crate::device::{Block, Device, Moment, Squares, Task};
use crate::dtype::{Element, Memory};
use crate::scalar::{Float, Integer};
use crate::{KernelError, Span};

/// Elements in every buffer of the equality tests: the longest span, the largest offset, and a guard on either side.
const ROOM: usize = 257 + 7 + 2;

/// Length, offset of the source and offset of the target: every length at every offset of the source, and a target
/// offset that goes its own way.
fn shapes() -> impl Iterator<Item = (usize, usize, usize)> {
    (0..=257).flat_map(|len| (0..8).map(move |offset| (len, offset, (offset * 3 + len) % 8)))
}

/// A device that refuses everything.
#[derive(Debug)]
pub(crate) struct Elsewhere;

impl Elsewhere {
    fn refuse<T>(&self, op: &'static str) -> Result<T, KernelError> {
        let memory = Device::memory(self);
        Err(KernelError::Device { op, memory })
    }
}

impl Device for Elsewhere {
    fn memory(&self) -> Memory {
        Memory::Cuda(1)
    }
    fn share(&self) -> Arc<dyn Device> {
        Arc::new(Elsewhere)
    }
    fn allocate(&self, _: usize) -> Result<Arc<dyn Block>, KernelError> {
        self.refuse("allocate")
    }
    fn run(&self, task: Task<'_>) -> Result<(), KernelError> {
        self.refuse(task.name())
    }
    fn squares(&self, _: &[Span<'_>]) -> Result<Squares, KernelError> {
        self.refuse("add squares")
    }
    fn keep(&self, _: Box<dyn std::any::Any + Send>) {}
    fn flush(&self) -> Result<(), KernelError> {
        Ok(())
    }
    fn moment(&self) -> Result<Arc<dyn Moment>, KernelError> {
        self.refuse("moment")
    }
    fn wait_for(&self, _: &dyn Moment) -> Result<(), KernelError> {
        self.refuse("wait for")
    }
    fn settle(&self) -> Result<(), KernelError> {
        Ok(())
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// A sequence that is the same every time: splitmix64.
struct Stream(u64);

impl Stream {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Elements of one dtype: some with any bits at all, some special values, most of ordinary size.
fn floats<T: Float>(seed: u64, count: usize) -> Vec<T> {
    let special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        448.0,
        464.0,
        65520.0,
        1e-45,
    ];
    let mut stream = Stream(seed);
    (0..count)
        .map(|_| match stream.next() % 8 {
            0 => any_bits(&mut stream),
            1 => T::encode(special[stream.next() as usize % special.len()]),
            _ => T::encode(unit(&mut stream) * 2.0f64.powi((stream.next() % 12) as i32 - 6)),
        })
        .collect()
}

/// Ordinary numbers in (-1, 1).
fn unit(stream: &mut Stream) -> f64 {
    (stream.next() as i64 as f64) / 2.0f64.powi(63)
}

/// Elements with any bits, and some extremes.
fn integers<T: Integer>(seed: u64, count: usize) -> Vec<T> {
    let mut stream = Stream(seed);
    (0..count)
        .map(|_| match stream.next() % 8 {
            0 => T::wrap(i128::from(stream.next() % 5) - 2),
            1 => T::wrap(1 << (8 * size_of::<T>() - 1)),
            2 => T::wrap((1 << (8 * size_of::<T>() - 1)) - 1),
            _ => any_bits(&mut stream),
        })
        .collect()
}

fn any_bits<T: Element>(stream: &mut Stream) -> T {
    bytemuck::pod_read_unaligned(&stream.next().to_le_bytes()[..size_of::<T>()])
}

/// Equal bits, or both NaN.
fn same<T: Float>(a: T, b: T) -> bool {
    bytemuck::bytes_of(&a) == bytemuck::bytes_of(&b) || (a.decode().is_nan() && b.decode().is_nan())
}

/// Fails at the first element that differs.
#[track_caller]
fn assert_same<T: Float>(found: &[T], expected: &[T], what: impl Fn() -> String) {
    assert_eq!(found.len(), expected.len());
    for (index, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            same(*f, *e),
            "{}: element {index} is {f:?}, the oracle says {e:?}",
            what(),
            f = f.decode(),
            e = e.decode()
        );
    }
}

/// Calls `$check::<A, B>()` for all 36 pairs of float types.
macro_rules! for_float_pairs {
    ($check:ident) => {
        $crate::tests::for_float_pairs!($check; f64, f32, half::f16, half::bf16, crate::F8E4M3, crate::F8E5M2)
    };
    ($check:ident; $($a:ty),*) => {$(
        $check::<$a, f64>();
        $check::<$a, f32>();
        $check::<$a, half::f16>();
        $check::<$a, half::bf16>();
        $check::<$a, crate::F8E4M3>();
        $check::<$a, crate::F8E5M2>();
    )*};
}

/// Calls `$check::<T>()` for all of some types.
macro_rules! for_types {
    ($check:ident; floats) => {
        $crate::tests::for_types!($check; f64, f32, half::f16, half::bf16, crate::F8E4M3, crate::F8E5M2)
    };
    ($check:ident; integers) => {
        $crate::tests::for_types!($check; i8, i16, i32, i64, u8, u16, u32, u64)
    };
    ($check:ident; $($t:ty),*) => {$( $check::<$t>(); )*};
}

use {for_float_pairs, for_types};
