//! Goal: a wrong call is refused with a sentence that says what to do, and writes nothing. Method: one call a refusal.

use half::bf16;

use super::steps::{AdamWStep, SgdStep, adamw, sgd};
use super::*;
use crate::simd::away;
use crate::{Bool, Dtype, Fold, KernelError, Lion, Memory, Rule, Span, SpanMut, update};
use crate::{cast, cast_scaled, clamp, divide, fill, fold, sum_squares};

const SGD: SgdStep = SgdStep {
    lr: 0.1,
    momentum: 0.9,
    dampening: 0.0,
    weight_decay: 0.0,
    nesterov: false,
    maximize: false,
    grad_scale: 1.0,
    first: true,
};

const ADAMW: AdamWStep = AdamWStep {
    lr: 0.1,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.0,
    step: 1,
    grad_scale: 1.0,
};

#[test]
fn lengths_must_agree() {
    let mut into = [0.0f32; 3];
    let refused = KernelError::Length {
        op: "cast",
        into: 3,
        from: 2,
    };
    assert_eq!(
        cast(Span::of(&[1.0f32; 2]), SpanMut::of(&mut into)),
        Err(refused.clone())
    );
    assert!(
        refused
            .to_string()
            .contains("the target has 3 elements and the source 2")
    );
    let refused = KernelError::Length {
        op: "fold",
        into: 3,
        from: 4,
    };
    assert_eq!(
        fold(Fold::Sum, SpanMut::of(&mut into), Span::of(&[1.0f32; 4])),
        Err(refused)
    );
    let mut state = [0.0f32; 2];
    let found = sgd(
        SpanMut::of(&mut into),
        Span::of(&[1.0f32; 3]),
        Some(SpanMut::of(&mut state)),
        &SGD,
    );
    assert_eq!(
        found,
        Err(KernelError::Length {
            op: "sgd",
            into: 3,
            from: 2
        })
    );
    assert_eq!(into, [0.0; 3]);
}

#[test]
fn device_memory_is_refused_on_the_host() {
    let mut none = [0.0f32; 0];
    let refused = |op| {
        Err(KernelError::Device {
            op,
            memory: Memory::Cuda(1),
        })
    };
    assert_eq!(
        cast(away(Dtype::F32), SpanMut::of(&mut none)),
        refused("cast")
    );
    assert_eq!(
        fold(Fold::Min, SpanMut::of(&mut none), away(Dtype::F32)),
        refused("fold")
    );
    assert_eq!(
        sum_squares(away(Dtype::F32)).map(|_| ()),
        refused("sum_squares")
    );
    let plain = SgdStep {
        momentum: 0.0,
        ..SGD
    };
    assert_eq!(
        sgd(SpanMut::of(&mut none), away(Dtype::F32), None, &plain),
        refused("cast") // the gradient is fetched
    );
    assert!(refused("cast").unwrap_err().to_string().contains("cuda:1"));
}

#[test]
fn floats_and_integers_do_not_mix() {
    let mut ints = [0i32; 2];
    let mixed = KernelError::Cast {
        from: Dtype::F32,
        into: Dtype::I32,
    };
    let floats = [1.0f32; 2];
    assert_eq!(
        cast(Span::of(&floats), SpanMut::of(&mut ints)),
        Err(mixed.clone())
    );
    assert_eq!(
        cast_scaled(Span::of(&floats), SpanMut::of(&mut ints), 1.0),
        Err(mixed.clone())
    );
    assert_eq!(
        fold(Fold::Sum, SpanMut::of(&mut ints), Span::of(&floats)),
        Err(mixed)
    );
    let mixed = KernelError::Cast {
        from: Dtype::I64,
        into: Dtype::I32,
    };
    assert_eq!(
        divide(Span::of(&[1i64; 2]), SpanMut::of(&mut ints), 2),
        Err(mixed.clone())
    );
    assert_eq!(
        cast(Span::of(&[1i64; 2]), SpanMut::of(&mut ints)),
        Err(mixed)
    );
    let mixed = KernelError::Cast {
        from: Dtype::I64,
        into: Dtype::F64,
    };
    assert_eq!(
        cast(Span::of(&[1i64]), SpanMut::of(&mut [0.0f64])),
        Err(mixed)
    );
}

