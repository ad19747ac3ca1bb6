//! Trains under an allocator that counts, and fails when anything in a rank's process (the engine's threads, Fabric, the
//! optimizer, this program) allocates after the second step: `steady STRATEGY RANKS PRECISION`. It then says where.
//!
//! The model itself holds still: all its memory was there before, as that of a library with a pool of its own.

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use fabric::{
    Clip, Error, Fabric, FabricModule, Result,
    engine::{
        self,
        buffer::Buffer,
        kernels::{self, Dtype, Element, SpanMut},
        shard::plan::Options,
    },
    model::{Backward, Edge, Events, Model, ParamId, ParamMeta, UnitId},
    optim::AdamW,
};
use fabric_tests::Record;

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

const STEPS: usize = 8;
const WARM: usize = 2; // steps in which memory may be made
const BLOCKS: usize = 3;

/// Long enough for two signs of life between every rank and the hub, when FABRIC_SILENCE_S is 5.
const PAUSE: Duration = Duration::from_millis(1100);

/// Blocks in units, and at the root a long vector (more than a window of shared memory, and cut in halves by TCP), and one
/// that only some ranks use.
struct Still<T> {
    params: Vec<ParamMeta>,
    units: Vec<String>,
    slots: Vec<Mutex<Slot<T>>>,
    grads: Vec<Mutex<Vec<T>>>, // apart, because a parameter may be released while its gradient is lent
    events: OnceLock<Arc<dyn Events>>,
}

/// One parameter's memory: in use, or waiting for its next use.
struct Slot<T> {
    here: Option<Vec<T>>,
    spare: Option<Vec<T>>,
}

const SOME: ParamId = ParamId(1);

impl<T: Element> Still<T> {
    fn new() -> Self {
        let mut params = vec![
            ParamMeta::new("long", &[100_003], T::DTYPE),
            ParamMeta::new("some", &[7], T::DTYPE),
        ];
        for block in 0..BLOCKS {
            let meta = |name: &str, numel: usize| {
                ParamMeta::new(format!("block.{block}.{name}"), &[numel], T::DTYPE)
                    .in_unit(UnitId(block))
            };
            params.extend([meta("weight", 1001), meta("bias", 13)]);
        }
        let slot = |meta: &ParamMeta| {
            let mut values = vec![T::zeroed(); meta.numel()];
            kernels::fill(SpanMut::of(&mut values), 0.5).expect("a float");
            Mutex::new(Slot {
                here: Some(values),
                spare: None,
            })
        };
        let grad = |meta: &ParamMeta| Mutex::new(vec![T::zeroed(); meta.numel()]);
        Self {
            slots: params.iter().map(slot).collect(),
            grads: params.iter().map(grad).collect(),
            units: (0..BLOCKS).map(|block| format!("block.{block}")).collect(),
            params,
            events: OnceLock::new(),
        }
    }

    fn slot(&self, param: ParamId) -> MutexGuard<'_, Slot<T>> {
        lock(&self.slots[param.0])
    }

    /// Report the gradient of `scale` times half the sum of squares: each parameter times `scale`.
    fn differentiate(&self, param: ParamId, scale: f32) -> engine::Result<()> {
        let mut grad = lock(&self.grads[param.0]);
        let refused = |error| engine::Error::library("scale a gradient", error);
        self.with(param, &mut |values| {
            values.read(0..values.numel(), SpanMut::of(&mut grad))?;
            kernels::scale(SpanMut::of(&mut grad), scale.into()).map_err(refused)
        })?;
        let events = self.events.get().expect("a model that was set up");
        events.ready(param, &*grad).map(drop)
    }
}

fn lock<S>(mutex: &Mutex<S>) -> MutexGuard<'_, S> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn absent() -> engine::Error {
    engine::Error::argument("a parameter was used outside its unit", "Enter it first")
}

impl<T: Element> Model for Still<T> {
    fn params(&self) -> &[ParamMeta] {
        &self.params
    }

    fn units(&self) -> &[String] {
        &self.units
    }

    fn with(
        &self,
        param: ParamId,
        f: &mut dyn FnMut(&mut dyn Buffer) -> engine::Result<()>,
    ) -> engine::Result<()> {
        f(self.slot(param).here.as_mut().ok_or_else(absent)?)
    }

