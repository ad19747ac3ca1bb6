//! The driver of elementwise optimizers: which options hold for which parameter, the states and counts of each, and one
//! fused pass over every parameter that has a gradient.

use std::{fmt, sync::Arc};

use fabric_engine::{
    Error, Result,
    buffer::Slab,
    kernels::{self, Device, Memory, Span, SpanMut},
};

use super::{
    Elements, Elementwise, LentState, MOST_STATES, Optimizer, OptimizerState, STEP,
    saved::{self, Record, state_dtype},
    scratch::Scratch,
};
use crate::model::{Gradients, Model, ParamId, ParamMeta};

/// An optimizer that treats every element alike, after the formula `E`, with options by group of parameters.
/// [`Sgd`](super::Sgd), [`Adam`](super::Adam), [`AdamW`](super::AdamW) and [`Lion`](super::Lion) are such;
/// [`ByElement::of`] makes one of your own [`Elementwise`].
pub struct ByElement<E> {
    rule: E,
    groups: Vec<Group<E>>,
    slots: Vec<Slot>, // by parameter; none before the model is known
    scratch: Scratch,
}

/// Parameters with options of their own.
struct Group<E> {
    name: String,
    holds: Box<dyn Fn(&ParamMeta) -> bool + Send>,
    change: Box<dyn Fn(E) -> E + Send>,
    rule: E,
    /// The learning rate, as a multiple of everybody's; `None` where that is zero and this is not: it goes its own way.
    ratio: Option<f64>,
}

impl<E: Elementwise> Group<E> {
    /// Take over the options of everybody, changed.
    fn derive(&mut self, from: &E) {
        self.rule = (self.change)(from.clone());
        self.keep_ratio(from.learning_rate());
    }

    fn keep_ratio(&mut self, lr: f64) {
        let own = self.rule.learning_rate();
        self.ratio = if own == lr {
            Some(1.0)
        } else {
            (lr != 0.0).then_some(own / lr)
        };
    }
}

/// One parameter's place.
#[derive(Debug)]
struct Slot {
    group: Option<usize>,
    record: Record,
}

impl<E: Elementwise> ByElement<E> {
    /// After this formula.
    pub fn of(rule: E) -> Self {
        Self {
            rule,
            groups: Vec::new(),
            slots: Vec::new(),
            scratch: Scratch::default(),
        }
    }

    /// With other options for everybody; groups inherit what they do not set themselves.
    pub fn with(mut self, change: impl FnOnce(E) -> E) -> Self {
        self.rule = change(self.rule);
        for group in &mut self.groups {
            group.derive(&self.rule);
        }
        self
    }

    /// With options of their own for the parameters that `holds` chooses: `change` gets everybody's, whatever the order of
    /// the calls. A parameter belongs to the first group that holds it. `holds` sees whole parameters, with their names and
    /// shapes, also where ranks update pieces of them. `name` is what [`ByElement::set_group_learning_rate`] and errors
    /// call the group; one that gets no parameter is an error at the first step.
    pub fn group(
        mut self,
        name: impl Into<String>,
        holds: impl Fn(&ParamMeta) -> bool + Send + 'static,
        change: impl Fn(E) -> E + Send + 'static,
    ) -> Self {
        let mut group = Group {
            name: name.into(),
            holds: Box::new(holds),
            change: Box::new(change),
            rule: self.rule.clone(),
            ratio: Some(1.0),
        };
        group.derive(&self.rule);
        self.groups.push(group);
        self
    }

    /// The learning rate of a group; `None` when there is no such group.
    pub fn group_learning_rate(&self, name: &str) -> Option<f64> {
        let group = self.groups.iter().find(|group| group.name == name)?;
        Some(group.rule.learning_rate())
    }

    /// Change the learning rate of one group. Its new proportion to everybody's is the one that
    /// [`Optimizer::set_learning_rate`] keeps from now on.
    ///
    /// # Errors
    /// When there is no such group: lists them.
    pub fn set_group_learning_rate(&mut self, name: &str, lr: f64) -> Result<()> {
        let Some(group) = self.groups.iter_mut().find(|group| group.name == name) else {
            return Err(Error::argument(
                format!("this optimizer has no group '{name}'"),
                match &*names(&self.groups) {
                    "" => "Make one with .group(name, holds, change)".into(),
                    known => format!("Choose one of {known}"),
                },
            ));
        };
        group.rule.set_learning_rate(lr);
        group.keep_ratio(self.rule.learning_rate());
        Ok(())
    }

