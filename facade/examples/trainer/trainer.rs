//! A trainer to begin your own with: epochs, accumulation, clipping, schedules, validation, callbacks, and checkpoints from
//! which it goes on to the same loss, also in the middle of an epoch, under another strategy or on other numbers of ranks.
//! It knows nothing of any tensor library: copy it, and change what you like.

use std::path::{Path, PathBuf};

use fabric::{
    Clip, Fabric, FabricModule, FabricOptimizer, ReduceOp, Result, State,
    callback::{Ema, Hook, LoopState, ModelCheckpoint, Moment, Progress},
    data::{DataLoader, Dataset, LoaderState},
    model::{Backward, Model},
    optim::Optimizer,
    precision::LossScalerState,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What is trained: the steps of a loop that are not the loop's.
pub trait Task<M: Model> {
    /// What a loader gives.
    type Batch: Send + 'static;

    /// The batch's mean loss: its value, and what backward runs on.
    fn training_step<'a>(
        &'a self,
        model: &'a FabricModule<M>,
        batch: &'a Self::Batch,
    ) -> Result<(f64, impl Backward + 'a)>;

    /// Numbers for every sample of the batch, such as its loss and whether it was classified correctly, by the names that
    /// [`Task::scores`] gives.
    fn validation_step(
        &self,
        model: &FabricModule<M>,
        batch: &Self::Batch,
    ) -> Result<Vec<Vec<f64>>>;

    /// What the numbers are called: their means over all samples are the metrics of the validation.
    fn scores(&self) -> Vec<&'static str>;

    /// Samples in a batch.
    fn samples(&self, batch: &Self::Batch) -> u64;

    /// The learning rate of step `step` (from 0), if it has a schedule.
    fn learning_rate(&self, step: u64) -> Option<f64> {
        let _ = step;
        None
    }
}

/// How long, how often, how much.
#[derive(Clone, Debug)]
pub struct Trainer {
    /// Epochs, at most.
    pub max_epochs: u64,
    /// Steps of the optimizer, at most.
    pub max_steps: Option<u64>,
    /// Batches in a step.
    pub accumulate: usize,
    /// How gradients are clipped.
    pub clip: Option<Clip>,
    /// Batches of an epoch that are used, at most.
    pub limit_train_batches: usize,
    /// Batches of a validation that are used, at most.
    pub limit_val_batches: usize,
    /// Epochs from one validation to the next.
    pub validate_every: u64,
    /// Steps from one logged loss to the next.
    pub log_every: u64,
    /// A checkpoint to go on from.
    pub resume: Option<PathBuf>,
}

impl Default for Trainer {
    fn default() -> Self {
        Self {
            max_epochs: 10,
            max_steps: None,
            accumulate: 1,
            clip: None,
            limit_train_batches: usize::MAX,
            limit_val_batches: usize::MAX,
            validate_every: 1,
            log_every: 10,
            resume: None,
        }
    }
}

/// What [`Trainer::fit`] has trained.
pub struct Trained<M: Model, O: Optimizer> {
    pub model: FabricModule<M>,
    pub optimizer: FabricOptimizer<O>,
    /// How far it came, and its latest numbers.
    pub state: LoopState,
    /// The loss of every step on this rank, from where it began.
    pub losses: Vec<f64>,
}

impl Trainer {
    /// The newest checkpoint that a [`ModelCheckpoint`] has left in `folder`, to go on from; none is no error.
    pub fn resume_latest(mut self, folder: impl AsRef<Path>) -> Result<Self> {
        self.resume = ModelCheckpoint::latest(folder)?;
        Ok(self)
    }

    /// Train, on all ranks.
    pub fn fit<M, O, T, D, V>(
        &self,
        fabric: &Fabric,
        task: &T,
        (model, optimizer): (M, O),
        (train, validation): (DataLoader<D, T::Batch>, DataLoader<V, T::Batch>),
    ) -> Result<Trained<M, O>>
    where
        M: Model,
        O: Optimizer,
        T: Task<M>,
        D: Dataset + 'static,
        V: Dataset + 'static,
    {
        let (model, optimizer) = fabric.setup(model, optimizer)?;
        let (train, validation) = fabric.setup_dataloaders((train, validation))?;
        let mut run = Run {
            trainer: self,
            fabric,
            task,
            train,
            validation,
            trained: Trained {
                model,
                optimizer,
                state: LoopState::default(),
                losses: Vec::new(),
            },
        };
        if let Some(path) = &self.resume {
            run.load(path)?;
        }
        let result = run.epochs();
        if let Err(error) = &result {
            let mut moment = run.trained.state.moment().error(error);
            fabric.notify(Hook::Exception, &mut moment)?;
        }
        result.map(|()| run.trained)
    }
}

/// One call of [`Trainer::fit`].
struct Run<'a, M: Model, O: Optimizer, T: Task<M>, D: Dataset, V: Dataset> {
    trainer: &'a Trainer,
    fabric: &'a Fabric,
    task: &'a T,
    train: DataLoader<D, T::Batch>,
    validation: DataLoader<V, T::Batch>,
    trained: Trained<M, O>,
}

