//! The verbs over device memory are those of the host, in queue order, and many pieces of work are one launch.
//! Method: every verb twice, on the host and on a queue, and the bits compared; counts of what the driver was asked.

use std::sync::Arc;

use fabric_engine::buffer::Slab;
use fabric_kernels::{
    self as kernels, Adam, Device, Dtype, Element, Fold, Lion, Rule, Sgd, Span, SpanMut,
    SquareBins, cuda::Queue,
};
use gpu_suite::{fakes, stage::with_fakes};
use half::{bf16, f16};

fn on(queue: &Arc<Queue>, dtype: Dtype, numel: usize) -> Slab {
    let device: Arc<dyn Device> = queue.clone();
    Slab::zeroed_on(Some(&device), dtype, numel).unwrap()
}

fn up<T: Element>(queue: &Arc<Queue>, values: &[T]) -> Slab {
    let mut slab = on(queue, T::DTYPE, values.len());
    kernels::cast(Span::of(values), slab.part_mut(0..values.len())).unwrap();
    slab
}

fn down<T: Element>(slab: &Slab) -> Vec<T> {
    let mut values = vec![T::zeroed(); slab.numel()];
    kernels::cast(slab.part(0..slab.numel()), SpanMut::of(&mut values)).unwrap();
    values
}

fn ramp(numel: usize) -> Vec<f32> {
    (0..numel)
        .map(|index| (index as f32 * 0.37).sin() * 100.0)
        .collect()
}

#[test]
fn what_goes_up_comes_down_cast_on_the_way() {
    with_fakes(&[], || {
        let queue = Queue::open(0).unwrap();
        let values = ramp(20_000);
        let slab = up(&queue, &values);
        assert_eq!(down::<f32>(&slab), values);
        let mut small = on(&queue, Dtype::BF16, values.len());
        kernels::cast_scaled(slab.part(0..20_000), small.part_mut(0..20_000), 0.5).unwrap();
        let expected: Vec<_> = values.iter().map(|x| bf16::from_f32(x * 0.5)).collect();
        assert_eq!(down::<bf16>(&small), expected);
        // Cast on the bus, both ways, and at a crooked place.
        let mut wide = [0f64; 100];
        kernels::cast_scaled(small.part(7..107), SpanMut::of(&mut wide), 2.0).unwrap();
        assert!(
            wide.iter()
                .zip(&expected[7..])
                .all(|(x, y)| *x == f64::from(*y) * 2.0)
        );
        let mut half = on(&queue, Dtype::F16, 101);
        kernels::cast(Span::of(&values[..100]), half.part_mut(1..101)).unwrap();
        let expected = values[..100].iter().map(|x| f16::from_f32(*x));
        assert!(down::<f16>(&half)[1..].iter().copied().eq(expected));
        let whole = up(&queue, &[1i64, -2, 3]);
        assert_eq!(down::<i64>(&whole), [1, -2, 3]);
    });
}

#[test]
fn verbs_do_on_a_device_what_they_do_on_the_host() {
    with_fakes(&[], || {
        let queue = Queue::open(1).unwrap();
        let (a, b) = (
            ramp(9001),
            ramp(9001).iter().map(|x| x * x).collect::<Vec<_>>(),
        );
        let mut host = a.clone();
        let mut slab = up(&queue, &a);
        let with = up(&queue, &b);
        let all = || 0..9001;
        for op in [Fold::Sum, Fold::Prod, Fold::Min, Fold::Max] {
            kernels::fold(op, SpanMut::of(&mut host), Span::of(&b)).unwrap();
            kernels::fold(op, slab.part_mut(all()), with.part(all())).unwrap();
            assert_eq!(down::<f32>(&slab), host, "{op}");
        }
        // One side on the host.
        kernels::fold(Fold::Sum, SpanMut::of(&mut host), Span::of(&a)).unwrap();
        kernels::fold(Fold::Sum, slab.part_mut(all()), Span::of(&a)).unwrap();
        assert_eq!(down::<f32>(&slab), host);
        kernels::scale(SpanMut::of(&mut host), 0.3).unwrap();
        kernels::scale(slab.part_mut(all()), 0.3).unwrap();
        kernels::clamp(SpanMut::of(&mut host), 5.0).unwrap();
        kernels::clamp(slab.part_mut(all()), 5.0).unwrap();
        kernels::fill(SpanMut::of(&mut host[3..8000]), -1.5).unwrap();
        kernels::fill(slab.part_mut(3..8000), -1.5).unwrap();
        assert_eq!(down::<f32>(&slab), host);
        let mut whole = up(&queue, &[1u16; 9]);
        kernels::fill(whole.part_mut(1..8), 40000.0).unwrap();
        assert_eq!(
            down::<u16>(&whole),
            [1, 40000, 40000, 40000, 40000, 40000, 40000, 40000, 1]
        );
        let twice = up(&queue, &[1u16; 9]);
        let refused = kernels::cast_scaled(twice.part(0..9), whole.part_mut(0..9), 2.0);
        assert!(
            refused
                .unwrap_err()
                .to_string()
                .contains("cast_scaled is not defined for u16")
        );
        let refused = kernels::fold(Fold::Sum, whole.part_mut(0..1), Span::of(&[1u16]));
        assert!(
            refused
                .unwrap_err()
                .to_string()
                .contains("sum is not defined for u16")
        );
    });
}

