//! Training on devices, by the facade's own words. Method: ranks as threads with a device each, over the stand-ins; the same
//! training on processors and on devices, compared by bits, for a model whose memory is the host's and for one whose memory
//! is the device's; and what a step asks of the driver, counted.

use std::{
    any::Any,
    path::Path,
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use fabric::{
    Clip, Fabric, FabricModule, FabricOptimizer, Result, State,
    engine::{
        Result as EngineResult,
        buffer::{Buffer, Slab},
        comm::ReduceOp,
        shard::plan::Options,
    },
    model::{Backward, Events, Model, ParamId, ParamMeta},
    optim::{AdamW, Lion, Optimizer, Sgd},
    vec::{Chain, Dense, Link, VecModel},
};
use fabric_kernels::{self as kernels, Device, Dtype, Element, Span, SpanMut};
use gpu_suite::{fakes, stage::with_fakes};
use half::{bf16, f16};

const STRATEGIES: [&str; 4] = ["ddp", "zero1", "zero2", "fsdp"];
const WIDTH: usize = 8;
const BLOCKS: usize = 3;

fn fabric(accelerator: &str, strategy: &str, precision: &str, devices: usize) -> Fabric {
    Fabric::builder()
        .accelerator(accelerator)
        .devices(devices)
        .strategy(strategy)
        .precision(precision)
        .state_dict_type("full")
        .buckets(Options {
            bucket_bytes: 700,
            first_bucket_bytes: 200,
            ..Options::default()
        })
        .build()
        .unwrap()
}

fn values(size: usize, salt: usize) -> Vec<f32> {
    let value = |index: usize| ((index * 31 + salt * 17) % 97) as f32 / 97.0 - 0.5;
    (0..size).map(value).collect()
}

/// What a model holds in the end, as its checkpoint says: the same under every strategy.
fn saved(path: &Path) -> Vec<(String, Vec<u8>)> {
    let bytes = std::fs::read(path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let mut found = Vec::new();
    for (name, tensor) in text.as_object().unwrap() {
        let Some(offsets) = tensor.get("data_offsets") else {
            continue;
        };
        let at = |end: usize| 8 + header + offsets[end].as_u64().unwrap() as usize;
        found.push((name.clone(), bytes[at(0)..at(1)].to_vec()));
    }
    assert!(found.len() >= 2 * BLOCKS);
    found
}

/// Blocks over plain vectors, sharded by block where the strategy does; gradients accumulate over two micro-batches.
fn train_vectors<O: Optimizer>(
    fabric: Fabric,
    optimizer: impl Fn() -> O + Sync,
) -> Vec<(String, Vec<u8>)> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let names = || (0..BLOCKS).map(|block| format!("block.{block}"));
    fabric
        .launch_threads(|fabric| {
            let [weight, bias] = Dense::new(WIDTH).sizes();
            let params = names().enumerate().flat_map(|(block, name)| {
                [
                    (format!("{name}.weight"), values(weight, block)),
                    (format!("{name}.bias"), values(bias, 50 + block)),
                ]
            });
            let model = VecModel::new(params).in_units(names())?;
            let (model, mut optimizer) = fabric.setup(model, optimizer())?;
            let links = names().map(|name| Link::new(&model, &name, Dense::new(WIDTH)));
            let chain = Chain::new(links.collect::<Result<_, _>>()?);
            for step in 0..6 {
                fabric.no_backward_sync(&model, step % 3 == 0, || {
                    let input = values(WIDTH, 7 * step + fabric.global_rank());
                    let pass = chain.forward(&model, input)?;
                    let grad = pass.output().iter().map(|y| y - 0.25).collect();
                    fabric.backward(pass.loss(grad))
                })?;
                if step % 3 != 0 {
                    optimizer.step()?;
                    optimizer.zero_grad();
                }
            }
            let state = State::new()
                .model("model", &model)
                .optimizer("optimizer", &mut optimizer);
            fabric.save(&path, state)
        })
        .unwrap();
    saved(&path)
}

#[test]
fn vectors_of_the_host_train_on_devices_to_the_bits_of_processors() {
    with_fakes(&[], || {
        for strategy in STRATEGIES {
            let train = |accelerator: &str| {
                let fabric = fabric(accelerator, strategy, "32-true", 2);
                train_vectors(fabric, || AdamW::new(0.05))
            };
            assert_eq!(train("cpu"), train("cuda"), "{strategy}");
        }
        let train = |accelerator: &str| {
            train_vectors(fabric(accelerator, "ddp", "32-true", 2), || Lion::new(0.01))
        };
        assert_eq!(train("cpu"), train("cuda"));
        let alone = |accelerator: &str| {
            train_vectors(fabric(accelerator, "auto", "32-true", 1), || {
                AdamW::new(0.05)
            })
        };
        assert_eq!(alone("cpu"), alone("cuda"));
    });
}

/// A model in the memory of its rank's device, as a tensor library's would be: parameters, and gradients that are made there.
struct Cards {
    metas: Vec<ParamMeta>,
    params: Vec<Mutex<Option<Slab>>>,
    device: Arc<dyn Device>,
    events: OnceLock<Arc<dyn Events>>,
}

impl Cards {
    fn new(fabric: &Fabric, sizes: &[usize], dtype: Dtype) -> Self {
        let device = fabric.queue().expect("a device");
        let meta =
            |(index, size): (usize, &usize)| ParamMeta::new(format!("p{index}"), &[*size], dtype);
        let metas: Vec<_> = sizes.iter().enumerate().map(meta).collect();
        let param = |(index, size): (usize, &usize)| {
            Mutex::new(Some(up(&device, dtype, &values(*size, index))))
        };
        Self {
            params: sizes.iter().enumerate().map(param).collect(),
            metas,
            device,
            events: OnceLock::new(),
        }
    }

    fn read(&self, param: usize) -> Vec<f32> {
        down(
            self.params[param]
                .lock()
                .unwrap()
                .as_ref()
                .expect("its memory is here"),
        )
    }
}

fn up(device: &Arc<dyn Device>, dtype: Dtype, values: &[f32]) -> Slab {
    let mut slab = Slab::zeroed_on(Some(device), dtype, values.len()).unwrap();
    kernels::cast(Span::of(values), slab.part_mut(0..values.len())).unwrap();
    slab
}

fn down(slab: &Slab) -> Vec<f32> {
    let mut values = vec![0f32; slab.numel()];
    kernels::cast(slab.part(0..slab.numel()), SpanMut::of(&mut values)).unwrap();
    values
}

impl Model for Cards {
    fn params(&self) -> &[ParamMeta] {
        &self.metas
    }
    fn with(
        &self,
        param: ParamId,
        f: &mut dyn FnMut(&mut dyn Buffer) -> EngineResult<()>,
    ) -> EngineResult<()> {
        f(self.params[param.0]
            .lock()
            .unwrap()
            .as_mut()
            .expect("its memory is here"))
    }
    fn release(&self, param: ParamId) -> EngineResult<()> {
        *self.params[param.0].lock().unwrap() = None;
        Ok(())
    }
    fn acquire(&self, param: ParamId) -> EngineResult<()> {
        let (dtype, numel) = (self.metas[param.0].dtype, self.metas[param.0].numel());
        let mut slot = self.params[param.0].lock().unwrap();
        if slot.is_none() {
            *slot = Some(Slab::zeroed_on(Some(&self.device), dtype, numel)?);
        }
        Ok(())
    }
    fn attach(&self, events: Arc<dyn Events>) {
        assert!(self.events.set(events).is_ok());
    }
}

/// A gradient in device memory that its library shares.
struct Shared(Arc<Slab>);

impl Buffer for Shared {
    fn dtype(&self) -> Dtype {
        self.0.dtype()
    }
    fn numel(&self) -> usize {
        self.0.numel()
    }
    fn span(&self) -> Option<Span<'_>> {
        self.0.span()
    }
    fn hold(&self) -> Option<Box<dyn Any + Send>> {
        Some(Box::new(self.0.clone()))
    }
}

