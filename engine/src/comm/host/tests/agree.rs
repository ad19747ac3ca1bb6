//! Every collective in shared memory against the same by messages.

use fabric_kernels::{self as kernels, Span};

use super::*;
use crate::{
    comm::{Op, ReduceOp},
    schedule::{Kind, Problem},
};

/// Values that every dtype holds and whose sums round: different on every rank.
fn fill(slab: &mut Slab, rank: usize) {
    let values = (0..slab.numel())
        .map(|index| {
            let mixed = (index * 31 + rank * 17 + 7) % 61;
            if slab.dtype().is_float() {
                (mixed as f32 - 30.0) * 0.37
            } else {
                mixed as f32
            }
        })
        .collect::<Vec<_>>();
    let all = 0..values.len();
    if slab.dtype().is_float() {
        kernels::cast(Span::of(&values), slab.part_mut(all)).unwrap();
        return;
    }
    let size = slab.dtype().size();
    let is_bool = slab.dtype() == Dtype::Bool;
    for (bytes, value) in slab.as_bytes_mut().chunks_exact_mut(size).zip(values) {
        bytes.fill(0);
        bytes[0] = if is_bool {
            u8::from((value as u8).is_multiple_of(3))
        } else {
            value as u8
        };
    }
}

/// Every collective that `dtype` can be used with.
fn calls(dtype: Dtype, size: usize) -> Vec<Op> {
    let mut reduces = vec![ReduceOp::Min, ReduceOp::Max];
    if dtype != Dtype::Bool {
        reduces.extend([ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Prod]);
        reduces.push(ReduceOp::PreMulSum(3.0));
    }
    if !dtype.is_float() {
        reduces.extend([ReduceOp::BitAnd, ReduceOp::BitOr, ReduceOp::BitXor]);
    }
    let root = size - 1;
    let mut calls = vec![
        Op::AllGather,
        Op::Broadcast { root },
        Op::Gather { root },
        Op::Scatter { root },
        Op::AllToAll,
    ];
    calls.extend(reduces.iter().map(|op| Op::AllReduce(*op)));
    calls.extend(reduces.iter().map(|op| Op::ReduceScatter(*op)));
    calls.extend(reduces.iter().map(|op| Op::Reduce { op: *op, root }));
    calls
}

/// Each rank multiplies with its own factor.
fn own(op: Op, rank: usize) -> Op {
    let own = |reduce| match reduce {
        ReduceOp::PreMulSum(factor) => ReduceOp::PreMulSum(factor + rank as f64),
        reduce => reduce,
    };
    match op {
        Op::AllReduce(reduce) => Op::AllReduce(own(reduce)),
        Op::ReduceScatter(reduce) => Op::ReduceScatter(own(reduce)),
        Op::Reduce { op, root } => Op::Reduce { op: own(op), root },
        op => op,
    }
}

/// Uneven slices, or blocks, of `numel` elements each at most.
fn uneven(op: Op, size: usize, numel: usize) -> Option<Arc<[usize]>> {
    let count = |slice: usize| numel * (slice * 5 % 7) / 6;
    match op {
        Op::ReduceScatter(_) | Op::AllGather | Op::Gather { .. } | Op::Scatter { .. } => {
            Some((0..size).map(count).collect())
        }
        Op::AllToAll => Some((0..size * size).map(count).collect()),
        _ => None,
    }
}

/// The problem of `op` on slices, or blocks, of `numel` elements each, or on so many where there are no slices.
fn problem(call: &Call, size: usize, numel: usize) -> Problem {
    let kind = call.op.kind().expect("no message");
    match (&call.counts, kind) {
        (Some(counts), _) => Problem::with_counts(kind, size, counts),
        (_, Kind::AllReduce | Kind::Broadcast { .. } | Kind::Reduce { .. }) => {
            Problem::even(kind, size, numel)
        }
        (_, Kind::AllToAll) => Problem::even(kind, size, numel * size * size),
        _ => Problem::even(kind, size, numel * size),
    }
}

/// Run one collective, and give back the bytes of the rank's output alone.
fn once(
    host: &mut Host,
    call: &Call,
    numel: usize,
    form: Form,
    slab: &dyn Fn(&Host, usize) -> Slab,
) -> Result<Vec<u8>> {
    let (rank, size) = (host.rank(), host.size());
    let problem = problem(call, size, numel);
    let (input, output) = (problem.input(rank), problem.output_elems(rank));
    let root = problem.kind.root();
    let data = match form {
        Form::Apart => {
            let mut from = slab(host, input.len());
            fill(&mut from, rank);
            let into = slab(host, output);
            Data::Out { from, into }
        }
        Form::InPlace => {
            let whole = root.is_none_or(|root| root == rank);
            let held = if whole {
                problem.elems()
            } else {
                input.len().max(output)
            };
            let mut slab = slab(host, held);
            // The input's values are those of the other forms.
            let mut values = Slab::zeroed(slab.dtype(), input.len());
            fill(&mut values, rank);
            let start = if whole { input.start } else { 0 };
            let place = slab.part_mut(start..start + input.len());
            kernels::cast(values.part(0..input.len()), place).unwrap();
            Data::InPlace(slab)
        }
        Form::Many => {
            let mut values = slab(host, problem.elems());
            fill(&mut values, rank);
            let (first, rest) = values.split_at(numel / 3);
            let (none, rest) = rest.split_at(0);
            Data::Many(vec![first, none, rest])
        }
    };
    let call = Call {
        op: own(call.op, rank),
        ..call.clone().blocking()
    };
    let start = problem.outputs(rank).next().map_or(0, |part| part.start);
    match host.submit(call, data)?.wait()? {
        Data::Many(slabs) if output > 0 => Ok(slabs
            .iter()
            .flat_map(|slab| slab.as_bytes().to_vec())
            .collect()),
        Data::InPlace(slab) if root.is_none_or(|root| root == rank) && output > 0 => {
            let size = slab.dtype().size();
            Ok(slab.as_bytes()[start * size..(start + output) * size].to_vec())
        }
        Data::Many(_) => Ok(Vec::new()),
        data => {
            let slab = data.into_output();
            Ok(slab.as_bytes()[..output * slab.dtype().size()].to_vec())
        }
    }
}

