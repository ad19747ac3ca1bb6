//! A callback that keeps a moving average of the parameters, and puts it in their place for validation.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use fabric_engine::{
    buffer::Slab,
    kernels::{Dtype, SpanMut},
};

use super::{Callback, ModelView, Moment};
use crate::{
    Error, Fabric, Result,
    model::{Core, ParamId},
    optim::{Lent, LentState, OptimizerState},
};

/// Under what name a piece's average stands in a checkpoint, before the parameter's.
const KIND: &str = "average";

/// An exponential moving average of every trained parameter, `average = decay * average + (1 - decay) * parameter` after each
/// step of an optimizer that was not skipped. A rank averages what it updates, whole parameters or its pieces, in their type,
/// `f32` at least: the average is the same under every strategy, to the bit, and costs as much memory as the pieces.
///
/// As a callback it begins with [`Fabric::setup`], follows the optimizer by itself, and puts the averages in the model's place
/// from `on_validation_start` to `on_validation_end`. It is saved by [`crate::State::average`].
///
/// ```
/// use fabric::{Fabric, State, callback::Ema, optim::Sgd, vec::VecModel};
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("last.ckpt");
/// let fabric = Fabric::builder().callback(Ema::new(0.5)?).build()?;
/// fabric.launch(|fabric| {
///     let (model, mut optimizer) = fabric.setup(VecModel::new([("w", vec![0f32; 2])]), Sgd::new(1.0))?;
///     fabric.backward(model.gradients(vec![Some(vec![-4.0, -8.0])]))?;
///     optimizer.step()?;
///     fabric.with_callback(|ema: &mut Ema| {
///         fabric.save(&path, State::new().model("model", &model).average("ema", ema, &model))?;
///         ema.swap_in()?;
///         assert_eq!(model.read("w"), [2.0, 4.0]);
///         ema.swap_out()?;
///         assert_eq!(model.read("w"), [4.0, 8.0]);
///         Ok(())
///     })?;
///     Ok(())
/// })?;
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Debug)]
pub struct Ema {
    decay: f64,
    warmup: bool,
    at_validation: bool,
    averages: BTreeMap<u64, Average>, // by model
}

/// One model's.
struct Average {
    core: Weak<Core>, // not kept alive: it holds the communicator
    updates: u64,
    pieces: Vec<(ParamId, Slab)>,
    away: Option<Vec<Slab>>, // the model's own values, while the averages are in their place
}

impl std::fmt::Debug for Average {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (updates, pieces) = (self.updates, self.pieces.len());
        write!(f, "Average {{ {updates} updates of {pieces} pieces }}")
    }
}

