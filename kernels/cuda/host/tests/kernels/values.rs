//! Elements to test with: the same every time, of every kind, and for the small types all there are.

use fabric_kernels::scalar::Float;
use fabric_kernels::{Element, F8E4M3, F8E5M2};
use half::{bf16, f16};

/// A sequence that is the same every time: splitmix64.
pub struct Stream(pub u64);

impl Stream {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An ordinary number in (-1, 1).
    pub fn unit(&mut self) -> f64 {
        self.next() as i64 as f64 / 2.0f64.powi(63)
    }

    /// Any bits at all.
    pub fn bits<T: Element>(&mut self) -> T {
        bytemuck::pod_read_unaligned(&self.next().to_le_bytes()[..size_of::<T>()])
    }
}

/// Elements of one dtype: some with any bits, some special, most of ordinary size.
pub fn floats<T: Float>(seed: u64, count: usize) -> Vec<T> {
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
        -57344.0,
        f64::from(f32::MAX),
        1e-45,
        1e-40,
    ];
    let mut stream = Stream(seed);
    (0..count)
        .map(|_| match stream.next() % 8 {
            0 => stream.bits(),
            1 => T::encode(special[stream.next() as usize % special.len()]),
            _ => T::encode(stream.unit() * 2.0f64.powi((stream.next() % 12) as i32 - 6)),
        })
        .collect()
}

/// A float of which a test knows all values, or those where rounding changes its mind.
pub trait Dense: Float {
    fn dense() -> Vec<Self>;
}

impl Dense for f16 {
    fn dense() -> Vec<Self> {
        (0..=u16::MAX).map(f16::from_bits).collect()
    }
}

impl Dense for bf16 {
    fn dense() -> Vec<Self> {
        (0..=u16::MAX).map(bf16::from_bits).collect()
    }
}

impl Dense for F8E4M3 {
    fn dense() -> Vec<Self> {
        (0..=u8::MAX).map(F8E4M3).collect()
    }
}

impl Dense for F8E5M2 {
    fn dense() -> Vec<Self> {
        (0..=u8::MAX).map(F8E5M2).collect()
    }
}

impl Dense for f32 {
    /// Every sign, every exponent, every first ten bits of the fraction, and below them nothing, one, half less one, half,
    /// half and one, and all.
    fn dense() -> Vec<Self> {
        const LOWS: [u32; 6] = [0, 1, 0x0fff, 0x1000, 0x1001, 0x1fff];
        (0..1u32 << 19)
            .flat_map(|top| LOWS.map(|low| f32::from_bits(top << 13 | low)))
            .collect()
    }
}

impl Dense for f64 {
    /// Every sign, every exponent, and for every number of digits one with a tie behind them, one less, and one more.
    fn dense() -> Vec<Self> {
        let mut stream = Stream(64);
        let mut all = Vec::new();
        for top in 0..1u64 << 12 {
            for digits in 0..=52u32 {
                let kept = !0u64 << (52 - digits) & ((1 << 52) - 1);
                let tie = top << 52 | stream.next() & kept | (1u64 << 52 >> (digits + 1));
                all.extend([tie.wrapping_sub(1), tie, tie + 1].map(f64::from_bits));
            }
        }
        all
    }
}

/// Calls `$check::<A, B>()` for all 36 pairs of float types.
macro_rules! for_float_pairs {
    ($check:ident) => {
        $crate::values::for_float_pairs!($check; f64, f32, half::f16, half::bf16, fabric_kernels::F8E4M3,
            fabric_kernels::F8E5M2)
    };
    ($check:ident; $($a:ty),*) => {$(
        $check::<$a, f64>();
        $check::<$a, f32>();
        $check::<$a, half::f16>();
        $check::<$a, half::bf16>();
        $check::<$a, fabric_kernels::F8E4M3>();
        $check::<$a, fabric_kernels::F8E5M2>();
    )*};
}

/// Calls `$check::<T>()` for all six float types.
macro_rules! for_floats {
    ($check:ident) => {
        $crate::values::for_floats!($check; f64, f32, half::f16, half::bf16, fabric_kernels::F8E4M3,
            fabric_kernels::F8E5M2)
    };
    ($check:ident; $($t:ty),*) => {$( $check::<$t>(); )*};
}

pub(crate) use {for_float_pairs, for_floats};