#[test]
fn norms_are_those_of_the_host_to_rounding_and_count_what_is_not_finite() {
    with_fakes(&[], || {
        let queue = Queue::open(0).unwrap();
        let (a, b) = (ramp(20_001), ramp(77));
        let mut exact = SquareBins::new();
        exact.add_all(&[Span::of(&a), Span::of(&b)]).unwrap();
        let (there, other) = (up(&queue, &a), up(&queue, &b));
        let mut found = SquareBins::new();
        found
            .add_all(&[there.part(0..20_001), Span::of(&b)])
            .unwrap();
        assert!((found.value() / exact.value() - 1.0).abs() < 1e-12);
        let odd = up(&queue, &[1.0, f32::INFINITY, f32::NAN, f32::NEG_INFINITY]);
        let mut bins = SquareBins::new();
        bins.add_all(&[other.part(0..77), odd.part(0..4)]).unwrap();
        let words = bins.words();
        assert_eq!(words[SquareBins::WORDS - 2..], [2, 1]);
    });
}

fn rules() -> Vec<Rule> {
    let adam = Adam {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.1,
    };
    let sgd = Sgd {
        lr: 0.1,
        momentum: 0.9,
        dampening: 0.0,
        weight_decay: 0.01,
        nesterov: true,
        maximize: false,
    };
    vec![
        Rule::AdamW(adam),
        Rule::Adam(adam),
        Rule::Sgd(sgd),
        Rule::Sgd(Sgd {
            momentum: 0.0,
            nesterov: false,
            maximize: true,
            ..sgd
        }),
        Rule::Lion(Lion {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.99,
            weight_decay: 0.1,
        }),
    ]
}

#[test]
fn updates_of_many_parameters_are_one_launch_and_the_bits_of_the_host() {
    with_fakes(&[], || {
        let queue = Queue::open(0).unwrap();
        let sizes = [3usize, 8192, 8193, 1, 20_000, 640];
        for rule in rules() {
            let states = rule.states().len();
            let mut params: Vec<Vec<f32>> = sizes.iter().map(|numel| ramp(*numel)).collect();
            let mut kept = vec![vec![vec![0f32; 0]; states]; sizes.len()];
            let mut there: Vec<Slab> = params.iter().map(|param| up(&queue, param)).collect();
            let mut there_states: Vec<Vec<Slab>> = Vec::new();
            let mut copies: Vec<Slab> = Vec::new();
            for (index, numel) in sizes.iter().enumerate() {
                kept[index]
                    .iter_mut()
                    .for_each(|state| state.resize(*numel, 0.0));
                there_states.push(
                    (0..states)
                        .map(|_| on(&queue, Dtype::F32, *numel))
                        .collect(),
                );
                copies.push(on(&queue, Dtype::BF16, *numel));
            }
            for step in 1..=3 {
                let grads: Vec<Vec<bf16>> = (params.iter())
                    .map(|param| param.iter().map(|x| bf16::from_f32(x.cos())).collect())
                    .collect();
                let grads_there: Vec<_> = grads.iter().map(|grad| up(&queue, grad)).collect();
                for ((param, grad), kept) in params.iter_mut().zip(&grads).zip(&mut kept) {
                    let mut states: Vec<_> =
                        kept.iter_mut().map(|state| SpanMut::of(state)).collect();
                    kernels::update(
                        &rule,
                        step,
                        0.25,
                        SpanMut::of(param),
                        Span::of(grad),
                        &mut states,
                        None,
                    )
                    .unwrap();
                }
                let before = fakes::calls("cuLaunchKernel");
                kernels::batch(|| {
                    for index in 0..sizes.len() {
                        let all = 0..sizes[index];
                        let mut states: Vec<_> = there_states[index]
                            .iter_mut()
                            .map(|state| state.part_mut(all.clone()))
                            .collect();
                        kernels::update(
                            &rule,
                            step,
                            0.25,
                            there[index].part_mut(all.clone()),
                            grads_there[index].part(all.clone()),
                            &mut states,
                            Some(copies[index].part_mut(all)),
                        )?;
                    }
                    Ok::<_, kernels::KernelError>(())
                })
                .unwrap();
                assert_eq!(fakes::calls("cuLaunchKernel") - before, 1, "{rule:?}");
                for (index, param) in params.iter().enumerate() {
                    assert_eq!(down::<f32>(&there[index]), *param, "{rule:?}");
                    let copy: Vec<_> = param.iter().map(|x| bf16::from_f32(*x)).collect();
                    assert_eq!(down::<bf16>(&copies[index]), copy);
                }
            }
        }
    });
}