/// A loss whose gradients are there: handed over last parameter first, and dropped at once.
struct Loss<'a> {
    model: &'a Cards,
    grads: Vec<Option<Slab>>,
}

impl Backward for Loss<'_> {
    fn backward(self, scale: f32) -> EngineResult<()> {
        let events = self.model.events.get().expect("it was set up");
        for (index, grad) in self.grads.into_iter().enumerate().rev() {
            let Some(mut grad) = grad else { continue };
            if scale != 1.0 {
                let all = 0..grad.numel();
                kernels::scale(grad.part_mut(all), f64::from(scale))?;
            }
            events.ready(ParamId(index), &Shared(Arc::new(grad)))?;
        }
        Ok(())
    }
}

fn step<O: Optimizer>(
    fabric: &Fabric,
    model: &FabricModule<Cards>,
    optimizer: &mut FabricOptimizer<O>,
    number: usize,
    clip: Option<Clip>,
) -> Result<()> {
    let grads = model.params().iter().enumerate();
    let grads = grads.map(|(index, meta)| {
        let values = values(meta.numel(), 3 * index + 11 * number + fabric.global_rank());
        Some(up(&model.device, meta.dtype, &values))
    });
    let grads = grads.collect();
    fabric.backward(Loss { model, grads })?;
    if let Some(clip) = clip {
        fabric.clip_gradients(model, clip)?;
    }
    optimizer.step()?;
    optimizer.zero_grad();
    Ok(())
}

