//! Gradients averaged by the sequencer itself, over wires that the test chooses. Method: a handful of awkward vectors as
//! a model; the canonical tree in plain f32 is the oracle for values, the plan for costs, the trace for order.

use std::{sync::Barrier, time::Duration};

use fabric_engine::{
    buffer::Slab,
    comm::{
        Collectives, Communicator, Label,
        host::{Host, Options as HostOptions},
        trace::{Event, Trace},
    },
    kernels::{Dtype, Span, SpanMut, cast},
    shard::{
        ParamId, ParamMeta, SharedComm,
        groups::Groups,
        placement::DDP,
        plan::{Options, Plan},
        sequencer::Sequencer,
    },
};

use crate::ranks::join;

const SIZES: [usize; 8] = [7, 1, 300, 33, 0, 64, 1000, 5];
const BUCKET_BYTES: [usize; 4] = [1, 100, 4096, 25 << 20];
const PATIENCE: Duration = Duration::from_secs(30);
const WIRES: [Wire; 2] = [Wire::Tcp, Wire::Shm];

#[derive(Clone, Copy, Debug)]
enum Wire {
    Tcp,
    Shm,
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Forward,
    Reverse,
    Random { seed: usize },
}

impl Order {
    /// The parameters, in the order in which their gradients become ready.
    fn of(self, count: usize) -> Vec<usize> {
        let mut order = (0..count).collect::<Vec<_>>();
        match self {
            Self::Forward => {}
            Self::Reverse => order.reverse(),
            Self::Random { seed } => order.sort_by_key(|param| {
                let mixed = (param + 1 + seed * 100) * 2_654_435_761 % (1 << 32);
                (mixed ^ (mixed >> 15)) * 40_503 % 65_537
            }),
        }
        order
    }
}

/// Run `body` on `world` threads with a communicator each, over `wire`.
fn ranks<T: Send>(world: usize, wire: Wire, body: impl Fn(SharedComm) -> T + Sync) -> Vec<T> {
    join(world, |member| {
        let options = HostOptions::default();
        let host = match wire {
            Wire::Tcp => Host::tcp(&member, options).unwrap(),
            Wire::Shm => Host::shm(&member, options)
                .unwrap()
                .expect("memory to share"),
        };
        host.trace().start();
        body(SharedComm::new(Box::new(host)))
    })
}

fn plan(world: usize, bucket_bytes: usize) -> Plan {
    let meta = |(index, numel): (usize, &usize)| {
        ParamMeta::new(format!("p{index}"), &[*numel], Dtype::F32)
    };
    let params = SIZES.iter().enumerate().map(meta).collect();
    let options = Options {
        bucket_bytes,
        first_bucket_bytes: bucket_bytes,
        ..Options::default()
    };
    Plan::new(DDP, world, params, &options).unwrap()
}

/// A gradient whose sums depend on the order in which they are added.
fn gradient(rank: usize, batch: usize, param: usize) -> Vec<f32> {
    let value = |index: usize| {
        let mixed = (index * 31 + rank * 17 + batch * 101 + param * 7 + 5) * 2_654_435_761 % 1009;
        (mixed as f32 - 504.0) / 7.0
    };
    (0..SIZES[param]).map(value).collect()
}

fn add(left: &[f32], right: &[f32]) -> Vec<f32> {
    left.iter().zip(right).map(|(a, b)| a + b).collect()
}

/// The law: neighbours are added, then neighbours of those; one multiplication at the end.
fn tree_mean(mut leaves: Vec<Vec<f32>>) -> Vec<f32> {
    let factor = (1.0 / leaves.len() as f64) as f32;
    while leaves.len() > 1 {
        let pairs = leaves.chunks(2);
        leaves = pairs
            .map(|pair| match pair {
                [left, right] => add(left, right),
                rest => rest[0].clone(),
            })
            .collect();
    }
    leaves[0].iter().map(|sum| sum * factor).collect()
}

/// What `world` ranks must get for `param` when each has added up `batches` micro-batches, in order.
fn oracle(world: usize, batches: usize, param: usize) -> Vec<f32> {
    let leaf = |rank: usize| {
        let first = gradient(rank, 0, param);
        (1..batches).fold(first, |sum, batch| add(&sum, &gradient(rank, batch, param)))
    };
    tree_mean((0..world).map(leaf).collect())
}