#[test]
fn work_that_depends_on_work_that_waits_comes_after_it() {
    with_fakes(&[], || {
        let queue = Queue::open(0).unwrap();
        let values = ramp(5000);
        let (a, mut b, mut c) = (
            up(&queue, &values),
            on(&queue, Dtype::F32, 5000),
            on(&queue, Dtype::F32, 5000),
        );
        let before = fakes::calls("cuLaunchKernel");
        kernels::batch(|| {
            kernels::cast_scaled(a.part(0..5000), b.part_mut(0..5000), 2.0)?;
            kernels::cast_scaled(b.part(0..5000), c.part_mut(0..5000), 2.0)
        })
        .unwrap();
        assert_eq!(fakes::calls("cuLaunchKernel") - before, 2);
        let expected: Vec<_> = values.iter().map(|x| x * 4.0).collect();
        assert_eq!(down::<f32>(&c), expected);
    });
}

#[test]
fn two_queues_of_one_device_are_in_order_where_they_touch() {
    with_fakes(&[("FAKE_CUDA_DELAY_US", "500")], || {
        let (first, second) = (Queue::open(0).unwrap(), Queue::open(0).unwrap());
        for turn in 0..20 {
            let values: Vec<f32> = ramp(3000).iter().map(|x| x + turn as f32).collect();
            let mut a = up(&first, &values);
            let mut b = on(&second, Dtype::F32, 3000);
            kernels::scale(a.part_mut(0..3000), 2.0).unwrap(); // on the first
            kernels::cast(a.part(0..3000), b.part_mut(0..3000)).unwrap(); // on the second, after it
            kernels::fill(a.part_mut(0..3000), 0.0).unwrap(); // on the first, after that
            let expected: Vec<_> = values.iter().map(|x| x * 2.0).collect();
            assert_eq!(down::<f32>(&b), expected, "turn {turn}");
        }
    });
}

#[test]
fn memory_is_freed_after_the_work_that_was_put_off_over_it() {
    with_fakes(&[], || {
        let queue = Queue::open(0).unwrap();
        let live = fakes::live(0);
        let mut into = on(&queue, Dtype::F32, 4 * 1000);
        let before = fakes::calls("cuLaunchKernel");
        for part in 0..4 {
            let grad = Arc::new(up(&queue, &[part as f32 + 1.0; 1000]));
            let place = part * 1000..(part + 1) * 1000;
            kernels::put_off(Box::new(grad.clone()), || {
                kernels::cast(grad.part(0..1000), into.part_mut(place))
            })
            .unwrap();
        }
        let sums = down::<f32>(&into);
        assert!((0..4000).all(|at| sums[at] == (at / 1000) as f32 + 1.0));
        // Uploads are no launches; what was put off went with the first of them that followed, or at the end.
        assert!(fakes::calls("cuLaunchKernel") - before <= 4);
        drop(into);
        queue.settle().unwrap();
        assert_eq!(fakes::live(0), live);
    });
}

#[test]
fn what_the_driver_refuses_is_said_in_words() {
    with_fakes(&[("FAKE_CUDA_MEMORY", "1000000")], || {
        let queue = Queue::open(0).unwrap();
        let device: Arc<dyn Device> = queue.clone();
        let error = Slab::zeroed_on(Some(&device), Dtype::F32, 1 << 20).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("cuda:0: allocate 4194304 bytes"), "{text}");
        assert!(text.contains("CUDA_ERROR_OUT_OF_MEMORY (2)"), "{text}");
        assert!(text.contains("smaller batches"), "{text}");
        let text = Queue::open(7).unwrap_err().to_string();
        assert!(
            text.contains("cuda:7: open the device: CUDA_ERROR_INVALID_DEVICE"),
            "{text}"
        );
        let (near, far) = (up(&queue, &[1f32]), Queue::open(1).unwrap());
        let mut other = on(&far, Dtype::F32, 1);
        let text = kernels::cast(near.part(0..1), other.part_mut(0..1))
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("cuda:1 memory and another in cuda:0"),
            "{text}"
        );
    });
}

