//! Goal: a reduction in one pass has the bits of the oracle, and of the verbs one by one, whatever its shape. Method:
//! every length, with everything else drawn for each (sources, targets, places, fold, factors, finish, stores), for
//! every dtype on every instruction set; the bytes around the targets must not change. Then properties, and values by
//! hand.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::simd::{on_every_isa, twin};
use crate::{
    Bool, Combiner, Dtype, F8E4M3, F8E5M2, Finish, Fold, Span, SpanMut, Store, combine, scalar,
};

/// Elements around an operand in its region: a line, for its place within one, and a guard.
const SLACK: usize = 64 + 8;
const SOURCES: [usize; 10] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17];

/// Every short length, and some around the steps and blocks of every dtype.
fn lengths() -> impl Iterator<Item = usize> {
    let around = [512, 1024, 2048, 4096, 8192];
    (0..=257).chain(around.into_iter().flat_map(|n| [n - 1, n, n + 1, n + 67]))
}

/// One call, but for the elements.
#[derive(Debug)]
struct Case {
    op: Fold,
    factors: Option<Vec<f64>>,
    finish: Finish,
    sources: Vec<usize>, // where each starts in its region, in elements
    targets: Vec<usize>,
    in_place: Option<(usize, usize)>, // this source lies where this target does
    store: Store,
    len: usize,
}

impl Case {
    fn draw(stream: &mut Stream, dtype: Dtype, len: usize) -> Case {
        let mut below = |n: usize| stream.next() as usize % n;
        let ops: Vec<_> = Fold::ALL.into_iter().filter(|op| op.takes(dtype)).collect();
        let count = SOURCES[below(if len > 257 { 8 } else { SOURCES.len() })];
        let factors = [
            1.0,
            2.0,
            3.0,
            0.0,
            100.0,
            if dtype.is_float() { -1.0 / 3.0 } else { 7.0 },
        ];
        let factors = (dtype != Dtype::Bool && below(4) == 0)
            .then(|| (0..count).map(|_| factors[below(factors.len())]).collect());
        let finish = match (below(3), dtype.is_float(), dtype.is_integer()) {
            (0, true, _) => Finish::Scale(1.0 / count as f64),
            (0, _, true) => Finish::Divide([1, 3, 128, 1 << 31][below(4)]),
            _ => Finish::Cast,
        };
        // Targets that share a place in the line can be streamed in step; others cannot.
        let shared = below(64);
        let apart = below(4) == 0;
        let targets: Vec<_> = (0..below(4))
            .map(|_| if apart { below(64) } else { shared })
            .collect();
        let in_place =
            (!targets.is_empty() && below(2) == 0).then(|| (below(count), below(targets.len())));
        Case {
            op: ops[below(ops.len())],
            factors,
            finish,
            sources: (0..count).map(|_| below(64)).collect(),
            targets,
            in_place,
            store: [Store::Cached, Store::Streaming][below(2)],
            len,
        }
    }

    /// Runs it on sources cut from `pool`, and compares all memory with what it should be.
    fn check<T: Element>(
        &self,
        pool: &[T],
        oracle: impl Fn(&Case, &[T]) -> T,
        equal: impl Fn(T, T) -> bool,
        what: &dyn std::fmt::Debug,
    ) {
        let (len, stride) = (self.len, self.len + SLACK);
        let place = |source: usize| {
            let start = (source * 331 + self.sources[source]) % (pool.len() - len);
            &pool[start..start + len]
        };
        // All regions in one allocation, the first of which starts a line; so does every one whose stride is whole
        // lines.
        let stride = stride.next_multiple_of(64);
        let mut memory: Vec<T> = pool
            .iter()
            .copied()
            .cycle()
            .take((self.targets.len() + 1) * stride)
            .collect();
        let lead = memory.as_ptr().cast::<[u8; 1]>().align_offset(64) / size_of::<T>();
        let ranges: Vec<_> = self
            .targets
            .iter()
            .map(|start| start + 1..start + 1 + len)
            .collect();
        if let Some((source, target)) = self.in_place {
            memory[lead + target * stride..][ranges[target].clone()].copy_from_slice(place(source));
        }
        let mut expected = memory.clone();
        for (index, range) in ranges.iter().enumerate() {
            let region = &mut expected[lead + index * stride..];
            for (element, into) in region[range.clone()].iter_mut().enumerate() {
                let column: Vec<T> = (0..self.sources.len()).map(|s| place(s)[element]).collect();
                *into = oracle(self, &column);
            }
        }
        let mut targets: Vec<SpanMut<'_>> = memory[lead..]
            .chunks_mut(stride)
            .zip(&ranges)
            .map(|(region, range)| SpanMut::of(&mut region[range.clone()]))
            .collect();
        let sources: Vec<Span<'_>> = (0..self.sources.len())
            .map(|source| match self.in_place {
                Some((own, target)) if own == source => twin(&targets[target]),
                _ => Span::of(place(source)),
            })
            .collect();
        let (op, finish, targets_to) = (self.op, self.finish, &mut targets);
        match &self.factors {
            None if len % 2 == 0 => Combiner::new(op, T::DTYPE, sources.len(), finish)
                .run(&sources, targets_to, self.store),
            factors => combine(
                op,
                &sources,
                factors.as_deref(),
                finish,
                targets_to,
                self.store,
            ),
        }
        .unwrap();
        drop(targets);
        let differs = (0..memory.len()).find(|i| !equal(memory[*i], expected[*i]));
        assert_eq!(
            differs,
            None,
            "{} {what:?} {self:?}, lead {lead}, stride {stride}",
            T::DTYPE
        );
    }
}

