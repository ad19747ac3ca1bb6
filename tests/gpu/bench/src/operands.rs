//! Memory for checks and measurements: values that are hard on kernels, and slabs on a device.

use std::sync::Arc;

use fabric_engine::buffer::Slab;
use fabric_kernels::{self as kernels, Device, Dtype, KernelError, Span, SpanMut, cuda::Queue};

/// The parameters of GPT-2 small (124M): 148 tensors.
pub fn gpt2() -> Vec<usize> {
    const WIDTH: usize = 768;
    let layer = [
        WIDTH,
        WIDTH,
        WIDTH * 3 * WIDTH,
        3 * WIDTH,
        WIDTH * WIDTH,
        WIDTH,
        WIDTH,
        WIDTH,
        WIDTH * 4 * WIDTH,
        4 * WIDTH,
        4 * WIDTH * WIDTH,
        WIDTH,
    ];
    let mut sizes = vec![50257 * WIDTH, 1024 * WIDTH];
    (0..12).for_each(|_| sizes.extend(layer));
    sizes.extend([WIDTH, WIDTH]);
    sizes
}

/// f32 values of all kinds: most of ordinary size, some subnormal, huge, infinite or NaN.
pub fn wild(numel: usize, salt: u64) -> Vec<f32> {
    let value = |index: usize| {
        // splitmix64
        let mut z = (index as u64 + salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let bits = (z ^ (z >> 31)) as u32;
        match index % 8 {
            0 => f32::from_bits(bits),
            1 => f32::from_bits(bits & 0x807f_ffff), // subnormal
            _ => (bits as i32) as f32 / 2f32.powi(28),
        }
    };
    (0..numel).map(value).collect()
}

pub fn on(queue: &Arc<Queue>, dtype: Dtype, numel: usize) -> Result<Slab, KernelError> {
    let device: Arc<dyn Device> = queue.clone();
    Slab::zeroed_on(Some(&device), dtype, numel)
}

/// A copy on the host.
pub fn down(slab: &Slab) -> Result<Slab, KernelError> {
    let mut here = Slab::zeroed(slab.dtype(), slab.numel());
    kernels::cast(slab.part(0..slab.numel()), here.part_mut(0..slab.numel()))?;
    Ok(here)
}

/// A copy on the device.
pub fn up(queue: &Arc<Queue>, slab: &Slab) -> Result<Slab, KernelError> {
    let mut there = on(queue, slab.dtype(), slab.numel())?;
    kernels::cast(slab.part(0..slab.numel()), there.part_mut(0..slab.numel()))?;
    Ok(there)
}

/// Values in another type, on the host.
pub fn typed(values: &[f32], dtype: Dtype) -> Result<Slab, KernelError> {
    let mut slab = Slab::zeroed(dtype, values.len());
    kernels::cast(Span::of(values), slab.part_mut(0..values.len()))?;
    Ok(slab)
}

/// Where two slabs of a float type differ; any NaN is like any other.
pub fn difference(ours: &Slab, theirs: &Slab) -> Result<Option<String>, KernelError> {
    let wide = |slab: &Slab| -> Result<Vec<f64>, KernelError> {
        let mut values = vec![0f64; slab.numel()];
        kernels::cast(slab.part(0..slab.numel()), SpanMut::of(&mut values))?;
        Ok(values)
    };
    let (x, y) = (wide(ours)?, wide(theirs)?);
    let same = |(x, y): (&f64, &f64)| x.to_bits() == y.to_bits() || (x.is_nan() && y.is_nan());
    let at = x.iter().zip(&y).position(|pair| !same(pair));
    Ok(at.map(|at| format!("element {at} is {:?}, and {:?} on the host", x[at], y[at])))
}