/// A training: the strategy, the precision, and what is clipped.
#[derive(Clone, Copy)]
struct Case {
    strategy: &'static str,
    precision: &'static str,
    clip: Option<Clip>,
}

/// Vectors in another type.
fn cast<T: Element>(values: &[f32]) -> Vec<T> {
    let mut into = vec![T::zeroed(); values.len()];
    kernels::cast(Span::of(values), SpanMut::of(&mut into)).unwrap();
    into
}

/// Four steps in the memory of the host: the parameters, as f32.
fn on_processors<T: Element, O: Optimizer>(
    case: Case,
    optimizer: impl Fn() -> O + Sync,
) -> Vec<Vec<f32>> {
    let ranks = fabric("cpu", case.strategy, case.precision, 2).launch_threads(|fabric| {
        let params = SIZES.iter().enumerate();
        let params =
            params.map(|(index, size)| (format!("p{index}"), cast::<T>(&values(*size, index))));
        let (model, mut optimizer) = fabric.setup(VecModel::new(params), optimizer())?;
        for number in 0..4 {
            let grads = SIZES.iter().enumerate().map(|(index, size)| {
                let salt = 3 * index + 11 * number + fabric.global_rank();
                Some(cast::<T>(&values(*size, salt)))
            });
            fabric.backward(model.gradients(grads.collect()))?;
            if let Some(clip) = case.clip {
                fabric.clip_gradients(&model, clip)?;
            }
            optimizer.step()?;
            optimizer.zero_grad();
        }
        let read = |param| {
            let values = model.read(&format!("p{param}"));
            let mut wide = vec![0f32; values.len()];
            kernels::cast(Span::of(&values), SpanMut::of(&mut wide)).unwrap();
            wide
        };
        Ok((0..SIZES.len()).map(read).collect())
    });
    ranks.unwrap().remove(0)
}

/// The same in the memory of devices.
fn on_devices<T: Element, O: Optimizer>(
    case: Case,
    optimizer: impl Fn() -> O + Sync,
) -> Vec<Vec<f32>> {
    let ranks = fabric("cuda", case.strategy, case.precision, 2).launch_threads(|fabric| {
        let (model, mut optimizer) =
            fabric.setup(Cards::new(fabric, &SIZES, T::DTYPE), optimizer())?;
        for number in 0..4 {
            step(fabric, &model, &mut optimizer, number, case.clip)?;
        }
        Ok((0..SIZES.len())
            .map(|param| model.read(param))
            .collect::<Vec<_>>())
    });
    let ranks = ranks.unwrap();
    assert_eq!(ranks[0], ranks[1]);
    ranks.into_iter().next().unwrap()
}