fn bytes_equal<T: Element>(a: T, b: T) -> bool {
    bytemuck::bytes_of(&a) == bytemuck::bytes_of(&b)
}

/// Draws `rounds` cases for every length, on every instruction set.
fn sweep<T: Element>(
    pool: &[T],
    rounds: usize,
    oracle: impl Fn(&Case, &[T]) -> T,
    equal: impl Fn(T, T) -> bool,
) {
    let mut stream = Stream(u64::from(T::DTYPE.code()));
    on_every_isa(|isa| {
        for len in lengths() {
            let rounds = if len > 257 {
                rounds.div_ceil(2)
            } else {
                rounds
            };
            for _ in 0..rounds {
                Case::draw(&mut stream, T::DTYPE, len).check(pool, &oracle, &equal, &isa);
            }
        }
    });
}

const POOL: usize = 16411;

fn sweep_float<T: Float>() {
    let oracle = |case: &Case, column: &[T]| {
        let factors = case.factors.as_deref();
        if T::DTYPE == Dtype::F64 {
            scalar::combine::<T, f64>(case.op, column, factors, case.finish)
        } else {
            scalar::combine::<T, f32>(case.op, column, factors, case.finish)
        }
    };
    sweep(&floats::<T>(11, POOL), 6, oracle, same);
}

fn sweep_integer<T: Integer>() {
    let oracle = |case: &Case, column: &[T]| {
        scalar::combine_integer(case.op, column, case.factors.as_deref(), case.finish)
    };
    sweep(&integers::<T>(12, POOL), 4, oracle, bytes_equal);
}

#[test]
fn combine_equals_the_oracle_on_floats() {
    for_types!(sweep_float; floats);
}

#[test]
fn combine_equals_the_oracle_on_integers() {
    for_types!(sweep_integer; integers);
}

#[test]
fn combine_equals_the_oracle_on_bools() {
    let pool: Vec<Bool> = (0..POOL)
        .map(|i| Bool([0, 1, 2, 255, 0, 128][i % 6]))
        .collect();
    sweep(
        &pool,
        6,
        |case, column| scalar::combine_bool(case.op, column),
        bytes_equal,
    );
}

#[test]
fn every_source_may_be_overwritten_by_every_target() {
    let pool = floats::<bf16>(13, POOL);
    for count in 1..=9 {
        for source in 0..count {
            for (target, store) in [
                (0, Store::Cached),
                (1, Store::Cached),
                (0, Store::Streaming),
                (1, Store::Streaming),
            ] {
                let case = Case {
                    op: Fold::Sum,
                    factors: None,
                    finish: Finish::Scale(1.0 / count as f64),
                    sources: vec![3; count],
                    targets: vec![5, 5],
                    in_place: Some((source, target)),
                    store,
                    len: 3000,
                };
                let oracle = |case: &Case, column: &[bf16]| {
                    scalar::combine::<bf16, f32>(case.op, column, None, case.finish)
                };
                case.check(&pool, oracle, same, &"here");
            }
        }
    }
}

