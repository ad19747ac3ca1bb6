//! Goal: one result, bit for bit, whatever carries a collective. Method: random cases (world, operation, dtype, length,
//! slices, algorithm, memory) run over TCP and in shared memory, against the canonical tree written out in the plainest way;
//! and sums of small floats against arithmetic on f32 that uses none of our kernels.

use std::sync::Arc;

use fabric_engine::{
    buffer::Slab,
    comm::{
        Call, Communicator, Data, Op, ReduceOp,
        host::{Host, Options},
    },
    kernels::Dtype,
    schedule::{Algorithm, choose::Tuning},
};
use half::{bf16, f16};
use proptest::prelude::*;

use crate::{
    parity::{input, oracle, own},
    ranks::join,
};

/// One collective, as all ranks see it.
#[derive(Clone, Debug)]
struct Case {
    world: usize,
    op: ReduceOp,
    dtype: Dtype,
    counts: Vec<usize>, // of each rank's slice
    root: usize,
    algorithm: Algorithm,
    private: u32, // ranks whose memory peers cannot reach, by bit
    in_place: bool,
}

fn cases() -> impl Strategy<Value = Case> {
    let op = prop::sample::select(vec![
        ReduceOp::Sum,
        ReduceOp::Avg,
        ReduceOp::Prod,
        ReduceOp::Min,
        ReduceOp::Max,
        ReduceOp::PreMulSum(0.5),
    ]);
    let dtype = prop::sample::select(vec![
        Dtype::F64,
        Dtype::F32,
        Dtype::BF16,
        Dtype::F16,
        Dtype::F8E4M3,
        Dtype::F8E5M2,
    ]);
    let longest = prop::sample::select(vec![0usize, 3, 40, 1100, 9000, 70_000]);
    let algorithm = prop::sample::select(Algorithm::ALL.to_vec());
    let shape = (1usize..=5, longest).prop_flat_map(|(world, longest)| {
        let counts = prop::collection::vec(0..=longest, world);
        (Just(world), counts, 0..world)
    });
    let memory = (any::<u32>(), any::<bool>());
    (shape, op, dtype, algorithm, memory).prop_map(
        |((world, counts, root), op, dtype, algorithm, (private, in_place))| Case {
            world,
            op,
            dtype,
            counts,
            root,
            algorithm,
            private,
            in_place,
        },
    )
}

/// Every row that this algorithm can have.
fn tuning(algorithm: Algorithm) -> Tuning {
    let kinds = [
        "all_reduce",
        "reduce_scatter",
        "all_gather",
        "broadcast",
        "reduce",
    ];
    let row = |kind: &str| match algorithm.shares() {
        true => format!("{kind} shm * * {algorithm}"),
        false => format!("{kind} * * * {algorithm}"),
    };
    let rows = kinds.map(row).into_iter();
    let rows = rows.filter(|row| Tuning::parse(row).is_ok());
    Tuning::parse(&rows.collect::<Vec<_>>().join("\n")).unwrap()
}

