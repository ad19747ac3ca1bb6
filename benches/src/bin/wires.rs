//! How long an all_reduce takes on each wire, beside the limit: as many plain copies of the same bytes, made at once.
//!
//! `cargo run --release -p fabric-benches --bin wires -- [ranks] [wire,wire,...]`. Sizes, bandwidths and the factor 2(n-1)/n are those of
//! nccl-tests; times are medians, and the shortest, of isolated in-place calls on f32.

use std::{sync::Arc, time::Duration};

use fabric_engine::{
    Error, Result,
    buffer::Slab,
    clock::Clock,
    comm::{
        Call, Collectives, Communicator, Data, Op, ReduceOp,
        host::{Host, Options, Security},
    },
    kernels::Dtype,
    rendezvous::Member,
};

const SIZES: [(usize, usize); 9] = [
    (1 << 10, 1000),
    (1 << 14, 1000),
    (1 << 16, 600),
    (1 << 18, 300),
    (1 << 20, 150),
    (1 << 22, 60),
    (1 << 24, 30),
    (1 << 26, 9),
    (1 << 28, 5),
];
const WIRES: &str = "shm,unix,tcp,tcp-authenticated,tcp-encrypted";

fn main() -> fabric::Result<()> {
    let world = std::env::args()
        .nth(1)
        .map_or(Ok(2), |text| text.parse::<usize>())?;
    let wires = std::env::args().nth(2).unwrap_or_else(|| WIRES.into());
    println!("# all_reduce, float, sum, in place, {world} ranks as threads");
    println!("#       size               wire      time  shortest     algbw     busbw   x limit");
    println!("#        (B)                         (us)      (us)    (GB/s)    (GB/s)          ");
    for (bytes, times) in SIZES {
        let (limit, _) = fabric_benches::ranks(world, |member| copies(member, bytes, times))?;
        for wire in wires.split(',') {
            let (time, least) =
                fabric_benches::ranks(world, |member| reductions(member, wire, bytes, times))?;
            let algbw = bytes as f64 / time.as_secs_f64() / 1e9;
            let busbw = algbw * 2.0 * (world as f64 - 1.0) / world as f64;
            let (micros, least, ratio) = (
                time.as_secs_f64() * 1e6,
                least.as_secs_f64() * 1e6,
                time.as_secs_f64() / limit.as_secs_f64(),
            );
            println!(
                "{bytes:>12}  {wire:>17}  {micros:>8.1}  {least:>8.1}  {algbw:>8.2}  {busbw:>8.2}  {ratio:>8.2}"
            );
        }
    }
    println!("# limit: every rank copies so many bytes at the same time");
    Ok(())
}

fn connect(member: &Arc<Member>, wire: &str) -> Result<Host> {
    let (wire, security) = wire.split_once('-').unwrap_or((wire, "plain"));
    let options = Options {
        security: Security::from_name(security),
        ..Options::default()
    };
    let made = match wire {
        "tcp" => Ok(Host::tcp(member, options)?),
        "unix" => Host::unix(member, options)?,
        _ => Host::shm(member, options)?,
    };
    made.map_err(|why| {
        Error::argument(
            format!("no {wire} between these ranks: {why}"),
            "Choose another wire",
        )
    })
}

fn reductions(
    member: &Arc<Member>,
    wire: &str,
    bytes: usize,
    times: usize,
) -> Result<(Duration, Duration)> {
    let mut host = connect(member, wire)?;
    let mut slab = host.alloc(Dtype::F32, bytes / 4)?;
    slab.as_mut_slice::<f32>().fill(1e-30);
    let mut held = Some(slab);
    median(&mut host, times, |host| {
        let call = Call::new(Op::AllReduce(ReduceOp::Sum)).blocking();
        let slab = held.take().expect("the slab came back");
        held = Some(
            host.submit(call, Data::InPlace(slab))?
                .wait()?
                .into_output(),
        );
        Ok(())
    })
}

fn copies(member: &Arc<Member>, bytes: usize, times: usize) -> Result<(Duration, Duration)> {
    let mut host = connect(member, "shm")?;
    let (from, mut into) = (
        Slab::zeroed(Dtype::U8, bytes),
        Slab::zeroed(Dtype::U8, bytes),
    );
    into.as_bytes_mut().fill(1);
    median(&mut host, times, |_| {
        into.as_bytes_mut()
            .copy_from_slice(std::hint::black_box(from.as_bytes()));
        Ok(())
    })
}

/// The median and the shortest time of `times` calls, all ranks beginning each together.
fn median(
    host: &mut Host,
    times: usize,
    mut call: impl FnMut(&mut Host) -> Result<()>,
) -> Result<(Duration, Duration)> {
    let clock = Clock::machine();
    let mut laps = Vec::with_capacity(times);
    for _ in 0..times {
        host.barrier()?;
        let start = clock.now();
        call(host)?;
        laps.push(clock.now() - start);
    }
    laps.sort_unstable();
    Ok((laps[times / 2], laps[0]))
}