/// The same by the other verbs of this crate: lifted into the accumulator, folded pair by pair, finished.
fn by_verbs<T: Element, C: Element + Default>(case: &Case, sources: &[Vec<T>], into: &mut [T]) {
    let mut stack: Vec<Vec<C>> = Vec::new();
    let pair = |stack: &mut Vec<Vec<C>>| {
        let right = stack.pop().unwrap();
        let left = stack.last_mut().unwrap();
        crate::fold(case.op, SpanMut::of(left), Span::of(&right)).unwrap();
    };
    for (index, source) in sources.iter().enumerate() {
        let mut leaf = vec![C::default(); case.len];
        let (from, lifted) = (Span::of(source), SpanMut::of(&mut leaf));
        match &case.factors {
            None => crate::cast(from, lifted).unwrap(),
            Some(factors) => crate::cast_scaled(from, lifted, factors[index]).unwrap(),
        }
        stack.push(leaf);
        for _ in 0..index.trailing_ones() {
            pair(&mut stack);
        }
    }
    while stack.len() > 1 {
        pair(&mut stack);
    }
    let (value, into) = (Span::of(&stack[0]), SpanMut::of(into));
    match case.finish {
        Finish::Cast => crate::cast(value, into).unwrap(),
        Finish::Scale(factor) => crate::cast_scaled(value, into, factor).unwrap(),
        Finish::Divide(by) => crate::divide(value, into, by).unwrap(),
    }
}

