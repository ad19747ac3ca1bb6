//! Callbacks: what a program hangs on the moments of its loop. Fabric calls them in the order of registration, on every
//! rank; those that save, [`ModelCheckpoint`], come behind all others, so that they save what those have made of the moment.
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

use serde_json::{Map, Value};

use crate::{
    Fabric, Result,
    turn::{Taken, Turn},
};

/// One rank's callbacks, in the order of their registration. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Callbacks(Vec<Slot>);

#[derive(Clone)]
struct Slot {
    key: String, // of its state: its name, or `name#2` for the second
    saves: bool,
    callback: Arc<Turn<Box<dyn Callback>>>,
}

impl Callbacks {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn add(&mut self, callback: Box<dyn Callback>) {
        let name = callback.name();
        let mut keys = (1..).map(|count| match count {
            1 => name.to_string(),
            _ => format!("{name}#{count}"),
        });
        let is_free = |key: &String| self.0.iter().all(|slot| slot.key != *key);
        let key = keys
            .find(is_free)
            .expect("there are fewer callbacks than numbers");
        // Behind all others: a moving average has given the model its own values back then, patience was counted.
        let saves = (&*callback as &dyn Any).is::<ModelCheckpoint>();
        let place = self.0.iter().position(|slot| slot.saves && !saves);
        let callback = Arc::new(Turn::new(callback));
        let slot = Slot {
            key,
            saves,
            callback,
        };
        self.0.insert(place.unwrap_or(self.0.len()), slot);
    }

    /// Callbacks for another rank in this process: own ones, where they can be had.
    pub(crate) fn twin(&self) -> Self {
        let twin = |slot: &Slot| {
            let own = slot.callback.take();
            let twin = own.and_then(|own| own.twin());
            let callback =
                twin.map_or_else(|| slot.callback.clone(), |twin| Arc::new(Turn::new(twin)));
            let (key, saves) = (slot.key.clone(), slot.saves);
            Slot {
                key,
                saves,
                callback,
            }
        };
        Self(self.0.iter().map(twin).collect())
    }

    /// Those that are not running: one is not told of what it has announced itself.
    fn each(&self) -> impl Iterator<Item = Taken<'_, Box<dyn Callback>>> {
        self.0.iter().filter_map(|slot| slot.callback.take())
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

    /// Every state, by its key; without those of callbacks that are running.
    pub(crate) fn states(&self) -> Result<Map<String, Value>> {
        let mut states = Map::new();
        for slot in &self.0 {
            if let Some(callback) = slot.callback.take() {
                let state = callback.state()?;
                if !state.is_null() {
                    states.insert(slot.key.clone(), state);
                }
            }
        }
        Ok(states)
    }

    pub(crate) fn load_states(&self, states: &Map<String, Value>) -> Result<()> {
        for slot in &self.0 {
            if let (Some(state), Some(mut callback)) = (states.get(&slot.key), slot.callback.take())
            {
                callback.load_state(state)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_names_of_their_own_and_come_back() {
        let build = || {
            let patience = [3, 4].map(|looks| EarlyStopping::new("x").patience(looks));
            let [first, second] = patience;
            let quiet = at(Hook::TrainEnd, |_, _| Ok(()));
            let builder = Fabric::builder().devices(1).callback(first).callback(quiet);
            builder.callback(second).build().unwrap()
        };
        // Announced inside the first one's kind of callback: keys do not depend on who is running.
        let first = build();
        first.add_callback(on("states", |fabric, states: &mut Map<String, Value>| {
            *states = fabric.callback_states()?;
            Ok(())
        }));
        let mut states = Map::new();
        first.call("states", &mut states).unwrap();
        let keys: Vec<_> = states.keys().cloned().collect();
        assert_eq!(keys, ["EarlyStopping", "EarlyStopping#2"]);
        states["EarlyStopping#2"]["waited"] = 2.into();
        let second = build();
        second.load_callback_states(&states).unwrap();
        assert_eq!(second.callback_states().unwrap(), states);
        states.insert("EarlyStopping".into(), "nonsense".into());
        let error = second
            .load_callback_states(&states)
            .unwrap_err()
            .to_string();
        assert!(error.contains("'EarlyStopping' does not fit"), "{error}");
        let waited = second.with_callback(|stopping: &mut EarlyStopping| Ok(stopping.waited()));
        assert_eq!(waited.unwrap(), Some(0), "the first of its type");
        assert!(
            second
                .with_callback(|_: &mut Ema| Ok(()))
                .unwrap()
                .is_none()
        );
    }
}
