//! Queues where something goes wrong, or somebody else is at work: threads, panics, refusals of the driver, queues beside
//! one another. Method: each way in which an order could be lost, or an error, is gone, and what the memory holds is compared.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Barrier},
};

use fabric_engine::buffer::Slab;
use fabric_kernels::{
    self as kernels, Device, Dtype, Element, KernelError, Span, SpanMut, cuda::Queue,
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

/// Slow devices: what is out of order shows.
const SLOW: (&str, &str) = ("FAKE_CUDA_DELAY_US", "1000");

#[test]
fn what_no_kernel_does_is_refused_and_not_a_panic() {
    with_fakes(&[], || {
        let queue = Queue::open(0).unwrap();
        let whole = up(&queue, &[1i64, -2, 3]);
        let mut into = on(&queue, Dtype::I64, 3);
        let refused = kernels::cast_scaled(whole.part(0..3), into.part_mut(0..3), 2.0);
        let text = refused.unwrap_err().to_string();
        assert!(
            text.contains("cast_scaled") && text.contains("i64"),
            "{text}"
        );
        kernels::cast_scaled(whole.part(0..3), into.part_mut(0..3), 1.0).unwrap();
        assert_eq!(down::<i64>(&into), [1, -2, 3]);
        let from = up(&queue, &[bf16::ONE; 3]);
        let mut into = on(&queue, Dtype::F16, 3);
        let pairs = vec![(from.part(0..3), into.part_mut(0..3))];
        let refused = kernels::cast_stochastic(pairs, 1.0, 7);
        assert!(refused.is_err_and(|error| error.to_string().contains("bf16")));
        assert_eq!(down::<f16>(&into), [f16::ZERO; 3]);
    });
}

#[test]
fn work_of_one_queue_on_anothers_memory_comes_before_what_the_other_does_later() {
    with_fakes(&[SLOW], || {
        let (home, guest) = (Queue::open(0).unwrap(), Queue::open(0).unwrap());
        for _ in 0..10 {
            let mut at_home = up(&home, &[1f32; 5000]);
            let mut abroad = on(&guest, Dtype::F32, 5000);
            kernels::batch(|| {
                // The guest reads what the home's queue overwrites afterwards, both put off.
                kernels::cast(at_home.part(0..5000), abroad.part_mut(0..5000))?;
                kernels::fill(at_home.part_mut(0..5000), 9.0)
            })
            .unwrap();
            assert!(down::<f32>(&abroad).iter().all(|x| *x == 1.0));
            assert!(down::<f32>(&at_home).iter().all(|x| *x == 9.0));
        }
    });
}

#[test]
fn memory_that_another_queue_is_still_to_read_is_freed_after_it() {
    with_fakes(&[SLOW], || {
        let (home, guest) = (Queue::open(0).unwrap(), Queue::open(0).unwrap());
        let mut abroad = on(&guest, Dtype::F32, 5000);
        // Dropped within the batch.
        let at_home = up(&home, &[3f32; 5000]);
        kernels::batch(|| {
            kernels::cast(at_home.part(0..5000), abroad.part_mut(0..5000))?;
            drop(at_home);
            Ok::<_, KernelError>(())
        })
        .unwrap();
        assert!(down::<f32>(&abroad).iter().all(|x| *x == 3.0));
        // Kept by a hold, whose queue is given something else meanwhile.
        let at_home = Arc::new(up(&home, &[4f32; 5000]));
        let hold: Box<dyn Any + Send> = Box::new(at_home.clone());
        kernels::put_off(hold, || {
            kernels::cast(at_home.part(0..5000), abroad.part_mut(0..5000))
        })
        .unwrap();
        drop(at_home);
        home.moment().unwrap();
        assert!(down::<f32>(&abroad).iter().all(|x| *x == 4.0));
    });
}

#[test]
fn a_queue_that_others_flush_is_in_order_for_its_own_thread() {
    with_fakes(&[("FAKE_CUDA_DELAY_US", "20")], || {
        let queue = Queue::open(0).unwrap();
        for turn in 0..40 {
            let mut slab = on(&queue, Dtype::F32, 64);
            let others: Vec<_> = (0..30).map(|_| on(&queue, Dtype::U8, 1)).collect();
            let begin = Barrier::new(2);
            std::thread::scope(|scope| {
                // Whoever frees memory gives the driver what waits.
                scope.spawn(|| {
                    begin.wait();
                    drop(others);
                });
                begin.wait();
                kernels::batch(|| {
                    for at in 0..64 {
                        kernels::fill(slab.part_mut(at..at + 1), (turn * 64 + at) as f64)?;
                    }
                    Ok::<_, KernelError>(())
                })
                .unwrap();
                let expected: Vec<f32> = (0..64).map(|at| (turn * 64 + at) as f32).collect();
                assert_eq!(down::<f32>(&slab), expected, "turn {turn}");
            });
        }
    });
}

#[test]
fn a_panic_ends_a_batch_and_nothing_of_it_waits_or_is_freed_too_early() {
    with_fakes(&[SLOW], || {
        let queue = Queue::open(0).unwrap();
        let mut slab = on(&queue, Dtype::F32, 5000);
        let launches = fakes::calls("cuLaunchKernel");
        let result = catch_unwind(AssertUnwindSafe(|| {
            kernels::batch(|| {
                kernels::fill(slab.part_mut(0..5000), 2.0)?;
                panic!("halfway");
                #[expect(unreachable_code)]
                Ok::<_, KernelError>(())
            })
        }));
        assert!(result.is_err());
        assert_eq!(fakes::calls("cuLaunchKernel"), launches + 1);
        // What a library holds is held through the panic.
        let grad = Arc::new(up(&queue, &[5f32; 5000]));
        let result = catch_unwind(AssertUnwindSafe(|| {
            let mine = grad.clone();
            kernels::put_off(Box::new(grad.clone()), || {
                kernels::cast(mine.part(0..5000), slab.part_mut(0..5000))?;
                panic!("after the work");
                #[expect(unreachable_code)]
                Ok::<_, KernelError>(())
            })
        }));
        assert!(result.is_err());
        drop(grad);
        assert!(down::<f32>(&slab).iter().all(|x| *x == 5.0));
    });
}

#[test]
fn one_queue_that_fails_does_not_keep_a_batch_of_another_waiting() {
    with_fakes(&[("FAKE_CUDA_FAIL", "cuLaunchKernel:1:2")], || {
        let (first, second) = (Queue::open(0).unwrap(), Queue::open(1).unwrap());
        let (mut a, mut b) = (on(&first, Dtype::F32, 8), on(&second, Dtype::F32, 8));
        let before = fakes::calls("cuLaunchKernel");
        let result = kernels::batch(|| {
            kernels::fill(a.part_mut(0..8), 1.0)?;
            kernels::fill(b.part_mut(0..8), 1.0)
        });
        assert!(result.unwrap_err().to_string().contains("launch 'fill_4'"));
        assert_eq!(
            fakes::calls("cuLaunchKernel"),
            before + 2,
            "both were given"
        );
        assert_eq!(down::<f32>(&b), [1.0; 8]);
    });
}

#[test]
fn work_that_was_lost_is_told_by_every_later_call_and_its_memory_is_freed() {
    with_fakes(&[("FAKE_CUDA_FAIL", "cuLaunchKernel:1:2")], || {
        let queue = Queue::open(0).unwrap();
        let before = fakes::live(0);
        let (mut slab, other) = (on(&queue, Dtype::F32, 8), on(&queue, Dtype::F32, 8));
        kernels::put_off(Box::new(()), || kernels::fill(slab.part_mut(0..8), 1.0)).unwrap();
        // Somebody else lets go of memory, which gives the driver what waits: nobody is there to be told.
        std::thread::spawn(move || drop(other)).join().unwrap();
        for _ in 0..2 {
            let text = queue.flush().unwrap_err().to_string();
            assert!(text.contains("launch 'fill_4'"), "{text}");
        }
        let mut values = [0f32; 8];
        let read = kernels::cast(slab.part(0..8), SpanMut::of(&mut values));
        assert!(
            read.is_err(),
            "what was not computed is not read: {values:?}"
        );
        drop(slab);
        let again = Queue::open(0).unwrap();
        again.settle().unwrap();
        let streams = fakes::calls("cuStreamSynchronize");
        assert!(streams > 0);
        while fakes::live(0) > before {
            std::thread::yield_now(); // the other stream frees when it comes to it
        }
    });
}

#[test]
fn machine_code_that_a_driver_refuses_is_compiled_anew() {
    let settings = [
        ("FAKE_CUDA_CAPABILITY", "90"),
        ("FAKE_CUDA_FAIL", "cuModuleLoadData:1:209"),
    ];
    with_fakes(&settings, || {
        let queue = Queue::open(0).unwrap();
        let values = [1f32, -2.0, 0.5];
        let from = up(&queue, &values);
        let (mut small, mut scales) = (on(&queue, Dtype::F8E4M3, 3), on(&queue, Dtype::F32, 1));
        kernels::quantize(from.part(0..3), small.part_mut(0..3), scales.part_mut(0..1)).unwrap();
        assert_eq!(fakes::calls("cuModuleLoadData"), 2);
        let mut into = on(&queue, Dtype::F32, 3);
        kernels::dequantize(small.part(0..3), scales.part(0..1), into.part_mut(0..3)).unwrap();
        assert_eq!(down::<f32>(&into), values);
    });
}