fn compare_with_verbs<T: Element, C: Element + Default>(
    seed: u64,
    len: usize,
    make: fn(u64, usize) -> Vec<T>,
    equal: fn(T, T) -> bool,
) {
    let case = Case::draw(&mut Stream(seed), T::DTYPE, len);
    let count = case.sources.len();
    if count == 1 && case.factors.is_none() && case.finish == Finish::Cast {
        return; // a copy, which verbs that go through an accumulator are not
    }
    let from: Vec<Vec<T>> = (0..count).map(|i| make(seed + i as u64, len)).collect();
    let sources: Vec<Span<'_>> = from.iter().map(|s| Span::of(s)).collect();
    let mut found = from[0].clone();
    let targets = &mut [SpanMut::of(&mut found)];
    combine(
        case.op,
        &sources,
        case.factors.as_deref(),
        case.finish,
        targets,
        case.store,
    )
    .unwrap();
    let mut expected = from[0].clone();
    by_verbs::<T, C>(&case, &from, &mut expected);
    for (f, e) in found.iter().zip(&expected) {
        assert!(equal(*f, *e), "{} {case:?}", T::DTYPE);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn combine_is_the_verbs_one_by_one(seed: u64, len in 0usize..2500) {
        let seed = seed >> 8;
        compare_with_verbs::<f64, f64>(seed, len, floats, same);
        compare_with_verbs::<f32, f32>(seed, len, floats, same);
        compare_with_verbs::<f16, f32>(seed, len, floats, same);
        compare_with_verbs::<bf16, f32>(seed, len, floats, same);
        compare_with_verbs::<F8E4M3, f32>(seed, len, floats, same);
        compare_with_verbs::<F8E5M2, f32>(seed, len, floats, same);
        compare_with_verbs::<i8, i8>(seed, len, integers, bytes_equal);
        compare_with_verbs::<u32, u32>(seed, len, integers, bytes_equal);
        compare_with_verbs::<i64, i64>(seed, len, integers, bytes_equal);
    }
}

/// One element of each source.
fn one<T: Element + Default>(op: Fold, sources: &[T], finish: Finish) -> T {
    let mut into = [T::default()];
    let sources: Vec<_> = sources
        .iter()
        .map(|s| Span::of(std::slice::from_ref(s)))
        .collect();
    combine(
        op,
        &sources,
        None,
        finish,
        &mut [SpanMut::of(&mut into)],
        Store::Cached,
    )
    .unwrap();
    into[0]
}

#[test]
fn small_floats_are_summed_in_f32_and_rounded_once() {
    let b = bf16::from_f32;
    assert_eq!(
        one(Fold::Sum, &[b(256.0), b(1.0), b(1.0)], Finish::Cast),
        b(258.0)
    );
    assert_eq!(
        one(Fold::Sum, &[f16::MAX, f16::MAX], Finish::Cast),
        f16::INFINITY
    );
    assert_eq!(
        one(Fold::Sum, &[f16::MAX, f16::MAX], Finish::Scale(0.5)),
        f16::MAX
    );
    assert_eq!(
        one(Fold::Sum, &[f16::MAX, f16::MAX, -f16::MAX], Finish::Cast),
        f16::MAX
    );
    assert_eq!(
        one(Fold::Sum, &[F8E4M3(0x7e); 2], Finish::Cast),
        F8E4M3(0x7e)
    );
    let tiny = f16::from_bits(1);
    assert_eq!(one(Fold::Sum, &[tiny; 4], Finish::Cast).to_bits(), 4);
    assert_eq!(
        one(Fold::Sum, &[f32::from_bits(1); 2], Finish::Cast).to_bits(),
        2
    );
}

#[test]
fn the_tree_is_the_canonical_one() {
    // (1 + huge) + (-huge + 1): each one is lost in its pair. From left to right the last would stay.
    let huge = 1e20f32;
    assert_eq!(one(Fold::Sum, &[1.0, huge, -huge, 1.0], Finish::Cast), 0.0);
    assert_eq!(one(Fold::Sum, &[1.0, huge, -huge], Finish::Cast), 0.0);
    assert_eq!(
        one(Fold::Sum, &[0.0, 0.0, 1.0, huge, -huge], Finish::Cast),
        0.0
    );
    assert_eq!(
        one(Fold::Sum, &[huge, -huge, 1.0, 1.0, 1.0], Finish::Cast),
        3.0
    );
}

#[test]
fn specials_go_through_a_reduction_as_through_a_fold() {
    assert!(one(Fold::Min, &[1.0f32, f32::NAN, 2.0], Finish::Cast).is_nan());
    assert!(one(Fold::Sum, &[f32::INFINITY, f32::NEG_INFINITY], Finish::Cast).is_nan());
    assert!(one(Fold::Max, &[-0.0f64, 0.0, -0.0, -0.0], Finish::Cast).is_sign_positive());
    assert!(one(Fold::Sum, &[-0.0f32, -0.0], Finish::Cast).is_sign_negative());
    assert!(one(Fold::Sum, &[bf16::NAN, bf16::ONE], Finish::Cast).is_nan());
    assert_eq!(one(Fold::Sum, &[i8::MAX, 1], Finish::Cast), i8::MIN);
    assert_eq!(one(Fold::Sum, &[-7i32, 0], Finish::Divide(2)), -3);
    assert_eq!(
        one(Fold::Xor, &[0b1100u8, 0b1010, 0b0001], Finish::Cast),
        0b0111
    );
    assert_eq!(one(Fold::Xor, &[Bool(7), Bool(9)], Finish::Cast), Bool(0));
    // What is only copied keeps its bits, an infinity that would saturate and a byte that would become 1.
    assert_eq!(one(Fold::Sum, &[F8E5M2(0x7c)], Finish::Cast), F8E5M2(0x7c));
    assert_eq!(
        one(Fold::Sum, &[F8E5M2(0x7c), F8E5M2(0)], Finish::Cast),
        F8E5M2(0x7b)
    );
    assert_eq!(one(Fold::Sum, &[Bool(7)], Finish::Cast), Bool(7));
}

#[test]
fn many_sources_fill_the_scratch() {
    let ones = vec![1u16; 3];
    let sources = vec![Span::of(&ones); 1 << 16];
    let factors = vec![1.0; sources.len()];
    let mut into = [0u16; 3];
    for count in [sources.len() - 1, sources.len()] {
        let targets = &mut [SpanMut::of(&mut into)];
        let factors = Some(&factors[..count]);
        combine(
            Fold::Sum,
            &sources[..count],
            factors,
            Finish::Cast,
            targets,
            Store::Cached,
        )
        .unwrap();
        assert_eq!(into, [count as u16; 3]);
    }
}

#[test]
fn a_combiner_refuses_what_combine_refuses() {
    let (short, long) = ([1.0f32], [1.0f32, 2.0]);
    let refused = |combiner: Combiner, sources: &[Span<'_>]| {
        let mut into = [0.0f32; 2];
        let targets = &mut [SpanMut::of(&mut into)];
        combiner.run(sources, targets, Store::Cached).unwrap_err()
    };
    let sum = Combiner::new(Fold::Sum, Dtype::F32, 2, Finish::Cast);
    let error = refused(sum, &[Span::of(&long), Span::of(&short)]);
    assert!(
        matches!(error, crate::KernelError::Length { .. }),
        "{error}"
    );
    let error = refused(sum, &[Span::of(&long), Span::of(&[1u32, 2])]);
    assert!(matches!(error, crate::KernelError::Mixed { .. }), "{error}");
    let and = Combiner::new(Fold::And, Dtype::F32, 2, Finish::Cast);
    let error = refused(and, &[Span::of(&long), Span::of(&long)]);
    assert!(
        matches!(error, crate::KernelError::Unsupported { .. }),
        "{error}"
    );
}
