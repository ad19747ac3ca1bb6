//! How fast kernels are over a model's shapes, beside a copy of as many bytes by the driver, which is the limit.

use std::{error::Error, path::Path, sync::Arc};

use cudarc::driver::{CudaStream, result, sys};
use fabric_engine::buffer::Slab;
use fabric_kernels::{self as kernels, Adam, Device, Dtype, KernelError, Rule, cuda::Queue};

use crate::operands::{gpt2, on};

const REPEATS: usize = 20;

/// Milliseconds of one run: the median of many, by the device's own clock.
fn time(
    stream: &Arc<CudaStream>,
    mut run: impl FnMut() -> Result<(), KernelError>,
) -> Result<f64, Box<dyn Error>> {
    let event = || stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
    run()?; // the first loads the kernel
    let mut took = Vec::new();
    for _ in 0..REPEATS {
        let begun = event()?;
        run()?;
        let ended = event()?;
        ended.synchronize()?;
        took.push(f64::from(begun.elapsed_ms(&ended)?));
    }
    took.sort_by(f64::total_cmp);
    Ok(took[REPEATS / 2])
}

/// One row: bytes read and written, and how long that took.
struct Row {
    name: &'static str,
    torch: &'static str, // its name in torch's figures
    bytes: usize,
    ms: f64,
}

pub fn print(divide_by: usize, torch: Option<&Path>) -> Result<(), Box<dyn Error>> {
    let sizes: Vec<usize> = gpt2()
        .iter()
        .map(|numel| (numel / divide_by).max(1))
        .collect();
    let total: usize = sizes.iter().sum();
    let queue = Queue::open(0)?;
    let name = kernels::cuda::devices()?.swap_remove(0);
    println!(
        "speeds on {name}: {} tensors, {total} elements",
        sizes.len()
    );
    let rows = measure(&queue, &sizes, total)?;
    let torch: serde_json::Value = match torch {
        Some(path) => serde_json::from_slice(&std::fs::read(path)?)?,
        None => serde_json::Value::Null,
    };
    let limit = rows[0].bytes as f64 / rows[0].ms;
    println!(
        "  {:<34} {:>9} {:>8} {:>9} {:>10} {:>8}",
        "", "MB", "ms", "GB/s", "of a copy", "torch/us"
    );
    for row in &rows {
        let rate = row.bytes as f64 / row.ms;
        let ratio = torch[row.torch]
            .as_f64()
            .map(|ms| format!("{:.2}", ms / row.ms));
        println!(
            "  {:<34} {:>9.1} {:>8.4} {:>9.1} {:>9.1}% {:>8}",
            row.name,
            row.bytes as f64 / 1e6,
            row.ms,
            rate / 1e6,
            100.0 * rate / limit,
            ratio.unwrap_or_else(|| "-".into())
        );
    }
    Ok(())
}

