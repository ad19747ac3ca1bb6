//! An engine of paper: it keeps the values of the units' parameters itself, puts them into the model when a unit is
//! entered, and takes the memory away when it is left, or when all its gradients were handed over.

use std::sync::{Arc, Mutex, MutexGuard, Weak};

use candle_core::{Result as CandleResult, Tensor};
use fabric::{
    engine::{
        Error, Result,
        buffer::Buffer,
        kernels::{Span, SpanMut},
    },
    model::{Backward, Edge, Events, Keep, Model, ParamId, UnitId},
};
use fabric_candle::{CandleModel, Loss};

/// A model of f32 parameters under the engine of paper.
pub struct Puppet<M> {
    pub model: Arc<CandleModel<M>>,
    pub strings: Arc<Strings>,
}

/// What the model reports to.
pub struct Strings {
    model: Weak<dyn Model>,
    state: Mutex<State>,
}

#[derive(Default)]
pub struct State {
    values: Vec<Vec<f32>>, // of parameters in units
    grads: Vec<Option<Vec<f32>>>,
    missing: Vec<usize>, // gradients, by unit
    there: Vec<bool>,
    pub most_bytes: usize, // that parameters had at once
    pub edges: Vec<(usize, Edge)>,
    pub places: Vec<usize>, // addresses at which parameters of units were
    pub broken: Option<&'static str>,
}

impl<M: Send + Sync + 'static> Puppet<M> {
    /// Take the units' parameters away, and attach the strings.
    pub fn new(model: CandleModel<M>) -> Self {
        let model = Arc::new(model);
        let count = model.params().len();
        let mut state = State {
            grads: vec![None; count],
            missing: vec![0; model.units().len()],
            there: vec![true; count],
            ..State::default()
        };
        for index in 0..count {
            model.initialize(ParamId(index)).unwrap();
            state.values.push(read(&*model, ParamId(index)));
            if model.params()[index].home().is_some() {
                model.release(ParamId(index)).unwrap();
                state.there[index] = false;
            }
        }
        let whole: Arc<dyn Model> = model.clone();
        let strings = Arc::new(Strings {
            model: Arc::downgrade(&whole),
            state: Mutex::new(state),
        });
        model.attach(strings.clone());
        Self { model, strings }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.strings.state()
    }

    /// One step of plain gradient descent: the loss, and the gradients.
    pub fn step(&self, loss: impl FnOnce(&M) -> CandleResult<Tensor>) -> (f32, Vec<Vec<f32>>) {
        let loss = loss(&self.model).unwrap();
        Loss(&loss).backward(1.0).unwrap();
        let grads: Vec<_> = {
            let mut state = self.state();
            assert!(
                state.missing.iter().all(|missing| *missing == 0),
                "all gradients of units came"
            );
            let taken = state.grads.iter_mut().map(Option::take);
            taken.map(|grad| grad.expect("a gradient")).collect()
        };
        for (index, grad) in grads.iter().enumerate() {
            if self.model.params()[index].home().is_some() {
                descend(&mut self.state().values[index], grad);
            } else {
                descend_in(&*self.model, ParamId(index), grad);
            }
        }
        (loss.to_scalar().unwrap(), grads)
    }

    /// All values, from wherever they are.
    pub fn values(&self) -> Vec<Vec<f32>> {
        let home = |index: usize| self.model.params()[index].home();
        let value = |index| match home(index) {
            Some(_) => self.state().values[index].clone(),
            None => read(&*self.model, ParamId(index)),
        };
        (0..self.model.params().len()).map(value).collect()
    }
}

/// One step of plain gradient descent, with the memory where it is: the loss, and the gradients.
pub fn step_whole<M: Send + Sync + 'static>(
    model: &CandleModel<M>,
    loss: impl FnOnce(&M) -> CandleResult<Tensor>,
) -> (f32, Vec<Vec<f32>>) {
    let loss = loss(model).unwrap();
    let store = loss.backward().unwrap();
    let grads = model.with_vars(|vars| {
        let grad = |(_, var): &(String, candle_core::Var)| {
            let grad = store.get(var).expect("a gradient");
            grad.flatten_all()?.to_vec1()
        };
        vars.iter().map(grad).collect::<CandleResult<Vec<_>>>()
    });
    let grads = grads.unwrap();
    for (index, grad) in grads.iter().enumerate() {
        descend_in(model, ParamId(index), grad);
    }
    (loss.to_scalar().unwrap(), grads)
}