    fn release(&self, param: ParamId) -> engine::Result<()> {
        let mut slot = self.slot(param);
        if let Some(values) = slot.here.take() {
            slot.spare = Some(values);
        }
        Ok(())
    }

    fn acquire(&self, param: ParamId) -> engine::Result<()> {
        let mut slot = self.slot(param);
        if let Some(values) = slot.spare.take() {
            slot.here = Some(values);
        }
        Ok(())
    }

    fn attach(&self, events: Arc<dyn Events>) {
        let _ = self.events.set(events); // once
    }
}

/// A backward through all blocks, last first.
struct Pass<'a, T>(&'a Still<T>, usize);

impl<T: Element> Backward for Pass<'_, T> {
    fn backward(self, scale: f32) -> engine::Result<()> {
        let Self(model, rank) = self;
        let events = model.events.get().expect("a model that was set up");
        for block in (0..BLOCKS).rev() {
            let unit = UnitId(block);
            events.unit(unit, Edge::BackwardEnter)?;
            for param in (0..model.params.len()).rev().map(ParamId) {
                if model.params[param.0].unit == Some(unit) {
                    model.differentiate(param, scale)?;
                }
            }
            events.unit(unit, Edge::BackwardLeave)?;
        }
        for param in [SOME, ParamId(0)] {
            if param != SOME || rank % 2 == 1 {
                model.differentiate(param, scale)?;
            }
        }
        Ok(())
    }
}

fn step<T: Element>(
    fabric: &Fabric,
    model: &FabricModule<Still<T>>,
    optimizer: &mut fabric::FabricOptimizer<AdamW>,
) -> Result<()> {
    for last in [false, true] {
        for block in 0..BLOCKS {
            model.unit(UnitId(block), Edge::ForwardEnter)?;
            model.unit(UnitId(block), Edge::ForwardLeave)?;
        }
        fabric.no_backward_sync(model, !last, || {
            let loss = Pass(model.module(), fabric.global_rank());
            fabric.backward_scaled(loss, 0.5)
        })?;
    }
    fabric.clip_gradients(model, Clip::norm(1.0))?;
    let largest = Clip::Norm {
        max: 1.0,
        order: f64::INFINITY,
    };
    fabric.clip_gradients(model, largest)?;
    fabric.clip_gradients(model, Clip::Value(0.1))?;
    fabric.clip_gradients(model, Clip::norm(1.0))?; // of what is new since the control word
    optimizer.step()?;
    optimizer.zero_grad();
    Ok(())
}

fn run<T: Element>(fabric: &Fabric) -> Result<()> {
    let (model, mut optimizer) = fabric.setup(Still::<T>::new(), AdamW::new(0.01))?;
    let mut record = None;
    for done in 0..STEPS {
        if done == WARM {
            record = Some(Record::begin());
        }
        if done == WARM + 1 {
            std::thread::sleep(PAUSE);
        }
        step(fabric, &model, &mut optimizer)?;
    }
    let (count, places) = record.map(Record::end).transpose()?.unwrap_or_default();
    fabric.barrier()?; // a rank that fails first would hide what the others found
    println!("rank {}: {count} allocations", fabric.global_rank());
    match count {
        0 => Ok(()),
        _ => Err(Error::new(format!(
            "{count} allocations after step {WARM}:\n{places}"
        ))),
    }
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let strategy = args.next().unwrap_or_else(|| "ddp".into());
    let ranks = args.next().map_or(Ok(2), |text| text.parse::<usize>())?;
    let precision = args.next().unwrap_or_else(|| "32-true".into());
    let mut builder = Fabric::builder()
        .devices(ranks)
        .strategy(&strategy)
        .precision(&precision)
        .buckets(Options {
            bucket_bytes: 2000,
            first_bucket_bytes: 500,
            ..Options::default()
        });
    if strategy == "hsdp" {
        builder = builder.group(2);
    }
    let fabric = builder.build()?;
    let run = match fabric.precision().policy().param {
        Dtype::BF16 => run::<half::bf16>,
        Dtype::F16 => run::<half::f16>,
        _ => run::<f32>,
    };
    fabric.launch(run).map(drop)
}
