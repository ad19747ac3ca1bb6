//! The same bits, whatever the algorithm, the length, the wire and the position in the buffer. Method: the canonical
//! tree, written out here in the plainest way, is the oracle for every reduction on every wire.

use fabric_engine::{
    buffer::Slab,
    comm::{Call, Collectives, Communicator, Data, Op, ReduceOp, host::Options},
    kernels::{self, Dtype, Fold},
    schedule::{Algorithm, choose::Tuning},
};

use crate::ranks::tcp;

const OPS: [ReduceOp; 6] = [
    ReduceOp::Sum,
    ReduceOp::Avg,
    ReduceOp::Prod,
    ReduceOp::Min,
    ReduceOp::Max,
    ReduceOp::PreMulSum(0.5),
];

/// A rank's factor for a premultiplied sum.
fn factor(rank: usize) -> f64 {
    [0.5, 2.0, 1.0][rank % 3]
}

pub(crate) fn own(op: ReduceOp, rank: usize) -> ReduceOp {
    if let ReduceOp::PreMulSum(_) = op {
        ReduceOp::PreMulSum(factor(rank))
    } else {
        op
    }
}

/// Awkward numbers, a function of (rank, index): their sums depend on the order in which they are added.
pub(crate) fn input(dtype: Dtype, numel: usize, rank: usize) -> Slab {
    let value = |index: usize| {
        let mixed = ((index * 31 + rank * 17 + 5) * 2_654_435_761) % 1009;
        (mixed as f64 - 504.0) / 7.0
    };
    let wide = (0..numel).map(value).collect::<Vec<f64>>();
    if dtype.is_float() {
        return cast(&Slab::from_slice(&wide), dtype);
    }
    match dtype {
        Dtype::I32 => Slab::from_slice(&wide.iter().map(|value| *value as i32).collect::<Vec<_>>()),
        Dtype::U8 => Slab::from_slice(
            &wide
                .iter()
                .map(|value| value.abs() as u8)
                .collect::<Vec<_>>(),
        ),
        _ => unreachable!("the tests use f64, f32, bf16, f16, i32 and u8"),
    }
}

fn cast(from: &Slab, dtype: Dtype) -> Slab {
    let mut into = Slab::zeroed(dtype, from.numel());
    let all = 0..from.numel();
    kernels::cast(from.part(all.clone()), into.part_mut(all)).unwrap();
    into
}

/// What a reduction must give, by the law: leaves in the accumulator's type, the tree over ranks, one finish.
pub(crate) fn oracle(op: ReduceOp, inputs: &[Slab]) -> Slab {
    let (dtype, numel, world) = (inputs[0].dtype(), inputs[0].numel(), inputs.len());
    let all = 0..numel;
    let partial = op.partial(dtype);
    let lift = |rank: usize| {
        let mut leaf = Slab::zeroed(partial, numel);
        let (from, into) = (inputs[rank].part(all.clone()), leaf.part_mut(all.clone()));
        match op {
            ReduceOp::PreMulSum(_) if dtype.is_float() => {
                kernels::cast_scaled(from, into, factor(rank)).unwrap()
            }
            _ => kernels::cast(from, into).unwrap(),
        }
        leaf
    };
    let fold = match op {
        ReduceOp::Prod => Fold::Prod,
        ReduceOp::Min => Fold::Min,
        ReduceOp::Max => Fold::Max,
        _ => Fold::Sum,
    };
    let mut blocks = (0..world).map(lift).collect::<Vec<_>>();
    while blocks.len() > 1 {
        let mut pairs = blocks.into_iter();
        blocks = std::iter::from_fn(|| {
            let mut left = pairs.next()?;
            if let Some(right) = pairs.next() {
                kernels::fold(fold, left.part_mut(all.clone()), right.part(all.clone())).unwrap();
            }
            Some(left)
        })
        .collect();
    }
    let sum = blocks.pop().unwrap();
    let mut result = Slab::zeroed(dtype, numel);
    let (from, into) = (sum.part(all.clone()), result.part_mut(all));
    match op {
        ReduceOp::Avg if dtype.is_float() => {
            kernels::cast_scaled(from, into, 1.0 / world as f64).unwrap()
        }
        ReduceOp::Avg => kernels::divide(from, into, world as u64).unwrap(),
        _ => kernels::cast(from, into).unwrap(),
    }
    result
}