impl Ema {
    /// An average that keeps `decay` of itself at each step, like 0.999.
    ///
    /// # Errors
    /// When that is not between 0 and 1.
    pub fn new(decay: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&decay) {
            return Err(Error::argument(
                format!("a moving average with a decay of {decay}"),
                "Give a number from 0 to 1, like 0.999",
            ));
        }
        Ok(Self {
            decay,
            warmup: false,
            at_validation: true,
            averages: BTreeMap::new(),
        })
    }

    /// Let the decay rise to its value: after n updates it is (1 + n) / (10 + n) at most.
    pub fn warmup(mut self, wanted: bool) -> Self {
        self.warmup = wanted;
        self
    }

    /// Whether validation sees the averages; it does.
    pub fn at_validation(mut self, wanted: bool) -> Self {
        self.at_validation = wanted;
        self
    }

    /// Begin with a model's values as they are.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn begin(&mut self, model: &ModelView) -> Result<()> {
        let pieces = model
            .trained()
            .map(|piece| Ok((piece, values(model, piece)?)));
        let average = Average {
            core: Arc::downgrade(model.core()),
            updates: 0,
            pieces: pieces.collect::<Result<_>>()?,
            away: None,
        };
        self.averages.insert(model.id(), average);
        Ok(())
    }

    /// Take a model's values into its average, which begins with them when there is none.
    ///
    /// # Errors
    /// When they cannot be read, or the averages are in their place.
    pub fn update(&mut self, model: &ModelView) -> Result<()> {
        let Some(average) = self.averages.get_mut(&model.id()) else {
            return self.begin(model);
        };
        if average.away.is_some() {
            return Err(Error::argument(
                "an optimizer has stepped while the moving averages were in the parameters' place",
                "Call Ema::swap_out, or announce Hook::ValidationEnd, before training goes on",
            ));
        }
        let count = average.updates as f64;
        let decay = match self.warmup {
            true => self.decay.min((1.0 + count) / (10.0 + count)),
            false => self.decay,
        };
        average.updates += 1;
        for (piece, slab) in &mut average.pieces {
            let now = values(model, *piece)?;
            match slab.dtype() {
                Dtype::F64 => mix(slab.as_mut_slice::<f64>(), now.as_slice(), |a, x| {
                    decay * a + (1.0 - decay) * x
                }),
                _ => {
                    let (keep, take) = (decay as f32, (1.0 - decay) as f32);
                    mix(slab.as_mut_slice::<f32>(), now.as_slice(), |a, x| {
                        keep * a + take * x
                    });
                }
            }
        }
        Ok(())
    }

    /// Put the averages in their models' place, until [`Ema::swap_out`]. All ranks call this together.
    ///
    /// # Errors
    /// When values cannot be written, or a rank is gone.
    pub fn swap_in(&mut self) -> Result<()> {
        for average in self
            .averages
            .values_mut()
            .filter(|average| average.away.is_none())
        {
            let Some(model) = average.model() else {
                continue;
            };
            let own = average
                .pieces
                .iter()
                .map(|(piece, _)| values(&model, *piece));
            average.away = Some(own.collect::<Result<_>>()?);
            for (piece, slab) in &average.pieces {
                write(&model, *piece, slab)?;
            }
            model.publish()?;
        }
        Ok(())
    }

    /// Give the models their own values back; nothing when they have them. All ranks call this together.
    ///
    /// # Errors
    /// As [`Ema::swap_in`].
    pub fn swap_out(&mut self) -> Result<()> {
        for average in self.averages.values_mut() {
            let (Some(model), Some(own)) = (average.model(), average.away.take()) else {
                continue;
            };
            for ((piece, _), slab) in average.pieces.iter().zip(&own) {
                write(&model, *piece, slab)?;
            }
            model.publish()?;
        }
        Ok(())
    }

    /// This rank's averages of a model: pieces, and their values as `f32`.
    ///
    /// # Errors
    /// When it has no average.
    pub fn read(&self, model: &ModelView) -> Result<Vec<(ParamId, Vec<f32>)>> {
        let pieces = self.of(model.id())?.pieces.iter();
        let narrow = |slab: &Slab| match slab.dtype() {
            Dtype::F64 => slab.as_slice::<f64>().iter().map(|x| *x as f32).collect(),
            _ => slab.as_slice::<f32>().to_vec(),
        };
        Ok(pieces.map(|(piece, slab)| (*piece, narrow(slab))).collect())
    }

    fn of(&self, model: u64) -> Result<&Average> {
        self.averages.get(&model).ok_or_else(|| {
            Error::argument(
                "this moving average has not seen the model",
                "Add Ema to the callbacks before fabric.setup, or call Ema::begin",
            )
        })
    }

    /// To be saved: the averages, named as an optimizer's states are.
    pub(crate) fn lend(&self, model: &ModelView) -> Result<LentState<'_>> {
        let average = self.of(model.id())?;
        let metas = model.pieces();
        let name = |piece: ParamId| format!("{KIND}.{}", metas[piece.0].name);
        let tensors = average.pieces.iter();
        Ok(LentState {
            steps: average.updates,
            tensors: tensors
                .map(|(piece, slab)| (name(*piece), Lent::Here(slab)))
                .collect(),
        })
    }

    /// Whether a saved state has every average of this rank.
    pub(crate) fn check(&self, model: &ModelView, state: &OptimizerState) -> Result<()> {
        model
            .trained()
            .try_for_each(|piece| saved(model, piece, state).map(drop))
    }

    /// Go on from a saved state.
    pub(crate) fn load(&mut self, model: &ModelView, state: &OptimizerState) -> Result<()> {
        let piece = |piece: ParamId| Ok((piece, saved(model, piece, state)?));
        let average = Average {
            core: Arc::downgrade(model.core()),
            updates: state.steps,
            pieces: model.trained().map(piece).collect::<Result<_>>()?,
            away: None,
        };
        self.averages.insert(model.id(), average);
        Ok(())
    }
}