/// Run the case's reductions and copies on one communicator, against what they must give.
fn check(case: &Case, host: &mut Host) {
    let (rank, numel) = (host.rank(), case.counts.iter().sum::<usize>());
    let inputs = (0..case.world).map(|rank| input(case.dtype, numel, rank));
    let inputs = inputs.collect::<Vec<_>>();
    let expected = oracle(case.op, &inputs);
    let size = case.dtype.size();
    let before = case.counts[..rank].iter().sum::<usize>();
    let slice = before * size..(before + case.counts[rank]) * size;
    let slab = |bytes: &[u8]| {
        let numel = bytes.len() / size;
        let mut slab = if case.private >> rank & 1 == 1 {
            Slab::zeroed(case.dtype, numel)
        } else {
            host.alloc(case.dtype, numel).unwrap()
        };
        slab.as_bytes_mut().copy_from_slice(bytes);
        slab
    };
    let mine = inputs[rank].as_bytes();
    let (op, root) = (own(case.op, rank), case.root);
    let counts: Arc<[usize]> = case.counts.clone().into();
    let reduce_scatter = Call::new(Op::ReduceScatter(op)).counts(counts.clone());
    let all_gather = Call::new(Op::AllGather).counts(counts);
    let whole = expected.as_bytes();
    let is_root = rank == root;
    let mut jobs = Vec::new();
    if case.in_place {
        let reduce = Call::new(Op::Reduce { op, root });
        let mut gathered = vec![0; mine.len()];
        gathered[slice.clone()].copy_from_slice(&whole[slice.clone()]);
        jobs.push((
            Call::new(Op::AllReduce(op)),
            Data::InPlace(slab(mine)),
            whole,
            0..mine.len(),
        ));
        jobs.push((reduce_scatter, Data::InPlace(slab(mine)), whole, slice));
        jobs.push((
            all_gather,
            Data::InPlace(slab(&gathered)),
            whole,
            0..mine.len(),
        ));
        let result = if is_root { whole } else { mine };
        jobs.push((reduce, Data::InPlace(slab(mine)), result, 0..mine.len()));
    } else {
        let out = |from: &[u8], into: usize| Data::Out {
            from: slab(from),
            into: slab(&vec![0; into]),
        };
        let own = &whole[slice.clone()];
        jobs.push((
            Call::new(Op::AllReduce(op)),
            out(mine, mine.len()),
            whole,
            0..mine.len(),
        ));
        jobs.push((reduce_scatter, out(mine, own.len()), own, 0..own.len()));
        jobs.push((all_gather, out(own, mine.len()), whole, 0..mine.len()));
        let broadcast = Call::new(Op::Broadcast { root });
        let sent = inputs[root].as_bytes();
        jobs.push((broadcast, out(mine, mine.len()), sent, 0..mine.len()));
    }
    for (call, data, expected, part) in jobs {
        let name = call.op;
        let output = host
            .submit(call, data)
            .unwrap()
            .wait()
            .unwrap()
            .into_output();
        let expected = if expected.len() == part.len() {
            expected
        } else {
            &expected[part.clone()]
        };
        let same = output.as_bytes()[part] == *expected;
        assert!(same, "{name:?} on {}, {case:?}", host.wire());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, ..ProptestConfig::default() })]
    #[test]
    fn every_way_gives_the_bits_of_the_tree(case in cases()) {
        let options = Options { tuning: tuning(case.algorithm), ..Options::default() };
        join(case.world, |member| {
            check(&case, &mut Host::tcp(&member, options.clone()).unwrap());
            let shm = Host::shm(&member, options.clone()).unwrap();
            check(&case, &mut shm.expect("one machine"));
        });
    }
}

/// ((0+1)+(2+3))+4 in f32.
fn tree(leaves: &[f32]) -> f32 {
    match leaves.len() {
        1 => leaves[0],
        len => {
            let half = len.next_power_of_two() / 2;
            tree(&leaves[..half]) + tree(&leaves[half..])
        }
    }
}

#[test]
fn small_floats_are_summed_in_f32_and_rounded_once() {
    const NUMEL: usize = 10_007;
    let leaf = |rank: usize, index: usize| {
        let mixed = (index * 7919 + rank * 104_729) % 30_011;
        (mixed as f32 - 15_000.0) * 0.0137
    };
    for world in [2, 3, 5] {
        join(world, |member| {
            let rank = member.rank();
            let hosts = [
                Host::tcp(&member, Options::default()).unwrap(),
                Host::shm(&member, Options::default()).unwrap().unwrap(),
            ];
            for mut host in hosts {
                let sum = |slab| {
                    let call = Call::new(Op::AllReduce(ReduceOp::Sum)).blocking();
                    let work = host.submit(call, Data::InPlace(slab)).unwrap();
                    work.wait().unwrap().into_output()
                };
                let mut sum = sum;
                let own = (0..NUMEL).map(|index| bf16::from_f32(leaf(rank, index)));
                let sums = sum(Slab::from_slice(&own.collect::<Vec<_>>()));
                for (index, sum) in sums.as_slice::<bf16>().iter().enumerate() {
                    let leaves = (0..world).map(|rank| bf16::from_f32(leaf(rank, index)).to_f32());
                    let right = bf16::from_f32(tree(&leaves.collect::<Vec<_>>()));
                    assert_eq!(sum.to_bits(), right.to_bits(), "bf16 {index} of {world}");
                }
                let own = (0..NUMEL).map(|index| f16::from_f32(leaf(rank, index)));
                let sums = sum(Slab::from_slice(&own.collect::<Vec<_>>()));
                for (index, sum) in sums.as_slice::<f16>().iter().enumerate() {
                    let leaves = (0..world).map(|rank| f16::from_f32(leaf(rank, index)).to_f32());
                    let right = f16::from_f32(tree(&leaves.collect::<Vec<_>>()));
                    assert_eq!(sum.to_bits(), right.to_bits(), "f16 {index} of {world}");
                }
            }
        });
    }
}