fn tuned(algorithm: Algorithm) -> Options {
    let text = [
        "all_reduce",
        "reduce_scatter",
        "all_gather",
        "broadcast",
        "barrier",
    ]
    .map(|kind| format!("{kind} * * * {algorithm}"))
    .into_iter()
    .filter(|row| Tuning::parse(row).is_ok())
    .collect::<Vec<_>>();
    Options {
        tuning: Tuning::parse(&text.join("\n")).unwrap(),
        ..Options::default()
    }
}

fn run(comm: &mut dyn Communicator, op: Op, data: Data) -> Slab {
    comm.submit(Call::new(op), data)
        .unwrap()
        .wait()
        .unwrap()
        .into_output()
}

/// All reductions on one communicator, in place and not, against the oracle.
fn reductions(comm: &mut dyn Communicator, dtype: Dtype, numel: usize) {
    let (world, rank) = (comm.size(), comm.rank());
    let inputs = (0..world)
        .map(|rank| input(dtype, numel * world, rank))
        .collect::<Vec<_>>();
    let mine = || input(dtype, numel * world, rank);
    for op in OPS {
        if !dtype.is_float() && matches!(op, ReduceOp::PreMulSum(_)) {
            continue;
        }
        let context = || format!("{op:?} of {} x {dtype} on {world} ranks", numel * world);
        let expected = oracle(op, &inputs);
        let own = own(op, rank);
        let result = run(comm, Op::AllReduce(own), Data::InPlace(mine()));
        assert_eq!(
            result.as_bytes(),
            expected.as_bytes(),
            "all_reduce in place, {}",
            context()
        );
        let into = comm.alloc(dtype, numel * world).unwrap();
        let result = run(comm, Op::AllReduce(own), Data::Out { from: mine(), into });
        assert_eq!(
            result.as_bytes(),
            expected.as_bytes(),
            "all_reduce, {}",
            context()
        );
        let slice = rank * numel * dtype.size()..(rank + 1) * numel * dtype.size();
        let into = comm.alloc(dtype, numel).unwrap();
        let result = run(
            comm,
            Op::ReduceScatter(own),
            Data::Out { from: mine(), into },
        );
        assert_eq!(
            result.as_bytes(),
            &expected.as_bytes()[slice.clone()],
            "reduce_scatter, {}",
            context()
        );
        let result = run(comm, Op::ReduceScatter(own), Data::InPlace(mine()));
        assert_eq!(
            &result.as_bytes()[slice.clone()],
            &expected.as_bytes()[slice],
            "in place, {}",
            context()
        );
    }
}

/// The collectives that fold nothing.
fn copies(comm: &mut dyn Communicator, dtype: Dtype, numel: usize) {
    let (world, rank) = (comm.size(), comm.rank());
    let all = (0..world)
        .flat_map(|rank| input(dtype, numel, rank).as_bytes().to_vec())
        .collect::<Vec<_>>();
    let into = comm.alloc(dtype, numel * world).unwrap();
    let gathered = run(
        comm,
        Op::AllGather,
        Data::Out {
            from: input(dtype, numel, rank),
            into,
        },
    );
    assert_eq!(
        gathered.as_bytes(),
        all,
        "all_gather of {numel} x {dtype} on {world} ranks"
    );
    let mut slab = comm.alloc(dtype, numel * world).unwrap();
    let own = rank * numel * dtype.size()..(rank + 1) * numel * dtype.size();
    slab.as_bytes_mut()[own].copy_from_slice(input(dtype, numel, rank).as_bytes());
    let gathered = run(comm, Op::AllGather, Data::InPlace(slab));
    assert_eq!(gathered.as_bytes(), all, "all_gather in place");
    for root in 0..world {
        let given = run(
            comm,
            Op::Broadcast { root },
            Data::InPlace(input(dtype, numel, rank)),
        );
        assert_eq!(
            given.as_bytes(),
            input(dtype, numel, root).as_bytes(),
            "broadcast from {root} of {world}"
        );
    }
    comm.barrier().unwrap();
}

