//! How fast ranks work together, and how fast this machine copies memory, which is the most that any wire within it can be
//! compared with.

use std::hint::black_box;

use fabric::{
    Fabric, ReduceOp, Result,
    engine::{
        buffer::Slab,
        clock::Clock,
        comm::{Call, Data, Op},
        kernels::Dtype,
    },
};

use super::findings::Speed;

const LARGE_BYTES: usize = 64 << 20;
const QUICK_BYTES: usize = 1 << 20;
const MOST_TIMES: usize = 5000;

/// Latencies, and a bandwidth: the same numbers on all ranks.
pub(super) fn measure(fabric: &Fabric, quick: bool) -> Result<Vec<Speed>> {
    let mut small = vec![0f32; 2];
    let small_s = timed(fabric, quick, &mut || {
        fabric.all_reduce(&mut small, ReduceOp::Sum)
    })?;
    let barrier_s = timed(fabric, quick, &mut || fabric.barrier())?;
    let bytes = if quick { QUICK_BYTES } else { LARGE_BYTES };
    let mut slab = Some(fabric.alloc(Dtype::F32, bytes / Dtype::F32.size())?);
    let large_s = timed(fabric, quick, &mut || {
        let data: Slab = slab.take().expect("the last one has put it back");
        let call = Call::new(Op::AllReduce(ReduceOp::Sum)).blocking();
        slab = Some(
            fabric
                .submit(call, Data::InPlace(data))?
                .wait()?
                .into_output(),
        );
        Ok(())
    })?;
    let latency = |operation: &str, bytes, seconds| Speed {
        wire: "",
        operation: operation.into(),
        bytes,
        seconds,
        bytes_per_s: None,
        bus_bytes_per_s: None,
    };
    let rate = bytes as f64 / large_s;
    let world = fabric.world_size() as f64;
    Ok(vec![
        latency("all_reduce", 8, small_s),
        latency("barrier", 0, barrier_s),
        Speed {
            bytes_per_s: Some(rate),
            bus_bytes_per_s: Some(rate * 2.0 * (world - 1.0) / world),
            ..latency("all_reduce", bytes as u64, large_s)
        },
    ])
}

/// The median, in seconds, on the slowest rank.
fn timed(fabric: &Fabric, quick: bool, once: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    let clock = Clock::machine();
    let budget_s = if quick { 0.02 } else { 0.4 };
    let mut time = || {
        let begun = clock.now();
        once()?;
        Ok::<_, fabric::Error>((clock.now() - begun).as_secs_f64())
    };
    time()?; // the first of a size sets things up
    let (begun, mut took) = (clock.now(), Vec::new());
    // All ranks must do it as often: after 1, 2, 4, ... times rank 0 says whether there is time for as many again.
    loop {
        let batch = took.len().max(1);
        took.extend((0..batch).map(|_| time()).collect::<Result<Vec<_>>>()?);
        let spent_s = (clock.now() - begun).as_secs_f64();
        let goes_on = spent_s < budget_s / 2.0 && took.len() < MOST_TIMES;
        if !fabric.broadcast(goes_on, 0)? {
            break;
        }
    }
    took.sort_by(f64::total_cmp);
    fabric.all_reduce_value(took[took.len() / 2], ReduceOp::Max)
}

/// How fast one core copies memory: the best of several times.
pub(super) fn copy_bytes_per_s(quick: bool) -> f64 {
    let bytes = if quick { QUICK_BYTES } else { LARGE_BYTES };
    let (from, mut into) = (vec![1u8; bytes], vec![0u8; bytes]);
    let clock = Clock::machine();
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let begun = clock.now();
        into.copy_from_slice(black_box(&from));
        black_box(&mut into);
        best = best.min((clock.now() - begun).as_secs_f64());
    }
    bytes as f64 / best
}