const SIZES: [usize; 6] = [7, 640, 1, 33, 1000, 64];

#[test]
fn a_model_in_device_memory_trains_to_the_bits_of_processors() {
    with_fakes(&[], || {
        let adam = || AdamW::new(0.05);
        let sgd = || Sgd::new(0.1).momentum(0.9);
        for strategy in ["ddp", "zero1", "zero2"] {
            let case = Case {
                strategy,
                precision: "32-true",
                clip: None,
            };
            assert_eq!(
                on_devices::<f32, _>(case, adam),
                on_processors::<f32, _>(case, adam),
                "{strategy}"
            );
            assert_eq!(
                on_devices::<f32, _>(case, sgd),
                on_processors::<f32, _>(case, sgd),
                "{strategy}"
            );
            let case = Case {
                clip: Some(Clip::Value(0.1)),
                ..case
            };
            assert_eq!(
                on_devices::<f32, _>(case, adam),
                on_processors::<f32, _>(case, adam),
                "{strategy}"
            );
            // The model computes in bf16, beside f32 values that are updated.
            let case = Case {
                strategy,
                precision: "bf16-mixed",
                clip: None,
            };
            assert_eq!(
                on_devices::<bf16, _>(case, adam),
                on_processors::<bf16, _>(case, adam),
                "{strategy}"
            );
            // A norm is a sum in another order.
            let case = Case {
                strategy,
                precision: "32-true",
                clip: Some(Clip::norm(1.0)),
            };
            let (device, host) = (
                on_devices::<f32, _>(case, adam),
                on_processors::<f32, _>(case, adam),
            );
            for (x, y) in device.iter().flatten().zip(host.iter().flatten()) {
                assert!(
                    (x - y).abs() <= 1e-6 * y.abs().max(1.0),
                    "{strategy}: {x} and {y}"
                );
            }
        }
    });
}

/// What one step asks of the driver, on both ranks together, once all is warm: launches, and waits for the device.
fn cost(strategy: &'static str, sizes: &[usize]) -> (u64, u64) {
    let found = Fabric::builder()
        .accelerator("cuda")
        .devices(2)
        .strategy(strategy)
        .build()
        .unwrap()
        .launch_threads(|fabric| {
            let (model, mut optimizer) =
                fabric.setup(Cards::new(fabric, sizes, Dtype::F32), AdamW::new(0.05))?;
            for number in 0..2 {
                step(fabric, &model, &mut optimizer, number, None)?;
            }
            let waits = || {
                let calls = [
                    "cuStreamSynchronize",
                    "cuEventSynchronize",
                    "cuCtxSynchronize",
                ];
                calls.iter().map(|call| fakes::calls(call)).sum::<u64>()
            };
            let grads = model
                .params()
                .iter()
                .map(|meta| Some(up(&model.device, meta.dtype, &values(meta.numel(), 1))));
            let grads = grads.collect();
            model.device.settle().unwrap();
            fabric.barrier()?;
            let before = (fakes::calls("cuLaunchKernel"), waits());
            fabric.barrier()?;
            fabric.backward(Loss {
                model: &model,
                grads,
            })?;
            optimizer.step()?;
            optimizer.zero_grad();
            fabric.barrier()?;
            let after = (fakes::calls("cuLaunchKernel"), waits());
            fabric.barrier()?;
            Ok((after.0 - before.0, after.1 - before.1))
        })
        .unwrap();
    assert_eq!(found[0], found[1]);
    found[0]
}