impl<M, O, T, D, V> Run<'_, M, O, T, D, V>
where
    M: Model,
    O: Optimizer,
    T: Task<M>,
    D: Dataset + 'static,
    V: Dataset + 'static,
{
    fn epochs(&mut self) -> Result<()> {
        self.trained.state.progress.of_epochs = Some(self.trainer.max_epochs);
        self.tell(Hook::TrainStart, |moment| moment)?;
        while self.trained.state.progress.epoch < self.trainer.max_epochs && !self.is_over() {
            self.train_epoch()?;
            let epoch = self.trained.state.progress.epoch;
            if (epoch + 1).is_multiple_of(self.trainer.validate_every)
                && self.trainer.limit_val_batches > 0
                && !self.validation.is_empty()
            {
                self.validate()?;
            }
            let next = self.after_epoch();
            self.tell_and_save(Hook::TrainEpochEnd, next, None)?;
            self.trained.state.progress = next.progress;
        }
        self.tell(Hook::TrainEnd, |moment| moment)
    }

    fn is_over(&self) -> bool {
        let steps = self.trained.state.progress.steps;
        self.trained.state.stopped().is_some()
            || self.trainer.max_steps.is_some_and(|most| steps >= most)
    }

    fn train_epoch(&mut self) -> Result<()> {
        let (fabric, task) = (self.fabric, self.task);
        let before = self.trained.state.progress.batch; // where an interrupted epoch goes on
        let left = self
            .trainer
            .limit_train_batches
            .saturating_sub(before as usize);
        self.trained.state.progress.of_batches = Some(before + left.min(self.train.len()) as u64);
        self.tell(Hook::TrainEpochStart, |moment| moment)?;
        let batches = self.train.iter().take(left);
        let mut mean = 0.0;
        for micro in fabric.accumulate(self.trainer.accumulate).over(batches) {
            let micro = micro?;
            self.tell(Hook::TrainBatchStart, |moment| moment)?;
            if let Some(lr) = task.learning_rate(self.trained.state.progress.steps) {
                self.trained.optimizer.set_learning_rate(lr);
            }
            let lr = self.trained.optimizer.learning_rate();
            self.trained.state.learning_rates.set("lr", lr);
            let Trained { model, state, .. } = &mut self.trained;
            let (loss, backward) = task.training_step(model, &micro.batch)?;
            fabric.notify(
                Hook::BeforeBackward,
                &mut state.moment().model(model).loss(loss),
            )?;
            micro.backward(model, backward)?;
            fabric.notify(
                Hook::AfterBackward,
                &mut state.moment().model(model).loss(loss),
            )?;
            mean += loss * micro.weight();
            state.progress.batches += 1;
            state.progress.samples += task.samples(&micro.batch);
            if micro.is_last() {
                state.metrics.set("loss", mean);
                let skipped = self.step(mean)?;
                // Only between steps can the loop be saved.
                self.tell_and_save(Hook::TrainBatchEnd, self.place(), Some((mean, skipped)))?;
                self.trained.losses.push(std::mem::take(&mut mean));
            }
            self.trained.state.progress.batch += 1;
            // Not within a step, whose other batches have left the loader already.
            if micro.is_last() && self.is_over() {
                break;
            }
        }
        Ok(())
    }

    /// Clip, update, forget. Whether the update was skipped, because a scaled loss overflowed.
    fn step(&mut self, loss: f64) -> Result<bool> {
        if let Some(clip) = self.trainer.clip {
            self.fabric.clip_gradients(&self.trained.model, clip)?;
        }
        self.tell(Hook::BeforeOptimizerStep, |moment| moment.loss(loss))?;
        self.trained.optimizer.step()?;
        self.tell(Hook::BeforeZeroGrad, |moment| moment)?;
        self.trained.optimizer.zero_grad();
        let progress = &mut self.trained.state.progress;
        progress.steps += 1;
        if progress.steps.is_multiple_of(self.trainer.log_every) {
            let mean = self.fabric.all_reduce_value(loss, ReduceOp::Avg)?;
            self.fabric.log("train_loss", mean, progress.steps)?;
        }
        Ok(self.trained.optimizer.was_skipped())
    }

    /// Means over all samples of all ranks, each counted once.
    fn validate(&mut self) -> Result<()> {
        self.tell(Hook::ValidationStart, |moment| moment)?;
        self.tell(Hook::ValidationEpochStart, |moment| moment)?;
        let names = self.task.scores();
        let (mut sums, mut count) = (vec![0.0; names.len()], 0.0);
        self.validation.set_epoch(0);
        let batches = self.validation.iter().take(self.trainer.limit_val_batches);
        for (number, batch) in batches.enumerate() {
            let batch = batch?;
            self.tell(Hook::ValidationBatchStart, |moment| {
                moment.batch(number as u64)
            })?;
            let scores = self.task.validation_step(&self.trained.model, &batch)?;
            for sample in self.fabric.gather_for_metrics(&self.validation, scores)? {
                sums.iter_mut()
                    .zip(sample)
                    .for_each(|(sum, score)| *sum += score);
                count += 1.0;
            }
            self.tell(Hook::ValidationBatchEnd, |moment| {
                moment.batch(number as u64)
            })?;
        }
        let steps = self.trained.state.progress.steps;
        for (name, sum) in names.into_iter().zip(sums) {
            self.trained.state.metrics.set(name, sum / count);
            self.fabric.log(name, sum / count, steps)?;
        }
        self.tell(Hook::ValidationEpochEnd, |moment| moment)?;
        let next = self.after_epoch();
        self.tell_and_save(Hook::ValidationEnd, next, None)
    }

    /// The next epoch, unless this one was broken off.
    fn after_epoch(&self) -> Place {
        let progress = self.trained.state.progress;
        if progress.of_batches.is_some_and(|all| progress.batch < all) {
            let loader = self.train.state();
            return Place { progress, loader };
        }
        let (epoch, batch) = (progress.epoch + 1, 0);
        Place {
            progress: Progress {
                epoch,
                batch,
                ..progress
            },
            loader: LoaderState { epoch, consumed: 0 },
        }
    }

    /// Behind the batch that was taken.
    fn place(&self) -> Place {
        let progress = self.trained.state.progress;
        Place {
            progress: Progress {
                batch: progress.batch + 1,
                ..progress
            },
            loader: self.train.state(),
        }
    }

    /// Announce a moment, with the model.
    fn tell(&mut self, hook: Hook, more: impl FnOnce(Moment<'_>) -> Moment<'_>) -> Result<()> {
        let Trained { model, state, .. } = &mut self.trained;
        self.fabric
            .notify(hook, &mut more(state.moment().model(model)))
    }

    /// Announce a moment in which the whole loop can be saved, to go on from `place`.
    fn tell_and_save(
        &mut self,
        hook: Hook,
        place: Place,
        step: Option<(f64, bool)>, // its loss, and whether it was skipped
    ) -> Result<()> {
        let fabric = self.fabric;
        let Trained {
            model,
            optimizer,
            state,
            ..
        } = &mut self.trained;
        let mut whole = Whole {
            place,
            callbacks: fabric.callback_states()?, // now: one that saves is busy, and would be left out
            scaler: fabric.loss_scaler_state(),
        };
        let mut save = |path: &Path| {
            // What the others have made of this moment meanwhile.
            whole.callbacks.extend(fabric.callback_states()?);
            let saved = fabric.with_callback(|ema: &mut Ema| {
                let state = whole.state(model, optimizer);
                fabric.save(path, state.average("ema", ema, model))
            })?;
            match saved {
                Some(()) => Ok(()),
                None => fabric.save(path, whole.state(model, optimizer)),
            }
        };
        let mut moment = state.moment().model(model).saving(&mut save);
        if let Some((loss, skipped)) = step {
            moment = moment.loss(loss).skipped(skipped);
        }
        fabric.notify(hook, &mut moment)
    }

    fn load(&mut self, path: &Path) -> Result<()> {
        let mut whole = Whole::default();
        let Trained {
            model,
            optimizer,
            state,
            ..
        } = &mut self.trained;
        let loaded = self.fabric.with_callback(|ema: &mut Ema| {
            let state = whole.state(model, optimizer);
            self.fabric.load(path, state.average("ema", ema, model))
        })?;
        if loaded.is_none() {
            self.fabric.load(path, whole.state(model, optimizer))?;
        }
        self.fabric.load_callback_states(&whole.callbacks)?;
        self.fabric.load_loss_scaler_state(whole.scaler)?;
        state.progress = whole.place.progress;
        self.train.resume(whole.place.loader);
        Ok(())
    }
}

/// Where a loop goes on.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Place {
    progress: Progress,
    loader: LoaderState,
}

/// What a checkpoint holds beside model and optimizer.
#[derive(Default)]
struct Whole {
    place: Place,
    callbacks: Map<String, Value>,
    scaler: Option<LossScalerState>,
}

impl Whole {
    fn state<'a, M: Model, O: Optimizer>(
        &'a mut self,
        model: &'a FabricModule<M>,
        optimizer: &'a mut FabricOptimizer<O>,
    ) -> State<'a> {
        State::new()
            .model("model", model)
            .optimizer("optimizer", optimizer)
            .value("place", &mut self.place)
            .value("callbacks", &mut self.callbacks)
            .value("scaler", &mut self.scaler)
    }
}