    /// The options of the parameters in a group; those of everybody, where it is `None`.
    fn rule_of(&self, group: Option<usize>) -> &E {
        rule_of(&self.rule, &self.groups, group)
    }

    /// The group of each of the model's parameters, when everything makes sense.
    fn assign(&self, model: &dyn Model) -> Result<Vec<Option<usize>>> {
        let rules = std::iter::once(&self.rule).chain(self.groups.iter().map(|group| &group.rule));
        rules.into_iter().try_for_each(check)?;
        for (index, group) in self.groups.iter().enumerate() {
            if self.groups[..index]
                .iter()
                .any(|other| other.name == group.name)
            {
                return Err(Error::argument(
                    format!("two groups of parameters are called '{}'", group.name),
                    "Give each a name of its own",
                ));
            }
        }
        let first = |param: &ParamMeta| self.groups.iter().position(|group| (group.holds)(param));
        let whole = model.whole_params();
        let whole: Vec<_> = whole.iter().map(first).collect();
        if let Some(idle) = (0..self.groups.len()).find(|index| !whole.contains(&Some(*index))) {
            let params = model.whole_params().iter().take(3);
            let params: Vec<_> = params.map(|param| format!("'{}'", param.name)).collect();
            return Err(Error::argument(
                format!(
                    "no parameter is in the group '{}': its condition holds for none, or earlier groups hold them all",
                    self.groups[idle].name
                ),
                format!(
                    "Correct or drop the group; the model's parameters are called {}, ...",
                    params.join(", ")
                ),
            ));
        }
        let ids = (0..model.params().len()).map(ParamId);
        Ok(ids.map(|param| whole[model.whole(param).0]).collect())
    }

    /// Give every parameter of the model its place, the first time.
    fn bind(&mut self, model: &dyn Model) -> Result<()> {
        let params = model.params().len();
        if !self.slots.is_empty() {
            return match self.slots.len() == params {
                true => Ok(()),
                false => Err(Error::argument(
                    format!(
                        "this optimizer has stepped a model of {} parameters, and this one has {params}",
                        self.slots.len()
                    ),
                    "Make an optimizer for each model",
                )),
            };
        }
        let slot = |group| Slot {
            group,
            record: Record::default(),
        };
        self.slots = self.assign(model)?.into_iter().map(slot).collect();
        Ok(())
    }

    fn update_all(&mut self, model: &dyn Model, grads: &Gradients<'_>) -> Result<()> {
        let Self {
            rule,
            groups,
            slots,
            scratch,
        } = self;
        for (index, slot) in slots.iter_mut().enumerate() {
            let param = ParamId(index);
            if let Some(grad) = grads.get(param) {
                let rule = rule_of(rule, groups, slot.group);
                let grad = (grad, grads.scale());
                update(rule, model, param, grad, &mut slot.record, scratch)?;
            }
        }
        Ok(())
    }

    /// The names of the states of each parameter.
    fn kinds(&self, groups: &[Option<usize>]) -> Vec<&[&'static str]> {
        let groups = groups.iter();
        groups.map(|group| self.rule_of(*group).states()).collect()
    }
}

fn rule_of<'a, E>(rule: &'a E, groups: &'a [Group<E>], group: Option<usize>) -> &'a E {
    group.map_or(rule, |group| &groups[group].rule)
}

fn names<E>(groups: &[Group<E>]) -> String {
    let names = groups.iter().map(|group| format!("'{}'", group.name));
    names.collect::<Vec<_>>().join(", ")
}

/// Whether a formula's hyperparameters make sense, and its states can be saved.
fn check<E: Elementwise>(rule: &E) -> Result<()> {
    let states = rule.states();
    let refuse = |what: String, hint: String| Err(Error::argument(what, hint));
    if states.len() > MOST_STATES {
        return refuse(
            format!("{} has {} states", rule.name(), states.len()),
            format!("Keep at most {MOST_STATES}, or implement Optimizer"),
        );
    }
    for (index, state) in states.iter().enumerate() {
        if state.is_empty() || state.contains('.') || *state == STEP {
            return refuse(
                format!("{} calls a state '{state}'", rule.name()),
                format!("Give it a name without dots that is not '{STEP}'"),
            );
        }
        if states[..index].contains(state) {
            return refuse(
                format!("{} calls two states '{state}'", rule.name()),
                "Give each a name of its own".into(),
            );
        }
    }
    rule.check()
}

impl<E: Elementwise> Optimizer for ByElement<E> {
    fn step(&mut self, model: &dyn Model, grads: &Gradients<'_>) -> Result<()> {
        self.bind(model)?;
        // Nothing of a model moves in an update, so that a device may do all parameters in one launch.
        kernels::batch(|| self.update_all(model, grads))
    }