/// How the memory is given.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Apart,
    InPlace,
    Many,
}

/// Goal: shared memory gives the bits of the message executor. Method: both communicators side by side on the same
/// inputs, over worlds, dtypes, operations and lengths, in place and not, with registered and with private buffers.
fn agrees_with_tcp(size: usize, dtypes: &[Dtype], lengths: &[usize]) {
    world(size, |member| {
        let mut tcp = Host::tcp(member, options()).unwrap();
        let mut host = shm(member, options());
        for &dtype in dtypes {
            for op in calls(dtype, size) {
                for (index, &numel) in lengths.iter().enumerate() {
                    let even = Call::new(op);
                    let uneven = uneven(op, size, numel).map(|counts| even.clone().counts(counts));
                    for call in [Some(even), uneven].into_iter().flatten() {
                        one_agrees_with_tcp(&mut tcp, &mut host, &call, dtype, numel, index);
                    }
                }
            }
        }
        host.barrier().unwrap();
    });
}

fn one_agrees_with_tcp(
    tcp: &mut Host,
    host: &mut Host,
    call: &Call,
    dtype: Dtype,
    numel: usize,
    index: usize,
) {
    let heap = |_: &Host, numel| Slab::zeroed(dtype, numel);
    let arena = |host: &Host, numel| host.alloc(dtype, numel).unwrap();
    // Some ranks' buffers are private, not always the same ones.
    let mixed = |host: &Host, numel| {
        if (host.rank() + index).is_multiple_of(2) {
            Slab::zeroed(dtype, numel)
        } else {
            host.alloc(dtype, numel).unwrap()
        }
    };
    let expected = once(tcp, call, numel, Form::Apart, &heap).unwrap();
    let full = problem(call, host.size(), numel).elems();
    for form in [Form::Apart, Form::InPlace, Form::Many] {
        let what = || format!("{call:?} of {numel} x {dtype}, {form:?}");
        let whole = matches!(
            call.op,
            Op::AllReduce(_) | Op::Reduce { .. } | Op::Broadcast { .. }
        );
        if (form == Form::Many && !whole) || (form == Form::InPlace && call.op == Op::AllToAll) {
            continue;
        }
        let messages = once(tcp, call, numel, form, &heap);
        assert!(messages.unwrap() == expected, "messages {}", what());
        let price = host.price(call, dtype, full);
        let before = host.spent();
        let registered = once(host, call, numel, form, &arena);
        assert!(registered.unwrap() == expected, "registered {}", what());
        if form != Form::Many {
            assert_eq!(host.spent() - before, price, "{}", what());
        }
        let private = once(host, call, numel, form, &mixed);
        assert!(private.unwrap() == expected, "private {}", what());
    }
}

#[test]
fn shared_memory_gives_the_bits_of_messages_for_every_dtype() {
    for size in 1..=5 {
        agrees_with_tcp(size, &Dtype::ALL, &[0, 1, 2, 7, 64, 1000]);
    }
}

#[test]
fn shared_memory_gives_the_bits_of_messages_over_many_chunks() {
    agrees_with_tcp(3, &Dtype::ALL, &[100_003]);
    for size in [1, 2, 4, 5] {
        agrees_with_tcp(size, &[Dtype::BF16, Dtype::I32], &[100_003]);
    }
}

/// Goal: windows begin and end where they should, whatever the world. Method: all_reduce of f64 against a sum that is
/// exact.
#[test]
fn long_vectors_cross_windows_in_every_world() {
    for size in 1..=5 {
        world(size, |member| {
            let mut host = shm(member, options());
            for numel in [100_003, 32 << 10, (32 << 10) + 1] {
                for private in [false, true] {
                    let mut slab = if private {
                        Slab::zeroed(Dtype::F64, numel)
                    } else {
                        host.alloc(Dtype::F64, numel).unwrap()
                    };
                    for (index, value) in slab.as_mut_slice::<f64>().iter_mut().enumerate() {
                        *value = (index * (host.rank() + 1)) as f64;
                    }
                    let call = Call::new(Op::AllReduce(ReduceOp::Sum));
                    let slab = host.submit(call, Data::InPlace(slab)).unwrap();
                    let slab = slab.wait().unwrap().into_output();
                    let factor = size * (size + 1) / 2;
                    let right = |(index, value): (usize, &f64)| *value == (index * factor) as f64;
                    assert!(slab.as_slice::<f64>().iter().enumerate().all(right));
                }
            }
        });
    }
}