#[test]
fn a_failed_launch_is_told_and_names_the_kernel() {
    with_fakes(&[("FAKE_CUDA_FAIL", "cuLaunchKernel:1:719")], || {
        let queue = Queue::open(0).unwrap();
        let mut slab = on(&queue, Dtype::F32, 10);
        let text = kernels::fill(slab.part_mut(0..10), 1.0)
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("launch 'fill_4'") && text.contains("719"),
            "{text}"
        );
        assert!(text.contains("last checkpoint"), "{text}");
    });
}

#[test]
fn rounding_by_chance_and_scaled_blocks_have_the_bits_of_the_host() {
    with_fakes(&[], || {
        let queue = Queue::open(0).unwrap();
        let sizes = [9000usize, 1, 300];
        let values: Vec<Vec<f32>> = sizes.iter().map(|numel| ramp(*numel)).collect();
        let there: Vec<Slab> = values.iter().map(|x| up(&queue, x)).collect();
        let mut host: Vec<Vec<bf16>> = sizes.iter().map(|numel| vec![bf16::ZERO; *numel]).collect();
        let mut small: Vec<Slab> = sizes
            .iter()
            .map(|numel| on(&queue, Dtype::BF16, *numel))
            .collect();
        let pairs = values.iter().zip(&mut host);
        let pairs = pairs.map(|(from, into)| (Span::of(&from[..]), SpanMut::of(&mut into[..])));
        kernels::cast_stochastic(pairs.collect(), 0.7, 99).unwrap();
        let before = fakes::calls("cuLaunchKernel");
        let pairs = there.iter().zip(&mut small).zip(sizes);
        let pairs =
            pairs.map(|((from, into), numel)| (from.part(0..numel), into.part_mut(0..numel)));
        kernels::cast_stochastic(pairs.collect(), 0.7, 99).unwrap();
        assert_eq!(fakes::calls("cuLaunchKernel") - before, 1);
        for (host, small) in host.iter().zip(&small) {
            assert_eq!(down::<bf16>(small), *host);
        }

        let (numel, blocks) = (9000, 9000usize.div_ceil(128));
        let (mut codes, mut scales) = (vec![kernels::F8E4M3(0); numel], vec![0f32; blocks]);
        kernels::quantize(
            Span::of(&values[0]),
            SpanMut::of(&mut codes),
            SpanMut::of(&mut scales),
        )
        .unwrap();
        let (mut f8, mut f32s) = (
            on(&queue, Dtype::F8E4M3, numel),
            on(&queue, Dtype::F32, blocks),
        );
        kernels::quantize(
            there[0].part(0..numel),
            f8.part_mut(0..numel),
            f32s.part_mut(0..blocks),
        )
        .unwrap();
        assert_eq!(down::<kernels::F8E4M3>(&f8), codes);
        assert_eq!(down::<f32>(&f32s), scales);
        let (mut back, mut wide) = (vec![0f32; numel], on(&queue, Dtype::F32, numel));
        kernels::dequantize(Span::of(&codes), Span::of(&scales), SpanMut::of(&mut back)).unwrap();
        kernels::dequantize(
            f8.part(0..numel),
            f32s.part(0..blocks),
            wide.part_mut(0..numel),
        )
        .unwrap();
        assert_eq!(down::<f32>(&wide), back);
        let apart = kernels::quantize(
            there[0].part(0..numel),
            f8.part_mut(0..numel),
            SpanMut::of(&mut scales),
        );
        assert!(apart.unwrap_err().to_string().contains("memory"));
    });
}

/// Goal: tables that the driver has not read yet are not overwritten. Method: so many, on a slow device, that the pinned memory
/// through which they go comes round several times; no host ever settles in between.
#[test]
fn tables_of_many_launches_do_not_run_into_one_another() {
    with_fakes(&[("FAKE_CUDA_DELAY_US", "20")], || {
        let queue = Queue::open(0).unwrap();
        let (pieces, launches) = (600, 120); // 19 kB a table, more than two megabytes of tables
        let mut slabs: Vec<Slab> = (0..2).map(|_| on(&queue, Dtype::F32, pieces)).collect();
        for launch in 0..launches {
            kernels::batch(|| {
                (0..pieces).try_for_each(|piece| {
                    let slab = &mut slabs[launch % 2];
                    kernels::fill(slab.part_mut(piece..piece + 1), 7.0)?;
                    Ok::<_, kernels::KernelError>(())
                })
            })
            .unwrap();
            let slab = &mut slabs[(launch + 1) % 2];
            kernels::scale(slab.part_mut(0..pieces), 2.0).unwrap();
        }
        assert_eq!(down::<f32>(&slabs[1]), vec![7.0; pieces]);
        assert_eq!(down::<f32>(&slabs[0]), vec![14.0; pieces]);
    });
}