#[test]
fn a_step_has_as_many_launches_for_many_tensors_as_for_few_and_waits_for_nothing() {
    with_fakes(&[], || {
        for strategy in ["ddp", "zero1", "zero2"] {
            // Both end in padding, where slices are even: one launch more.
            let few = cost(strategy, &[3000, 500, 1]);
            let many: Vec<usize> = (0..150).map(|index| index % 40 + 1).collect();
            let many = cost(strategy, &many);
            assert_eq!(
                (few.1, many.1),
                (0, 0),
                "{strategy}: the host waited for a device"
            );
            assert_eq!(few.0, many.0, "{strategy}: launches of two ranks");
            println!("{strategy}: {} launches a step and rank", many.0 / 2);
        }
    });
}

#[test]
fn a_job_on_devices_goes_on_from_its_checkpoint_on_processors_and_back() {
    with_fakes(&[], || {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("last");
        let run = |accelerator: &str,
                   strategy: &str,
                   range: std::ops::Range<usize>,
                   load: bool,
                   save: bool| {
            let ranks = fabric(accelerator, strategy, "32-true", 2).launch_threads(|fabric| {
                let params = SIZES.iter().enumerate();
                let params =
                    params.map(|(index, size)| (format!("p{index}"), values(*size, index)));
                let (model, mut optimizer) =
                    fabric.setup(VecModel::new(params), AdamW::new(0.05))?;
                if load {
                    fabric.load(
                        &path,
                        State::new()
                            .model("model", &model)
                            .optimizer("optimizer", &mut optimizer),
                    )?;
                }
                for number in range.clone() {
                    let grads = SIZES.iter().enumerate();
                    let grads = grads.map(|(index, size)| {
                        Some(values(
                            *size,
                            3 * index + 11 * number + fabric.global_rank(),
                        ))
                    });
                    fabric.backward(model.gradients(grads.collect()))?;
                    optimizer.step()?;
                    optimizer.zero_grad();
                }
                if save {
                    fabric.save(
                        &path,
                        State::new()
                            .model("model", &model)
                            .optimizer("optimizer", &mut optimizer),
                    )?;
                }
                Ok((0..SIZES.len())
                    .map(|param| model.read(&format!("p{param}")))
                    .collect::<Vec<_>>())
            });
            ranks.unwrap().remove(0)
        };
        let whole = run("cpu", "ddp", 0..6, false, false);
        run("cuda", "zero1", 0..2, false, true);
        run("cpu", "zero2", 2..4, true, true);
        assert_eq!(run("cuda", "ddp", 4..6, true, false), whole);
    });
}

#[test]
fn accelerators_are_found_chosen_and_refused_in_words() {
    with_fakes(&[("FAKE_CUDA_DEVICES", "2")], || {
        let build = |devices: &str| {
            Fabric::builder()
                .accelerator("cuda")
                .devices(devices)
                .build()
        };
        let auto = Fabric::builder().build().unwrap();
        assert_eq!(auto.device().to_string(), "cuda:0", "auto prefers a GPU");
        assert_eq!(auto.ranks(), 2, "and takes all of them");
        assert_eq!(build("1,").unwrap().device().to_string(), "cuda:1");
        assert_eq!(build("-1").unwrap().ranks(), 2);
        let error = build("3").err().unwrap().to_string();
        assert!(
            error.contains("3 devices of 'cuda' were asked for, and there are 2"),
            "{error}"
        );
        let error = build("0,2").err().unwrap().to_string();
        assert!(error.contains("device 2 of 'cuda'"), "{error}");
    });
}

#[test]
fn no_device_is_an_error_that_says_so_and_processors_still_work() {
    with_fakes(&[("FAKE_CUDA_DEVICES", "0")], || {
        let error = Fabric::builder()
            .accelerator("cuda")
            .build()
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("CUDA_ERROR_NO_DEVICE"), "{error}");
        let fabric = Fabric::builder().build().unwrap();
        assert_eq!(fabric.device().to_string(), "cpu");
    });
}

#[test]
fn without_nccl_several_devices_are_an_error_on_all_ranks_and_one_device_works() {
    with_fakes(&[("FABRIC_NCCL", "/nowhere/libnccl.so.2")], || {
        let alone = fabric("cuda", "auto", "32-true", 1);
        alone
            .launch_threads(|fabric| {
                assert!(fabric.queue().is_some());
                Ok(())
            })
            .unwrap();
        let error = fabric("cuda", "ddp", "32-true", 2)
            .launch_threads(|_| Ok(()))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nowhere/libnccl.so.2"), "{error}");
    });
}