impl Average {
    /// The model, while its job goes on.
    fn model(&self) -> Option<ModelView> {
        self.core.upgrade().map(|core| ModelView::of(&core))
    }
}

fn mix<T: Copy>(averages: &mut [T], values: &[T], f: impl Fn(T, T) -> T) {
    for (average, value) in averages.iter_mut().zip(values) {
        *average = f(*average, *value);
    }
}

/// A copy of a piece, in the type of its average.
fn values(model: &ModelView, piece: ParamId) -> Result<Slab> {
    let meta = &model.pieces()[piece.0];
    let mut slab = Slab::zeroed(average_dtype(meta.dtype), meta.numel());
    model.with(piece, &mut |buffer| {
        let whole = 0..buffer.numel();
        buffer.read(whole.clone(), slab.part_mut(whole))
    })?;
    Ok(slab)
}

fn write(model: &ModelView, piece: ParamId, slab: &Slab) -> Result<()> {
    model.with(piece, &mut |buffer| {
        let whole = 0..buffer.numel();
        buffer.write(whole.clone(), slab.part(whole))
    })
}

/// The average that was saved of a piece.
fn saved(model: &ModelView, piece: ParamId, state: &OptimizerState) -> Result<Slab> {
    let meta = &model.pieces()[piece.0];
    let name = format!("{KIND}.{}", meta.name);
    let found = state.tensors.iter().find(|(known, _)| *known == name);
    let found = found.filter(|(_, slab)| slab.numel() == meta.numel());
    let (_, from) = found.ok_or_else(|| {
        Error::argument(
            format!(
                "the saved moving average has no '{}' of {} elements",
                meta.name,
                meta.numel()
            ),
            "Load the checkpoint of the same model",
        )
    })?;
    let mut slab = Slab::zeroed(average_dtype(meta.dtype), meta.numel());
    let into: SpanMut<'_> = slab.part_mut(0..meta.numel());
    fabric_engine::kernels::cast(from.part(0..meta.numel()), into)?;
    Ok(slab)
}

fn average_dtype(dtype: Dtype) -> Dtype {
    match dtype {
        Dtype::F64 => Dtype::F64,
        _ => Dtype::F32,
    }
}

impl Callback for Ema {
    fn on_after_setup(&mut self, _: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        match &moment.model {
            Some(model) => self.begin(model),
            None => Ok(()),
        }
    }

    fn on_after_optimizer_step(&mut self, _: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        match &moment.model {
            Some(model) if !moment.skipped => self.update(model),
            _ => Ok(()),
        }
    }

    fn on_validation_start(&mut self, _: &Fabric, _: &mut Moment<'_>) -> Result<()> {
        match self.at_validation {
            true => self.swap_in(),
            false => Ok(()),
        }
    }

    fn on_validation_end(&mut self, _: &Fabric, _: &mut Moment<'_>) -> Result<()> {
        match self.at_validation {
            true => self.swap_out(),
            false => Ok(()),
        }
    }

