//! Callbacks: what a program hangs on the moments of its loop. Fabric calls them in the order of registration, on every
//! rank.
//!
//! The moments that Lightning has names for are methods of [`Callback`], and variants of [`Hook`]: the loop announces them by
//! [`Fabric::notify`], with a [`Moment`]. A program's own moments have a name and a payload of any type: [`Fabric::call`].

mod checkpoint;
mod closure;
mod device;
mod early_stopping;
mod ema;
mod gradients;
mod hook;
mod learning_rate;
mod moment;
mod monitor;
mod progress_bar;
mod spike;
mod throughput;
mod view;

use std::{any::Any, sync::Arc};

pub use checkpoint::ModelCheckpoint;
pub use closure::{At, On, at, on};
pub use device::DeviceStatistics;
pub use early_stopping::EarlyStopping;
pub use ema::Ema;
pub use gradients::GradientStatistics;
pub use hook::{Callback, Hook};
pub use learning_rate::LearningRateMonitor;
pub use moment::{LoopState, Metrics, Moment, Progress, Save};
pub use monitor::Mode;
pub use progress_bar::ProgressBar;
pub use spike::{SpikeDetection, TrainingSpike};
pub use throughput::ThroughputMonitor;
pub use view::ModelView;

use crate::{
    Fabric, Result,
    turn::{Taken, Turn},
};

/// One rank's callbacks, in the order of their registration. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Callbacks(Vec<Arc<Turn<Box<dyn Callback>>>>);

impl Callbacks {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn add(&mut self, callback: Box<dyn Callback>) {
        self.0.push(Arc::new(Turn::new(callback)));
    }

    /// Callbacks for another rank in this process: own ones, where they can be had.
    pub(crate) fn twin(&self) -> Self {
        let twin = |shared: &Arc<Turn<_>>| {
            let twin = shared
                .take()
                .and_then(|own: Taken<'_, Box<dyn Callback>>| own.twin());
            twin.map_or_else(|| shared.clone(), |twin| Arc::new(Turn::new(twin)))
        };
        Self(self.0.iter().map(twin).collect())
    }

    /// Those that are not running: one is not told of what it has announced itself.
    fn each(&self) -> impl Iterator<Item = Taken<'_, Box<dyn Callback>>> {
        self.0.iter().filter_map(|callback| callback.take())
    }

    pub(crate) fn notify(
        &self,
        hook: Hook,
        fabric: &Fabric,
        moment: &mut Moment<'_>,
    ) -> Result<()> {
        self.each()
            .try_for_each(|mut callback| callback.notify(hook, fabric, moment))
    }

    pub(crate) fn call<P: Any>(&self, fabric: &Fabric, hook: &str, payload: &mut P) -> Result<()> {
        self.each().try_for_each(|mut callback| {
            callback
                .call(fabric, hook, payload)
                .map_err(closure::naming::<P>)
        })
    }

    /// The first of type `C`.
    pub(crate) fn find<C: Callback, T>(
        &self,
        f: impl FnOnce(&mut C) -> Result<T>,
    ) -> Option<Result<T>> {
        let mut f = Some(f);
        self.each().find_map(|mut callback| {
            let any: &mut dyn Any = &mut **callback;
            let found = any.downcast_mut::<C>()?;
            Some(f.take()?(found))
        })
    }

    /// Every state, by a name of its own: the second of a name is `name#2`.
    pub(crate) fn states(&self) -> Result<serde_json::Map<String, serde_json::Value>> {
        let mut states = serde_json::Map::new();
        for (key, callback) in self.named() {
            let state = callback.state()?;
            if !state.is_null() {
                states.insert(key, state);
            }
        }
        Ok(states)
    }

    pub(crate) fn load_states(
        &self,
        states: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<()> {
        for (key, mut callback) in self.named() {
            if let Some(state) = states.get(&key) {
                callback.load_state(state)?;
            }
        }
        Ok(())
    }

    fn named(&self) -> impl Iterator<Item = (String, Taken<'_, Box<dyn Callback>>)> {
        let mut names: Vec<String> = Vec::new();
        self.each().map(move |callback| {
            let name = callback.name().to_string();
            let before = names.iter().filter(|known| **known == name).count();
            names.push(name.clone());
            let key = match before {
                0 => name,
                _ => format!("{name}#{}", before + 1),
            };
            (key, callback)
        })
    }
}