/// What a model may have that is not usual: parameters without elements, frozen ones, some that are not used on all ranks or
/// by nobody, and gradients that are not finite.
const ODD: [usize; 7] = [7, 640, 0, 33, 1000, 64, 5];
const FROZEN: usize = 3;

fn odd_grad(param: usize, step: usize, micro: usize, rank: usize) -> Option<Vec<f32>> {
    let is_unused = match param {
        FROZEN => true,
        4 => step == 2 && rank % 2 == 1, // some rank's only
        5 => step == 1,                  // nobody's
        6 => micro == 0,                 // of the second micro-batch alone
        _ => false,
    };
    let mut grad = values(ODD[param], 3 * param + 11 * step + 5 * micro + rank);
    if (param, step, micro, rank) == (1, 3, 1, 0) {
        grad[17] = f32::INFINITY;
    }
    (!is_unused).then_some(grad)
}

/// Five steps of two micro-batches each, then checkpoints of both forms; what rank 0 finds in the full one, the parameters
/// on all ranks, and which steps were skipped.
type Odd = (Vec<(String, Vec<u8>)>, Vec<Vec<u8>>, Vec<bool>);

/// Run a micro-batch, the first of two or the last.
type Accumulate<'a> = dyn Fn(bool, &dyn Fn() -> Result<()>) -> Result<()> + 'a;

fn odd<T: Element>(accelerator: &str, strategy: &str, precision: &str, ranks: usize) -> Vec<Odd> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let names = (0..ODD.len()).map(|param| format!("p{param}"));
    let names: Vec<_> = names.collect();
    let fabric = fabric(accelerator, strategy, precision, ranks);
    let is_scaled = precision == "16-mixed";
    let loop_over = |fabric: &Fabric,
                     backward: &dyn Fn(Vec<Option<Vec<f32>>>) -> Result<()>,
                     sync: &Accumulate<'_>,
                     update: &mut dyn FnMut() -> Result<bool>|
     -> Result<Vec<bool>> {
        let mut skipped = Vec::new();
        for step in 0..5 {
            for micro in 0..2 {
                let rank = fabric.global_rank();
                let grads = (0..ODD.len()).map(|param| {
                    let mut grad = odd_grad(param, step, micro, rank)?;
                    if !is_scaled {
                        grad.iter_mut().for_each(|x| *x = x.min(1.0));
                    }
                    Some(grad)
                });
                let grads: Vec<_> = grads.collect();
                sync(micro == 0, &|| backward(grads.clone()))?;
            }
            skipped.push(update()?);
        }
        Ok(skipped)
    };
    let optimizer = || AdamW::new(0.05);
    let result = fabric.launch_threads(|fabric| {
        let wide = |values: Vec<f32>| bytes_of(&values);
        if accelerator == "cpu" {
            let params = names.iter().enumerate();
            let params =
                params.map(|(index, name)| (name.clone(), cast::<T>(&values(ODD[index], index))));
            let model = VecModel::new(params).freeze(&names[FROZEN]);
            let (model, mut optimizer) = fabric.setup(model, optimizer())?;
            let skipped = loop_over(
                fabric,
                &|grads| {
                    let grads = grads.into_iter().map(|grad| grad.map(|x| cast::<T>(&x)));
                    fabric.backward(model.gradients(grads.collect()))
                },
                &|first, body| fabric.no_backward_sync(&model, first, body),
                &mut || {
                    optimizer.step()?;
                    optimizer.zero_grad();
                    Ok(optimizer.was_skipped())
                },
            )?;
            let state = State::new().model("model", &model);
            fabric.save(&path, state.optimizer("optimizer", &mut optimizer))?;
            let read = |name: &String| {
                let values = model.read(name);
                let mut into = vec![0f32; values.len()];
                kernels::cast(Span::of(&values), SpanMut::of(&mut into)).unwrap();
                wide(into)
            };
            return Ok((saved(&path), names.iter().map(read).collect(), skipped));
        }
        let mut model = Cards::new(fabric, &ODD, T::DTYPE);
        model.metas[FROZEN].trainable = false;
        let (model, mut optimizer) = fabric.setup(model, optimizer())?;
        let skipped = loop_over(
            fabric,
            &|grads| {
                let there = |grad: Vec<f32>| up(&model.device, T::DTYPE, &grad);
                let grads = grads.into_iter().map(|grad| grad.map(there)).collect();
                fabric.backward(Loss {
                    model: &model,
                    grads,
                })
            },
            &|first, body| fabric.no_backward_sync(&model, first, body),
            &mut || {
                optimizer.step()?;
                optimizer.zero_grad();
                Ok(optimizer.was_skipped())
            },
        )?;
        let state = State::new().model("model", &model);
        fabric.save(&path, state.optimizer("optimizer", &mut optimizer))?;
        let read = |param| wide(model.read(param));
        Ok((saved(&path), (0..ODD.len()).map(read).collect(), skipped))
    });
    result.unwrap()
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_ne_bytes()).collect()
}