    fn twin(&self) -> Option<Box<dyn Callback>> {
        Some(Box::new(Self {
            averages: BTreeMap::new(), // models are a rank's own
            ..*self
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        callback::{Hook, LoopState, ModelCheckpoint},
        optim::Sgd,
        vec::VecModel,
    };

    fn run<T: Send>(ema: Ema, body: impl FnOnce(&Fabric) -> Result<T>) -> T {
        let fabric = Fabric::builder().devices(1).callback(ema).build().unwrap();
        fabric.launch(body).unwrap().unwrap()
    }

    #[test]
    fn it_follows_the_optimizer_and_stands_in_for_validation() {
        run(Ema::new(0.75).unwrap(), |fabric| {
            let model =
                VecModel::new([("w", vec![0f64, 1.0]), ("still", vec![9.0])]).freeze("still");
            let (model, mut optimizer) = fabric.setup(model, Sgd::new(1.0))?;
            let (mut own, mut average) = (vec![0.0, 1.0], vec![0.0, 1.0]);
            for step in 0..3 {
                let grad = vec![0.1 * f64::from(step), -0.3];
                fabric.backward(model.gradients(vec![Some(grad.clone()), None]))?;
                optimizer.step()?;
                optimizer.zero_grad();
                for at in 0..2 {
                    own[at] -= grad[at];
                    average[at] = 0.75 * average[at] + 0.25 * own[at];
                }
            }
            let mut state = LoopState::default();
            fabric.notify(Hook::ValidationStart, &mut state.moment())?;
            assert_eq!((model.read("w"), model.read("still")), (average, vec![9.0]));
            fabric.backward(model.gradients(vec![Some(vec![0.0, 0.0]), None]))?;
            let error = optimizer.step().unwrap_err().to_string();
            assert!(
                error.contains("averages were in the parameters' place"),
                "{error}"
            );
            fabric.notify(Hook::ValidationEnd, &mut state.moment())?;
            assert_eq!(model.read("w"), own);
            Ok(())
        });
    }

    // What is saved at the end of a validation is what training goes on from, in whatever order the two were added.
    #[test]
    fn a_checkpoint_after_validation_holds_the_models_own_values() {
        let folder = tempfile::tempdir().unwrap();
        let keep = || ModelCheckpoint::new(folder.path()).after_validation();
        let ema = || Ema::new(0.5).unwrap();
        let builder = || Fabric::builder().devices(1);
        for builder in [
            builder().callback(ema()).callback(keep()),
            builder().callback(keep()).callback(ema()),
        ] {
            let outcome = builder.build().unwrap().launch(|fabric| {
                let (model, mut optimizer) =
                    fabric.setup(VecModel::new([("w", vec![0f32])]), Sgd::new(1.0))?;
                fabric.backward(model.gradients(vec![Some(vec![-4.0])]))?;
                optimizer.step()?;
                let (mut state, mut saved) = (LoopState::default(), Vec::new());
                let mut save = |_: &std::path::Path| {
                    saved = model.read("w");
                    Ok(())
                };
                fabric.notify(Hook::ValidationStart, &mut state.moment())?;
                fabric.notify(Hook::ValidationEnd, &mut state.moment().saving(&mut save))?;
                Ok(saved)
            });
            assert_eq!(outcome.unwrap(), Some(vec![4.0]));
        }
    }

    #[test]
    fn a_warm_up_trusts_the_first_steps_less() {
        run(Ema::new(0.9).unwrap().warmup(true), |fabric| {
            let (model, mut optimizer) =
                fabric.setup(VecModel::new([("w", vec![1f32])]), Sgd::new(1.0))?;
            fabric.backward(model.gradients(vec![Some(vec![1.0])]))?;
            optimizer.step()?; // to 0, of which nine tenths are taken
            fabric.with_callback(|ema: &mut Ema| {
                assert_eq!(ema.read(&model.view())?[0].1, [0.1]);
                Ok(())
            })
        });
    }

    #[test]
    fn decays_and_strangers_are_refused() {
        for decay in [-0.1, 1.1, f64::NAN] {
            assert!(Ema::new(decay).is_err());
        }
        run(Ema::new(0.5).unwrap(), |fabric| {
            let model = fabric.setup_module(VecModel::new([("w", vec![1f32])]))?;
            let error = Ema::new(0.5)?.read(&model.view()).unwrap_err().to_string();
            assert!(error.contains("has not seen the model"), "{error}");
            Ok(())
        });
    }
}