#[test]
fn every_algorithm_gives_the_bits_of_the_tree_over_tcp() {
    for world in [1, 2, 3, 5, 8] {
        for algorithm in Algorithm::ALL {
            if algorithm.shares() {
                continue;
            }
            tcp(world, tuned(algorithm), |mut comm| {
                for dtype in [Dtype::F32, Dtype::BF16, Dtype::I32] {
                    for numel in [0, 1, 7, 33] {
                        reductions(&mut *comm, dtype, numel);
                        copies(&mut *comm, dtype, numel);
                    }
                }
            });
        }
    }
}

#[test]
fn every_dtype_and_a_large_vector_over_tcp() {
    tcp(3, Options::default(), |mut comm| {
        for dtype in [
            Dtype::F64,
            Dtype::F16,
            Dtype::F8E4M3,
            Dtype::F8E5M2,
            Dtype::U8,
        ] {
            reductions(&mut *comm, dtype, 65);
            copies(&mut *comm, dtype, 65);
        }
        reductions(&mut *comm, Dtype::F32, 300_001);
        copies(&mut *comm, Dtype::F32, 300_001);
    });
}

#[test]
fn many_operations_in_flight_complete_in_order() {
    tcp(4, Options::default(), |mut comm| {
        let flying = (0..50)
            .map(|index| {
                let slab =
                    Slab::from_slice(&vec![(comm.rank() * 100 + index) as f32; 1000 + index]);
                comm.submit(Call::new(Op::AllReduce(ReduceOp::Sum)), Data::InPlace(slab))
                    .unwrap()
            })
            .collect::<Vec<_>>();
        for (index, work) in flying.into_iter().enumerate() {
            let slab = work.wait().unwrap().into_output();
            assert_eq!(
                slab.as_slice::<f32>(),
                vec![600.0 + 4.0 * index as f32; 1000 + index]
            );
        }
    });
}

#[test]
fn a_group_splits_by_colour_and_key() {
    tcp(5, Options::default(), |mut comm| {
        let rank = comm.rank();
        let mut half = comm.split((rank % 2) as u32, (10 - rank) as u32).unwrap();
        assert_eq!(half.size(), if rank % 2 == 0 { 3 } else { 2 });
        let gathered = half.all_gather(&vec![rank as u32]).unwrap();
        let expected: &[u32] = if rank % 2 == 0 { &[4, 2, 0] } else { &[3, 1] };
        assert_eq!(gathered.as_slice::<u32>(), expected);
        comm.barrier().unwrap();
    });
}

#[test]
fn the_price_of_a_call_is_what_the_wire_counts() {
    for world in [2, 3, 4] {
        tcp(world, Options::default(), |mut comm| {
            for op in [
                Op::AllReduce(ReduceOp::Avg),
                Op::AllReduce(ReduceOp::PreMulSum(2.0)),
                Op::Barrier,
            ] {
                for numel in [0, 1, 1000, 50_000, 200_000] {
                    for dtype in [Dtype::F32, Dtype::BF16] {
                        let call = Call::new(op);
                        let (data, numel) = match op {
                            Op::Barrier => (Data::None, 0),
                            _ => (Data::InPlace(Slab::zeroed(dtype, numel)), numel),
                        };
                        let price = comm.price(&call, dtype, numel);
                        let before = comm.spent();
                        comm.submit(call, data).unwrap().wait().unwrap();
                        assert_eq!(
                            comm.spent() - before,
                            price,
                            "{op:?} of {numel} x {dtype} on {world} ranks"
                        );
                    }
                }
            }
        });
    }
}