/// One backward of micro-batch `batch`.
fn backward(sequencer: &mut Sequencer, rank: usize, batch: usize, sync: bool, order: Order) {
    sequencer.begin(sync).unwrap();
    for param in order.of(SIZES.len()) {
        let grad = gradient(rank, batch, param);
        sequencer.ready(ParamId(param), &grad).unwrap();
    }
    sequencer.finish().unwrap();
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn assert_gradients(sequencer: &Sequencer, world: usize, batches: usize, context: &str) {
    for (param, numel) in SIZES.into_iter().enumerate() {
        let mut found = vec![0f32; numel];
        let grad = sequencer.grad(ParamId(param)).expect("a gradient");
        cast(grad, SpanMut::of(&mut found)).unwrap();
        let expected = oracle(world, batches, param);
        assert_eq!(bits(&found), bits(&expected), "p{param}, {context}");
    }
}

/// The labels of submitted buckets and the gradients that became ready, in the order of events.
fn story(trace: &Trace) -> Vec<Beat> {
    let beat = |event| match event {
        Event::Ready { param } => Some(Beat::Ready(param)),
        Event::Submitted {
            label: Label::Bucket(index),
            ..
        } => Some(Beat::Launched(index)),
        _ => None,
    };
    let records = trace.records().into_iter();
    records.filter_map(|record| beat(record.event)).collect()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Beat {
    Ready(usize),
    Launched(u32),
}

#[test]
fn the_mean_has_the_bits_of_the_tree_whatever_the_buckets_the_wire_and_the_order() {
    for (world, wire) in [2, 3, 4]
        .into_iter()
        .flat_map(|world| WIRES.map(|wire| (world, wire)))
    {
        ranks(world, wire, |comm| {
            let rank = comm.rank();
            for bucket_bytes in BUCKET_BYTES {
                // The ranks need not agree on the order in which gradients become ready.
                for order in [Order::Forward, Order::Reverse, Order::Random { seed: rank }] {
                    let plan = plan(world, bucket_bytes);
                    let mut sequencer = Sequencer::new(plan, comm.clone()).unwrap();
                    backward(&mut sequencer, rank, 0, true, order);
                    let context = format!("{world} ranks, {wire:?}, {bucket_bytes} B, {order:?}");
                    assert_gradients(&sequencer, world, 1, &context);
                }
            }
        });
    }
}

#[test]
fn a_synchronised_backward_costs_what_the_plan_predicts() {
    for (world, wire) in [2, 3, 4]
        .into_iter()
        .flat_map(|world| WIRES.map(|wire| (world, wire)))
    {
        ranks(world, wire, |comm| {
            let rank = comm.rank();
            for bucket_bytes in BUCKET_BYTES {
                let plan = plan(world, bucket_bytes);
                let buckets = plan.buckets().len() as u64;
                let predicted = plan.forecast(&Groups::flat(comm.clone())).last_backward;
                let mut sequencer = Sequencer::new(plan, comm.clone()).unwrap();
                for _ in 0..2 {
                    let before = comm.lock().spent();
                    backward(&mut sequencer, rank, 0, true, Order::Reverse);
                    let spent = comm.lock().spent() - before;
                    assert_eq!(
                        spent, predicted,
                        "{world} ranks, {wire:?}, {bucket_bytes} B"
                    );
                    assert_eq!(spent.collectives, buckets + 1); // and the control word
                    assert!(spent.bytes > 0);
                }
            }
        });
    }
}

#[test]
fn the_first_bucket_leaves_before_the_last_gradient_is_ready() {
    ranks(2, Wire::Tcp, |comm| {
        let (rank, world) = (comm.rank(), comm.size());
        let trace = comm.trace();
        for (bucket_bytes, overlaps) in [(100, true), (25 << 20, false)] {
            let plan = plan(world, bucket_bytes);
            let mut sequencer = Sequencer::new(plan, comm.clone()).unwrap();
            trace.clear();
            backward(&mut sequencer, rank, 0, true, Order::Reverse);
            let story = story(&trace);
            let launched = |beat: &Beat| matches!(beat, Beat::Launched(_));
            let first = story.iter().position(launched).unwrap();
            let last = story.iter().rposition(|beat| !launched(beat)).unwrap();
            assert_eq!(first < last, overlaps, "{bucket_bytes} B: {story:?}");
        }
    });
}

#[test]
fn buckets_leave_in_the_order_of_the_plan_when_gradients_do_not() {
    ranks(3, Wire::Tcp, |comm| {
        let (rank, world) = (comm.rank(), comm.size());
        let trace = comm.trace();
        for order in [
            Order::Forward,
            Order::Random { seed: 1 },
            Order::Random { seed: rank },
        ] {
            let plan = plan(world, 100);
            let buckets = plan.buckets().len() as u32;
            let mut sequencer = Sequencer::new(plan, comm.clone()).unwrap();
            trace.clear();
            backward(&mut sequencer, rank, 0, true, order);
            let story = story(&trace);
            let beats =
                |want: fn(&Beat) -> Option<u32>| story.iter().filter_map(want).collect::<Vec<_>>();
            let launched = beats(|beat| match beat {
                Beat::Launched(index) => Some(*index),
                Beat::Ready(_) => None,
            });
            let ready = beats(|beat| match beat {
                Beat::Ready(param) => Some(*param as u32),
                Beat::Launched(_) => None,
            });
            assert!(
                buckets > 2 && launched.iter().copied().eq(0..buckets),
                "{launched:?}"
            );
            assert!(
                !ready.is_sorted_by(|a, b| a > b),
                "the plan's own order tests nothing"
            );
        }
    });
}

#[test]
fn micro_batches_add_up_in_order_and_are_averaged_once() {
    const BATCHES: usize = 3;
    for wire in WIRES {
        ranks(3, wire, |comm| {
            let (rank, world) = (comm.rank(), comm.size());
            for bucket_bytes in [100, 25 << 20] {
                let plan = plan(world, bucket_bytes);
                let predicted = plan.forecast(&Groups::flat(comm.clone())).last_backward;
                let mut sequencer = Sequencer::new(plan, comm.clone()).unwrap();
                let before = comm.lock().spent();
                for batch in 0..BATCHES - 1 {
                    backward(&mut sequencer, rank, batch, false, Order::Forward);
                    assert_eq!(comm.lock().spent(), before, "no collective inside");
                }
                backward(&mut sequencer, rank, BATCHES - 1, true, Order::Reverse);
                assert_eq!(comm.lock().spent() - before, predicted);
                assert_gradients(&sequencer, world, BATCHES, "three micro-batches");
            }
        });
    }
}

#[test]
fn gradients_keep_their_memory_from_step_to_step() {
    for wire in WIRES {
        ranks(2, wire, |comm| {
            let (rank, world) = (comm.rank(), comm.size());
            let mut sequencer = Sequencer::new(plan(world, 100), comm.clone()).unwrap();
            let mut places = Vec::new();
            for _ in 0..3 {
                sequencer.zero_grad();
                backward(&mut sequencer, rank, 0, true, Order::Reverse);
                let address = |param| sequencer.grad(ParamId(param)).unwrap().as_ptr() as usize;
                places.push((0..SIZES.len()).map(address).collect::<Vec<_>>());
            }
            assert_eq!(places[0], places[1]);
            assert_eq!(places[1], places[2]);
        });
    }
}

#[test]
fn small_and_wide_gradients_are_added_in_the_reduce_dtype() {
    // Goal: the second micro-batch, which is folded rather than copied, casts as the first does.
    ranks(2, Wire::Tcp, |comm| {
        let (rank, world) = (comm.rank(), comm.size());
        for reduce_dtype in [None, Some(Dtype::F32), Some(Dtype::F64), Some(Dtype::BF16)] {
            let params = [("half", Dtype::BF16), ("double", Dtype::F64)]
                .map(|(name, dtype)| ParamMeta::new(name, &[2], dtype));
            let options = Options {
                reduce_dtype,
                ..Options::default()
            };
            let plan = Plan::new(DDP, world, params.to_vec(), &options).unwrap();
            let mut sequencer = Sequencer::new(plan, comm.clone()).unwrap();
            for sync in [false, true] {
                sequencer.begin(sync).unwrap();
                let wide = vec![1.0 + rank as f64, -2.0];
                sequencer.ready(ParamId(1), &wide).unwrap();
                let small = slab(Dtype::BF16, &wide);
                sequencer.ready(ParamId(0), &small).unwrap();
                sequencer.finish().unwrap();
            }
            for param in [0, 1] {
                let grad = sequencer.grad(ParamId(param)).unwrap();
                let own = [Dtype::F32, Dtype::F64][param];
                assert_eq!(grad.dtype(), reduce_dtype.unwrap_or(own));
                let mut found = vec![0f64; 2];
                cast(grad, SpanMut::of(&mut found)).unwrap();
                assert_eq!(found, [3.0, -4.0], "p{param} in {reduce_dtype:?}");
            }
        }
    });
}

fn slab(dtype: Dtype, values: &[f64]) -> Slab {
    let mut slab = Slab::zeroed(dtype, values.len());
    cast(Span::of(values), slab.part_mut(0..values.len())).unwrap();
    slab
}

#[test]
fn a_rank_that_waits_can_be_aborted_from_another_thread() {
    // Rank 1 never comes to the barrier, in which rank 0 holds the communicator.
    let connected = Barrier::new(2);
    let said = ranks(2, Wire::Tcp, |comm| {
        connected.wait();
        if comm.rank() == 1 {
            return comm
                .aborter()
                .signal()
                .wait(PATIENCE)
                .map(|error| error.to_string());
        }
        let waits = std::thread::spawn({
            let comm = comm.clone();
            move || comm.lock().barrier().unwrap_err().to_string()
        });
        while comm.trace().records().is_empty() {
            std::thread::yield_now();
        }
        comm.aborter().abort("the user has had enough");
        Some(waits.join().unwrap())
    });
    for text in said {
        let text = text.expect("an end");
        assert!(text.contains("the user has had enough"), "{text}");
    }
}