fn measure(queue: &Arc<Queue>, sizes: &[usize], total: usize) -> Result<Vec<Row>, Box<dyn Error>> {
    let stream = queue.stream();
    let tensors = |dtype: Dtype| -> Result<Vec<Slab>, KernelError> {
        sizes.iter().map(|numel| on(queue, dtype, *numel)).collect()
    };
    let mut params = tensors(Dtype::F32)?;
    let mut grads = tensors(Dtype::F32)?;
    let mut states = [tensors(Dtype::F32)?, tensors(Dtype::F32)?];
    let mut copies = tensors(Dtype::BF16)?;
    let mut flat = on(queue, Dtype::F32, total)?;
    let mut small = on(queue, Dtype::BF16, total)?;
    let other = on(queue, Dtype::F32, total)?;
    let mut rows = Vec::new();
    let mut row = |name, torch, bytes, ms| {
        rows.push(Row {
            name,
            torch,
            bytes,
            ms,
        })
    };

    let ms = time(stream, || {
        // SAFETY: both have `4 * total` bytes, and live beyond the wait for the event.
        let copied = unsafe {
            result::memcpy_dtod_async(
                flat.address() as u64,
                other.address() as u64,
                4 * total,
                stream.cu_stream(),
            )
        };
        copied.map_err(|error| KernelError::Driver {
            memory: queue.memory(),
            doing: "copy".into(),
            what: error.to_string(),
        })
    })?;
    row("copy by the driver, f32", "", 8 * total, ms);
    let ms = time(stream, || pack(&grads, &mut flat, 1.0))?;
    row("pack f32", "pack_f32", 8 * total, ms);
    let ms = time(stream, || pack(&grads, &mut flat, 0.5))?;
    row("pack f32, scaled", "pack_f32_scaled", 8 * total, ms);
    let ms = time(stream, || pack(&grads, &mut small, 0.5))?;
    row(
        "pack f32 to bf16, scaled",
        "pack_bf16_scaled",
        6 * total,
        ms,
    );
    let ms = time(stream, || unpack(&small, &mut grads, 1.0))?;
    row("unpack bf16 to f32", "unpack_bf16", 6 * total, ms);
    let ms = time(stream, || unpack(&flat, &mut grads, 2.0))?;
    row("unpack f32, scaled", "unpack_f32_scaled", 8 * total, ms);
    let ms = time(stream, || {
        kernels::fold(
            kernels::Fold::Sum,
            flat.part_mut(0..total),
            other.part(0..total),
        )
    })?;
    row("fold f32 (add)", "", 12 * total, ms);
    let ms = time(stream, || {
        let spans: Vec<_> = grads
            .iter()
            .map(|grad| grad.part(0..grad.numel()))
            .collect();
        kernels::SquareBins::new().add_all(&spans)
    })?;
    row("squares and finite, with the wait", "norm", 4 * total, ms);
    let rule = Rule::AdamW(Adam {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
    });
    let ms = time(stream, || {
        kernels::batch(|| {
            let [mean, square] = &mut states;
            for index in 0..sizes.len() {
                let all = 0..sizes[index];
                let spans = &mut [
                    mean[index].part_mut(all.clone()),
                    square[index].part_mut(all.clone()),
                ];
                let grad = grads[index].part(all.clone());
                kernels::update(
                    &rule,
                    5,
                    0.5,
                    params[index].part_mut(all),
                    grad,
                    spans,
                    None,
                )?;
            }
            Ok::<_, KernelError>(())
        })
    })?;
    row("adamw f32", "adamw", 28 * total, ms);
    let ms = time(stream, || {
        kernels::batch(|| {
            let [mean, square] = &mut states;
            for index in 0..sizes.len() {
                let all = 0..sizes[index];
                let spans = &mut [
                    mean[index].part_mut(all.clone()),
                    square[index].part_mut(all.clone()),
                ];
                let copy = Some(copies[index].part_mut(all.clone()));
                let grad = grads[index].part(all.clone());
                kernels::update(
                    &rule,
                    5,
                    0.5,
                    params[index].part_mut(all),
                    grad,
                    spans,
                    copy,
                )?;
            }
            Ok::<_, KernelError>(())
        })
    })?;
    row("adamw f32, and the bf16 copy", "", 30 * total, ms);
    Ok(rows)
}

/// All tensors into one buffer, in one launch.
fn pack(tensors: &[Slab], into: &mut Slab, factor: f64) -> Result<(), KernelError> {
    kernels::batch(|| {
        let mut start = 0;
        for tensor in tensors {
            let numel = tensor.numel();
            kernels::cast_scaled(
                tensor.part(0..numel),
                into.part_mut(start..start + numel),
                factor,
            )?;
            start += numel;
        }
        Ok(())
    })
}

/// One buffer into all tensors, in one launch.
fn unpack(from: &Slab, tensors: &mut [Slab], factor: f64) -> Result<(), KernelError> {
    kernels::batch(|| {
        let mut start = 0;
        for tensor in tensors {
            let numel = tensor.numel();
            kernels::cast_scaled(
                from.part(start..start + numel),
                tensor.part_mut(0..numel),
                factor,
            )?;
            start += numel;
        }
        Ok(())
    })
}