#[test]
fn verbs_without_meaning_for_a_dtype_say_so() {
    let mut flags = [Bool(1)];
    let (mut floats, mut ints) = ([1.0f32], [1i32]);
    let refused = |op, dtype| Err(KernelError::Unsupported { op, dtype });
    let with = [Bool(1)];
    assert_eq!(
        fold(Fold::Sum, SpanMut::of(&mut flags), Span::of(&with)),
        refused("sum", Dtype::Bool)
    );
    assert_eq!(
        fold(Fold::Prod, SpanMut::of(&mut flags), Span::of(&with)),
        refused("prod", Dtype::Bool)
    );
    for (op, name) in [(Fold::And, "band"), (Fold::Or, "bor"), (Fold::Xor, "bxor")] {
        assert_eq!(
            fold(op, SpanMut::of(&mut floats), Span::of(&[2.0f32])),
            refused(name, Dtype::F32)
        );
    }
    assert_eq!(floats, [1.0]);
    assert_eq!(
        cast_scaled(Span::of(&with), SpanMut::of(&mut flags), 1.0),
        refused("cast_scaled", Dtype::Bool)
    );
    assert_eq!(
        divide(Span::of(&[1.0f32]), SpanMut::of(&mut floats), 2),
        refused("divide", Dtype::F32)
    );
    assert_eq!(
        clamp(SpanMut::of(&mut ints), 1.0),
        refused("clamp", Dtype::I32)
    );
    assert_eq!(
        sum_squares(Span::of(&ints)).map(|_| ()),
        refused("sum_squares", Dtype::I32)
    );
    let mut eights = [crate::F8E4M3(0)];
    let plain = SgdStep {
        momentum: 0.0,
        ..SGD
    };
    assert_eq!(
        sgd(SpanMut::of(&mut eights), Span::of(&[1.0f32]), None, &plain),
        refused("sgd", Dtype::F8E4M3)
    );
    assert_eq!(
        sgd(SpanMut::of(&mut floats), Span::of(&[1i32]), None, &plain),
        refused("sgd", Dtype::I32)
    );
}

#[test]
fn numbers_that_do_not_fit_are_named() {
    let mut ints = [0u8];
    for value in [0.5, -1.0, 256.0, f64::NAN, f64::INFINITY, 1e300] {
        let found = cast_scaled(Span::of(&[1u8]), SpanMut::of(&mut ints), value);
        assert!(
            matches!(
                found,
                Err(KernelError::Value {
                    op: "cast_scaled",
                    dtype: Dtype::U8,
                    ..
                })
            ),
            "{value}"
        );
        let found = fill(SpanMut::of(&mut ints), value);
        assert!(
            matches!(
                found,
                Err(KernelError::Value {
                    op: "fill",
                    dtype: Dtype::U8,
                    ..
                })
            ),
            "{value}"
        );
    }
    // 2^63 is one too many for i64 and fits u64.
    assert!(fill(SpanMut::of(&mut [0i64]), 2.0f64.powi(63)).is_err());
    assert!(fill(SpanMut::of(&mut [0u64]), 2.0f64.powi(63)).is_ok());
    assert!(fill(SpanMut::of(&mut [0u64]), 2.0f64.powi(64)).is_err());
    assert_eq!(
        divide(Span::of(&[1u8]), SpanMut::of(&mut ints), 0),
        Err(KernelError::DivideByZero)
    );
    assert_eq!(
        clamp(SpanMut::of(&mut [0.0f32]), -1.0),
        Err(KernelError::Limit { limit: -1.0 })
    );
    assert!(clamp(SpanMut::of(&mut [0.0f32]), f64::NAN).is_err());
}

#[test]
fn optimizers_refuse_wrong_state_and_contradictions() {
    let mut param = [bf16::ONE];
    let grad = [bf16::ONE];
    let mut state = [bf16::ZERO];
    let wrong = |op| {
        Err(KernelError::State {
            op,
            param: Dtype::BF16,
            state: Dtype::BF16,
            wanted: Dtype::F32,
        })
    };
    let found = sgd(
        SpanMut::of(&mut param),
        Span::of(&grad),
        Some(SpanMut::of(&mut state)),
        &SGD,
    );
    assert_eq!(found, wrong("sgd"));
    let mut other = [0.0f32];
    let (m, v) = (SpanMut::of(&mut other), SpanMut::of(&mut state));
    assert_eq!(
        adamw(SpanMut::of(&mut param), Span::of(&grad), m, v, &ADAMW),
        wrong("adamw")
    );

    let missing = sgd(SpanMut::of(&mut param), Span::of(&grad), None, &SGD).unwrap_err();
    assert!(missing.to_string().contains("needs [\"momentum_buffer\"]"));
    let step = SgdStep {
        nesterov: true,
        dampening: 0.5,
        ..SGD
    };
    let torn = sgd(
        SpanMut::of(&mut param),
        Span::of(&grad),
        Some(SpanMut::of(&mut other)),
        &step,
    );
    assert!(torn.unwrap_err().to_string().contains("nesterov"));
    let (mut m, mut v) = ([0.0f32], [0.0f32]);
    let zero = AdamWStep { step: 0, ..ADAMW };
    let (m, v) = (SpanMut::of(&mut m), SpanMut::of(&mut v));
    assert!(
        adamw(SpanMut::of(&mut param), Span::of(&grad), m, v, &zero)
            .unwrap_err()
            .to_string()
            .contains("from 1")
    );
    assert_eq!(param, [bf16::ONE]);
}