fn descend(values: &mut [f32], grad: &[f32]) {
    let pairs = values.iter_mut().zip(grad);
    pairs.for_each(|(value, grad)| *value -= 0.1 * grad);
}

fn descend_in(model: &dyn Model, param: ParamId, grad: &[f32]) {
    let mut values = read(model, param);
    descend(&mut values, grad);
    write(model, param, &values).unwrap();
}

pub fn read(model: &dyn Model, param: ParamId) -> Vec<f32> {
    let mut values = vec![0f32; model.params()[param.0].numel()];
    let mut read = |buffer: &mut dyn Buffer| {
        let all = 0..values.len();
        buffer.read(all, SpanMut::of(&mut values))
    };
    model.with(param, &mut read).unwrap();
    values
}

fn write(model: &dyn Model, param: ParamId, values: &[f32]) -> Result<()> {
    model.with(param, &mut |buffer| {
        buffer.write(0..values.len(), Span::of(values))
    })
}

impl Strings {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|held| held.into_inner())
    }

    fn members(model: &dyn Model, unit: UnitId) -> Vec<usize> {
        let params = model.params().iter().enumerate();
        let own = params.filter(|(_, param)| param.home() == Some(unit));
        own.map(|(index, _)| index).collect()
    }

    fn enter(&self, model: &dyn Model, unit: UnitId) -> Result<()> {
        let mut state = self.state();
        for index in Self::members(model, unit) {
            let param = ParamId(index);
            model.acquire(param)?;
            write(model, param, &state.values[index])?;
            model.with(param, &mut |buffer| {
                let Some(span) = buffer.span() else {
                    panic!("memory")
                };
                state.places.push(span.as_ptr() as usize);
                Ok(())
            })?;
            state.there[index] = true;
        }
        let there = state.there.iter().zip(model.params());
        let bytes = there
            .filter(|(there, _)| **there)
            .map(|(_, param)| 4 * param.numel());
        state.most_bytes = state.most_bytes.max(bytes.sum());
        Ok(())
    }

    fn leave(&self, model: &dyn Model, unit: UnitId) -> Result<()> {
        let mut state = self.state();
        for index in Self::members(model, unit) {
            state.there[index] = false;
            model.release(ParamId(index))?;
        }
        Ok(())
    }
}

impl Events for Strings {
    fn ready(&self, param: ParamId, grad: &dyn Buffer) -> Result<Keep> {
        let model = self.model.upgrade().expect("the model lives");
        let mut copy = vec![0f32; grad.numel()];
        grad.read(0..copy.len(), SpanMut::of(&mut copy))?;
        let mut state = self.state();
        let double = state.grads[param.0].replace(copy);
        assert!(double.is_none(), "one gradient for each parameter");
        if let Some(unit) = model.params()[param.0].home() {
            state.missing[unit.0] -= 1;
            if state.missing[unit.0] == 0 {
                drop(state);
                self.leave(&*model, unit)?;
            }
        }
        Ok(Keep::Drop)
    }

    fn unit(&self, unit: UnitId, edge: Edge) -> Result<()> {
        let model = self.model.upgrade().expect("the model lives");
        self.state().edges.push((unit.0, edge));
        if let Some(what) = self.state().broken {
            return Err(Error::argument(what, "Try again"));
        }
        match edge {
            Edge::ForwardEnter => self.enter(&*model, unit),
            Edge::ForwardLeave => self.leave(&*model, unit),
            Edge::BackwardEnter => {
                self.state().missing[unit.0] = Self::members(&*model, unit).len();
                self.enter(&*model, unit)
            }
            Edge::BackwardLeave => panic!("candle cannot tell when a backward is over"),
        }
    }
}
