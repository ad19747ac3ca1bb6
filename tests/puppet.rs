//! A model that does as it is told: any dtypes, frozen parameters, and hooks that a test calls when and as often as it
//! likes. Also the stage for it: a fabric of threads, and what each rank said when it failed.

use std::sync::{Arc, Barrier, Mutex, OnceLock};

use fabric::{
    Fabric, Result,
    model::{Backward, Events, Model, ParamId, ParamMeta, UnitId},
};
use fabric_engine::{
    Result as EngineResult,
    buffer::{Buffer, Slab},
    kernels::Element,
};

/// A model of slabs.
pub(crate) struct Puppet {
    params: Vec<ParamMeta>,
    units: Vec<String>,
    values: Vec<Mutex<Slab>>,
    events: OnceLock<Arc<dyn Events>>,
}

impl Puppet {
    /// A model without parameters.
    pub(crate) fn new() -> Self {
        Self {
            params: Vec::new(),
            units: Vec::new(),
            values: Vec::new(),
            events: OnceLock::new(),
        }
    }

    /// One more parameter, a vector.
    pub(crate) fn param<T: Element>(mut self, name: &str, values: &[T]) -> Self {
        self.params
            .push(ParamMeta::new(name, &[values.len()], T::DTYPE));
        self.values.push(Mutex::new(Slab::from_slice(values)));
        self
    }

    /// The last parameter gets no gradient.
    pub(crate) fn frozen(mut self) -> Self {
        self.params.last_mut().unwrap().trainable = false;
        self
    }

    /// The last parameter is in a unit of this name.
    pub(crate) fn in_unit(mut self, name: &str) -> Self {
        self.params.last_mut().unwrap().unit = Some(UnitId(self.units.len()));
        self.units.push(name.into());
        self
    }

    /// The last parameter has this shape.
    pub(crate) fn shape(mut self, shape: &[usize]) -> Self {
        self.params.last_mut().unwrap().shape = shape.to_vec();
        self
    }

    /// The bytes of every parameter.
    pub(crate) fn bytes(&self) -> Vec<Vec<u8>> {
        let values = self.values.iter();
        values
            .map(|value| value.lock().unwrap().as_bytes().to_vec())
            .collect()
    }

    /// What a library's hook would call.
    pub(crate) fn events(&self) -> Arc<dyn Events> {
        self.events.get().expect("a model that was set up").clone()
    }

    /// Report a gradient.
    pub(crate) fn ready<T: Element>(&self, param: usize, grad: Vec<T>) -> EngineResult<()> {
        self.events().ready(ParamId(param), &grad).map(drop)
    }
}

impl Model for Puppet {
    fn params(&self) -> &[ParamMeta] {
        &self.params
    }

    fn with(
        &self,
        param: ParamId,
        f: &mut dyn FnMut(&mut dyn Buffer) -> EngineResult<()>,
    ) -> EngineResult<()> {
        f(&mut *self.values[param.0].lock().unwrap())
    }

    fn units(&self) -> &[String] {
        &self.units
    }

    fn attach(&self, events: Arc<dyn Events>) {
        assert!(self.events.set(events).is_ok(), "attached once");
    }

    fn unused_hint(&self) -> &str {
        "Pull its strings"
    }
}

/// A backward that is a closure.
pub(crate) struct Script<F>(pub(crate) F);

impl<F: FnOnce() -> EngineResult<()>> Backward for Script<F> {
    fn backward(self, _: f32) -> EngineResult<()> {
        self.0()
    }
}

/// `world` ranks with data parallelism.
pub(crate) fn ddp(world: usize) -> Fabric {
    let fabric = Fabric::builder().devices(world).strategy("ddp");
    fabric.build().unwrap()
}

/// Run `body` on `world` threads, where every rank must fail; what each said, by rank.
pub(crate) fn failures<T: Send>(
    world: usize,
    body: impl Fn(&Fabric) -> Result<T> + Sync,
) -> Vec<String> {
    failures_of(&ddp(world), body)
}

/// The same, under any strategy.
pub(crate) fn failures_of<T: Send>(
    fabric: &Fabric,
    body: impl Fn(&Fabric) -> Result<T> + Sync,
) -> Vec<String> {
    let world = fabric.ranks();
    let said = Mutex::new(vec![None; world]);
    let connected = Barrier::new(world); // else a rank that still connects fails there
    let outcome = fabric.launch_threads(|fabric| {
        let rank = fabric.global_rank();
        connected.wait();
        let result = body(fabric);
        said.lock().unwrap()[rank] = result.as_ref().err().map(ToString::to_string);
        result
    });
    assert!(outcome.is_err(), "somebody had to fail");
    let said = said.into_inner().unwrap().into_iter().enumerate();
    said.map(|(rank, text)| text.unwrap_or_else(|| panic!("rank {rank} did not fail")))
        .collect()
}

/// Every text of `said` must hold all `words`.
pub(crate) fn all_say(said: &[String], words: &[&str]) {
    for text in said {
        for word in words {
            assert!(text.contains(word), "'{word}' is not in '{text}'");
        }
    }
}