    fn scales(&self) -> bool {
        true
    }

    fn states_per_param(&self) -> usize {
        self.rule.states().len()
    }

    fn learning_rate(&self) -> f64 {
        self.rule.learning_rate()
    }

    /// Change the learning rate, of groups in proportion: a group that learns ten times as fast goes on doing so.
    fn set_learning_rate(&mut self, lr: f64) {
        self.rule.set_learning_rate(lr);
        for group in &mut self.groups {
            if let Some(ratio) = group.ratio {
                group.rule.set_learning_rate(ratio * lr);
            }
        }
    }

    fn state(&self, model: &dyn Model) -> Result<OptimizerState> {
        Ok(self.lend_state(model)?.into())
    }

    fn lend_state(&self, model: &dyn Model) -> Result<LentState<'_>> {
        let records = self.slots.iter();
        let records = records.map(|slot| (self.rule_of(slot.group).states(), &slot.record));
        Ok(saved::lend(model, records))
    }

    fn check_state(&self, model: &dyn Model, state: &OptimizerState) -> Result<()> {
        saved::check(model, &self.kinds(&self.assign(model)?), state)
    }

    fn load_state(&mut self, model: &dyn Model, state: OptimizerState) -> Result<()> {
        let groups = self.assign(model)?;
        let kinds = self.kinds(&groups);
        saved::check(model, &kinds, &state)?;
        let records = saved::unpack(model, &kinds, state);
        let slots = groups.into_iter().zip(records);
        self.slots = slots
            .map(|(group, record)| Slot { group, record })
            .collect();
        Ok(())
    }
}

/// One step of one parameter. `grad` is the gradient, and what it is to be multiplied by.
fn update<E: Elementwise>(
    rule: &E,
    model: &dyn Model,
    param: ParamId,
    (grad, grad_scale): (Span<'_>, f64),
    record: &mut Record,
    scratch: &mut Scratch,
) -> Result<()> {
    let meta = &model.params()[param.0];
    let wanted = rule.states().len();
    let is_fresh = record.states.len() != wanted;
    let step = if is_fresh { 1 } else { record.steps + 1 }; // bias corrections count from where the states began
    let mut calls = 0;
    model.update(param, &mut |buffer, copy| {
        calls += 1;
        if calls > 1 {
            return Err(miscalled("more than once"));
        }
        scratch.lend(buffer, copy, |param, copy| {
            let device = param.device().map(Device::share);
            if is_fresh {
                let fresh = || Slab::zeroed_on(device.as_ref(), state_dtype(meta), meta.numel());
                let states = std::iter::repeat_with(fresh).take(wanted);
                record.states = states.collect::<Result<_, _>>()?;
            }
            for state in &mut record.states {
                bring(state, device.as_ref())?;
            }
            let mut states = record.states.iter_mut();
            // An array, because a vector would be allocated anew for each parameter in each step.
            let mut states: [SpanMut<'_>; MOST_STATES] = std::array::from_fn(|_| {
                let state = states.next();
                state.map_or(SpanMut::of::<u8>(&mut []), |state| {
                    let all = 0..state.numel();
                    state.part_mut(all)
                })
            });
            rule.update(Elements {
                name: &meta.name,
                step,
                grad_scale,
                param,
                grad,
                states: &mut states[..wanted],
                copy,
            })
        })
    })?;
    if calls == 0 {
        return Err(miscalled("not at all"));
    }
    record.steps = step;
    Ok(())
}

/// Bring a state to where its parameter lies: one that was loaded lies on the host.
fn bring(state: &mut Slab, device: Option<&Arc<dyn Device>>) -> Result<()> {
    let there = device.map_or(Memory::Host, |device| device.memory());
    if state.memory() != there {
        let all = 0..state.numel();
        let mut copy = Slab::zeroed_on(device, state.dtype(), state.numel())?;
        kernels::cast(state.part(all.clone()), copy.part_mut(all))?;
        *state = copy;
    }
    Ok(())
}

fn miscalled(how: &str) -> Error {
    Error::argument(
        format!("Model::update or Model::with has called back {how}"),
        "Call `f` once for each call of `update` and `with`",
    )
}

impl<E: fmt::Debug> fmt::Debug for ByElement<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ByElement")
            .field("rule", &self.rule)
            .field("groups", &self.groups)
            .finish_non_exhaustive()
    }
}

impl<E: fmt::Debug> fmt::Debug for Group<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct(&self.name)
            .field("rule", &self.rule)
            .finish_non_exhaustive()
    }
}