#[test]
fn odd_models_train_and_are_saved_under_every_strategy_and_precision_as_on_processors() {
    with_fakes(&[("FAKE_CUDA_DEVICES", "4")], || {
        let live = || (0..4).map(fakes::live).sum::<u64>();
        let before = live();
        for (strategy, ranks) in [("ddp", 2), ("zero1", 2), ("zero2", 2), ("hsdp", 4)] {
            let same = |precision: &str, cpu: Vec<Odd>, cuda: Vec<Odd>| {
                for (cpu, cuda) in cpu.iter().zip(&cuda) {
                    assert_eq!(cpu.2, cuda.2, "{strategy} {precision}: skipped");
                    for (a, b) in cpu.0.iter().zip(&cuda.0) {
                        assert_eq!(a, b, "{strategy} {precision}: saved");
                    }
                    assert_eq!(cpu.1, cuda.1, "{strategy} {precision}: held");
                }
            };
            let both = |precision: &str| {
                let run = |accelerator| odd::<f32>(accelerator, strategy, precision, ranks);
                same(precision, run("cpu"), run("cuda"));
            };
            both("32-true");
            let run = |accelerator| odd::<f16>(accelerator, strategy, "16-mixed", ranks);
            let (cpu, cuda) = (run("cpu"), run("cuda"));
            assert!(cpu[0].2[3], "the fourth step overflows: {:?}", cpu[0].2);
            same("16-mixed", cpu, cuda);
            let run = |accelerator| odd::<f64>(accelerator, strategy, "64-true", ranks);
            same("64-true", run("cpu"), run("cuda"));
            let run = |accelerator| odd::<bf16>(accelerator, strategy, "bf16-true", ranks);
            same("bf16-true", run("cpu"), run("cuda"));
            // Streams that nobody has any more free the last of it when they come to it.
            let begun = Instant::now();
            while live() > before {
                let late = begun.elapsed() > Duration::from_secs(10);
                assert!(!late, "{strategy}: {} allocations stay", live());
                std::thread::yield_now();
            }
        }
    });
}

#[test]
fn a_job_whose_last_operation_fails_has_failed_although_nobody_waited_for_it() {
    with_fakes(&[("FAKE_NCCL_HANG", "1:1")], || {
        let fabric = Fabric::builder().accelerator("cuda").devices(2);
        let fabric = fabric.strategy("ddp").timeout(Duration::from_millis(300));
        let result = fabric.build().unwrap().launch_threads(|fabric| {
            let mut slab = up(&fabric.queue().unwrap(), Dtype::F32, &[1.0; 10]);
            fabric.all_reduce(&mut slab, ReduceOp::Sum)
        });
        let text = result.expect_err("rank 1 never came").to_string();
        assert!(text.contains("all_reduce(sum, 10 x f32)"), "{text}");
    });
}