#[test]
fn updates_refuse_wrong_copies_and_counts_of_states() {
    let rule = Rule::Lion(Lion {
        lr: 0.1,
        beta1: 0.9,
        beta2: 0.99,
        weight_decay: 0.0,
    });
    let (mut param, grad, mut state, mut other) =
        ([1.0f32; 2], [1.0f32; 2], [0.0f32; 2], [0.0f32; 2]);
    let mut take = |states: &mut [SpanMut<'_>], copy: Option<SpanMut<'_>>| {
        let (p, g) = (SpanMut::of(&mut param), Span::of(&grad));
        update(&rule, 1, 1.0, p, g, states, copy).unwrap_err()
    };
    let states = |passed| KernelError::States {
        op: "lion",
        wanted: &["exp_avg"],
        passed,
    };
    assert_eq!(take(&mut [], None), states(0));
    let two = &mut [SpanMut::of(&mut state), SpanMut::of(&mut other)];
    assert_eq!(take(two, None), states(2));
    let one = &mut [SpanMut::of(&mut state)];
    let copy = take(one, Some(SpanMut::of(&mut [0i32; 2])));
    assert_eq!(
        copy,
        KernelError::Unsupported {
            op: "lion",
            dtype: Dtype::I32
        }
    );
    let copy = take(one, Some(SpanMut::of(&mut [0.0f32; 3])));
    assert_eq!(
        copy,
        KernelError::Length {
            op: "lion",
            into: 3,
            from: 2
        }
    );
    assert_eq!((param, state), ([1.0; 2], [0.0; 2]));
}

#[test]
fn reductions_refuse_what_their_verbs_would_before_anything_is_written() {
    use crate::{Finish, Store, combine};
    fn take<T: crate::Element>(
        op: Fold,
        sources: &[Span<'_>],
        factors: Option<&[f64]>,
        finish: Finish,
        into: &mut [T],
    ) -> KernelError {
        let old = into.to_vec();
        let targets = &mut [SpanMut::of(into)];
        let error = combine(op, sources, factors, finish, targets, Store::Cached).unwrap_err();
        let bytes = bytemuck::cast_slice::<T, u8>;
        assert_eq!(bytes(into), bytes(&old));
        error
    }
    let op = "combine";
    let (floats, ints, flags) = ([1.0f32; 2], [1i32; 2], [Bool(1); 2]);
    let pair = [Span::of(&floats), Span::of(&floats)];
    let whole = [Span::of(&ints), Span::of(&ints)];
    let truth = [Span::of(&flags), Span::of(&flags)];
    let (mut f, mut i, mut b) = ([9.0f32; 2], [9i32; 2], [Bool(9); 2]);
    let unsupported = |op, dtype| KernelError::Unsupported { op, dtype };
    let sum = Fold::Sum;
    assert_eq!(
        take(sum, &[], None, Finish::Cast, &mut f),
        KernelError::NoSource { op }
    );
    let (first, other) = (Dtype::F32, Dtype::I32);
    let mixed = KernelError::Mixed { op, first, other };
    assert_eq!(take(sum, &pair, None, Finish::Cast, &mut i), mixed);
    let three = take(sum, &pair, None, Finish::Cast, &mut [9.0f32; 3]);
    let (into, from) = (3, 2);
    assert_eq!(three, KernelError::Length { op, into, from });
    let memory = Memory::Cuda(1);
    assert_eq!(
        take(
            sum,
            &[away(Dtype::F32)],
            None,
            Finish::Cast,
            &mut [0.0f32; 0]
        ),
        KernelError::Device { op, memory }
    );
    let (sources, factors) = (2, 1);
    assert_eq!(
        take(sum, &pair, Some(&[1.0]), Finish::Cast, &mut f),
        KernelError::Factors {
            op,
            sources,
            factors
        }
    );
    assert_eq!(
        take(Fold::Xor, &pair, None, Finish::Cast, &mut f),
        unsupported("bxor", Dtype::F32)
    );
    assert_eq!(
        take(sum, &truth, None, Finish::Cast, &mut b),
        unsupported("sum", Dtype::Bool)
    );
    assert_eq!(
        take(Fold::Min, &truth, Some(&[1.0; 2]), Finish::Cast, &mut b),
        unsupported("cast_scaled", Dtype::Bool)
    );
    assert_eq!(
        take(sum, &whole, None, Finish::Scale(2.0), &mut i),
        unsupported("scale", Dtype::I32)
    );
    assert_eq!(
        take(sum, &pair, None, Finish::Divide(2), &mut f),
        unsupported("divide", Dtype::F32)
    );
    assert_eq!(
        take(sum, &whole, None, Finish::Divide(0), &mut i),
        KernelError::DivideByZero
    );
    assert_eq!(
        take(sum, &whole, Some(&[1.0, 0.5]), Finish::Cast, &mut i),
        KernelError::Value {
            op: "cast_scaled",
            dtype: Dtype::I32,
            value: 0.5
        }
    );
    let none = combine(sum, &pair, None, Finish::Cast, &mut [], Store::Streaming);
    assert_eq!(none, Ok(()));
}

#[test]
fn empty_spans_are_no_work() {
    let mut none = [0.0f32; 0];
    assert_eq!(cast(Span::of(&[0.0f64; 0]), SpanMut::of(&mut none)), Ok(()));
    assert_eq!(fill(SpanMut::of(&mut none), 1.0), Ok(()));
    assert!(sum_squares(Span::of(&floats::<f32>(0, 0))).unwrap().finite);
}
