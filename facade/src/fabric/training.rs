//! Setting up and stepping: models and optimizers in, backward, accumulation.

use std::sync::Arc;

use fabric_engine::{
    Error as EngineError, Result as EngineResult,
    kernels::Memory,
    shard::{
        SharedComm,
        groups::Groups,
        plan::Plan,
        replicate::{agree, distribute},
        sequencer::Sequencer,
    },
};

use super::{Fabric, lock};
use crate::{
    callback::{Hook, LoopState, ModelView},
    data::Distribute,
    error::{Error, Result},
    model::{Backward, Core, FabricModule, Gradients, Model, Reach, Reporter, mistake},
    optim::Optimizer,
};

/// An optimizer that was set up: it steps on whole gradients.
pub struct FabricOptimizer<O: Optimizer> {
    optimizer: O,
    skipped: bool,
    core: Arc<Core>,
    fabric: Fabric,
}

impl<O: Optimizer> FabricOptimizer<O> {
    /// Update the parameters, then call `on_after_optimizer_step` on the callbacks. Where the loss is scaled and a gradient
    /// overflowed, on whichever rank, all ranks leave the parameters as they are ([`FabricOptimizer::was_skipped`]), and
    /// the scale falls.
    ///
    /// # Errors
    /// The optimizer's refusal, a callback's error, or a loss that is not finite whatever its scale.
    pub fn step(&mut self) -> Result<()> {
        if self.fabric.overflows(&self.core)? {
            self.skipped = true;
            return self.announce(true);
        }
        self.skipped = false;
        let (model, optimizer) = (&self.core.model, &mut self.optimizer);
        let mut sequencer = self.core.sequencer();
        if !optimizer.scales() {
            sequencer.apply_scale()?;
        }
        match &self.core.shards {
            None => optimizer.step(&**model, &Gradients::whole(&sequencer))?,
            Some(shards) => {
                let result =
                    optimizer.step(shards, &Gradients::of_pieces(&sequencer, shards.pieces()));
                if let Err(error) = result {
                    // The other ranks wait for pieces that will not come.
                    self.core.comm.aborter().abort(error.to_string());
                    return Err(error.into());
                }
                sequencer.step()?;
            }
        }
        drop(sequencer);
        self.announce(false)
    }

    fn announce(&self, skipped: bool) -> Result<()> {
        if lock(&self.fabric.inner.callbacks).is_empty() {
            return Ok(()); // a step that nobody listens to allocates nothing
        }
        let mut state = LoopState::default();
        state.learning_rates.set("lr", self.learning_rate());
        let moment = state.moment().view(ModelView::of(&self.core));
        self.fabric
            .notify(Hook::AfterOptimizerStep, &mut moment.skipped(skipped))
    }

    /// Whether the last step was skipped, because a gradient of the scaled loss overflowed.
    pub fn was_skipped(&self) -> bool {
        self.skipped
    }

    /// Forget the gradients.
    pub fn zero_grad(&mut self) {
        self.core.sequencer().zero_grad();
    }

    /// The original optimizer.
    pub fn optimizer(&self) -> &O {
        &self.optimizer
    }

    /// The original optimizer, to change its options.
    pub fn optimizer_mut(&mut self) -> &mut O {
        &mut self.optimizer
    }

    /// The learning rate.
    pub fn learning_rate(&self) -> f64 {
        self.optimizer.learning_rate()
    }

    /// Change the learning rate.
    pub fn set_learning_rate(&mut self, lr: f64) {
        self.optimizer.set_learning_rate(lr);
    }

    pub(crate) fn parts(&self) -> (&O, &Core) {
        (&self.optimizer, &self.core)
    }

    pub(crate) fn parts_mut(&mut self) -> (&mut O, &Core) {
        (&mut self.optimizer, &self.core)
    }
}

impl Fabric {
    /// Take in a model and its optimizer: all ranks prove that they built the same model, take rank 0's parameters,
    /// and from now on average gradients.
    ///
    /// # Errors
    /// Before launch, or when the ranks' models differ (says where).
    pub fn setup<M: Model, O: Optimizer>(
        &self,
        model: M,
        optimizer: O,
    ) -> Result<(FabricModule<M>, FabricOptimizer<O>)> {
        let module = self.setup_module(model)?;
        let optimizer = self.setup_optimizers(optimizer, &module);
        let mut state = LoopState::default();
        self.notify(Hook::AfterSetup, &mut state.moment().model(&module))?;
        Ok((module, optimizer))
    }

    /// Take in a model alone.
    ///
    /// # Errors
    /// As [`Fabric::setup`].
    pub fn setup_module<M: Model>(&self, model: M) -> Result<FabricModule<M>> {
        let comm = self.comm()?;
        self.check_place(&model, &comm)?;
        let row = self.inner.resolved.strategy;
        let (params, units) = (model.params().to_vec(), model.units().to_vec());
        let plan = Plan::with_units(row, self.world_size(), params, units, &self.inner.options)?;
        if self.world_size() > 1 {
            agree(&plan, &comm)?;
        }
        self.compare_types(&plan);
        self.look_for_units(&plan);
        let groups = Groups::connect(comm.clone(), &plan)?;
        let forecast = plan.forecast(&groups);
        let model = Arc::new(model);
        let reach = Arc::new(Reach(model.clone()));
        let sequencer = Sequencer::for_model(plan, groups, reach.clone())?;
        distribute(sequencer.plan(), &comm, &sequencer.mains(), &*reach)?;
        let core = Arc::new(Core::new(model.clone(), sequencer, comm, forecast));
        model.attach(Arc::new(Reporter::new(&core)));
        Arc::make_mut(&mut lock(&self.inner.models)).push(core.clone());
        Ok(FabricModule::new(model, core))
    }

    /// Refuse a model that computes on another device than this rank.
    fn check_place(&self, model: &impl Model, comm: &SharedComm) -> Result<()> {
        let ours = comm.device().map_or(Memory::Host, |device| device.memory());
        let Some(memory) = model.memory().filter(|memory| *memory != ours) else {
            return Ok(());
        };
        let place = match memory {
            Memory::Host => "cpu".to_string(),
            device => device.to_string(),
        };
        Err(Error::argument(
            format!(
                "the model is on {place}, and this rank computes on {}",
                self.device()
            ),
            "Build it on the rank's device, as fabric.init_module does, or ask for the model's with Builder::accelerator",
        ))
    }

    /// Say so when parameters are to be sharded, and nothing says when they are used.
    fn look_for_units(&self, plan: &Plan) {
        let sharded = plan.row().shard.shards_param();
        let (mut buckets, row) = (plan.buckets().iter(), plan.row().name);
        if sharded && !buckets.any(|bucket| bucket.axis.shards_param()) {
            self.warn(format!(
                "strategy {row}, but the model has no units: all parameters stay whole, as under zero2. Make its blocks \
                 units (fabric_candle::Unit::new, VecModel::in_units), which are gathered for their use"
            ));
        }
    }

    /// Say so when no parameter has the type that the precision promises.
    fn compare_types(&self, plan: &Plan) {
        let (asked, policy) = (self.precision(), self.precision().policy());
        let mut trainable = plan.params().iter().filter(|param| param.trainable);
        let first = trainable.clone().next();
        if let (Some(first), Some(_)) = (first, &self.inner.request.precision)
            && !trainable.any(|param| param.dtype == policy.param)
        {
            self.warn(format!(
                "precision {asked} computes as {}, but '{}' is {}, and so is every other: it is trained as it is. Build the \
                 model in the type that fabric.precision().policy().param names",
                policy.param, first.name, first.dtype
            ));
        }
    }

    /// Take in an optimizer for a model that was set up.
    pub fn setup_optimizers<M: Model, O: Optimizer>(
        &self,
        optimizer: O,
        module: &FabricModule<M>,
    ) -> FabricOptimizer<O> {
        FabricOptimizer {
            optimizer,
            skipped: false,
            core: module.core.clone(),
            fabric: self.clone(),
        }
    }

    /// Take in a loader, or several in a tuple: with several ranks each gets its own share of the samples, newly shuffled
    /// every epoch if it is shuffled.
    ///
    /// # Errors
    /// Before launch, or when the loader was set up already.
    pub fn setup_dataloaders<L: Distribute>(&self, loaders: L) -> Result<L> {
        self.comm()?;
        let mut loaders = loaders;
        loaders.distribute(self.global_rank(), self.world_size())?;
        Ok(loaders)
    }

    /// Run backward on a loss. Gradients are averaged over the ranks while it runs, unless inside
    /// [`Fabric::no_backward_sync`]; when it returns, they are whole.
    ///
    /// # Errors
    /// The library's error, a hook's, or a reduction's: a rank that is gone, or one that does something else. When
    /// gradients were to be reduced or parameters to be gathered, the error ends the job on all ranks.
    pub fn backward(&self, loss: impl Backward) -> Result<()> {
        self.backward_scaled(loss, 1.0)
    }

    /// [`Fabric::backward`] of the loss times `scale`: 1 / micro-batches, when accumulating.
    ///
    /// # Errors
    /// As [`Fabric::backward`].
    pub fn backward_scaled(&self, loss: impl Backward, scale: f32) -> Result<()> {
        self.comm()?;
        let cores = lock(&self.inner.models).clone(); // not locked while the library's backward runs
        if cores.is_empty() {
            return Err(mistake(
                self.global_rank(),
                "backward without a model",
                "Call fabric.setup(model, optimizer) first",
            )
            .into());
        }
        self.run(&cores, loss, scale)
            .map_err(|error| self.give_up(&cores, error).into())
    }

    fn run(&self, cores: &[Arc<Core>], loss: impl Backward, scale: f32) -> EngineResult<()> {
        let loss_scale = self.loss_scale();
        for core in cores {
            core.sequencer().begin_scaled(core.syncs(), loss_scale)?;
        }
        loss.backward(scale * loss_scale as f32)?;
        for core in cores {
            // One model takes part even when no gradient of it became ready: other ranks may wait for it. Of several,
            // those that the loss touched.
            if cores.len() > 1 && !core.sequencer().is_touched() {
                core.sequencer().cancel();
                continue;
            }
            self.finish(core)?;
        }
        Ok(())
    }

    /// Whether an update of this model's parameters is to be skipped, by a scaled loss's rule. All ranks find the same.
    fn overflows(&self, core: &Core) -> Result<bool> {
        let mut scaler = lock(&self.inner.scaler);
        let Some(scaler) = scaler.as_mut() else {
            return Ok(false);
        };
        let overflows = !core.sequencer().squares()?.is_finite();
        scaler.update(overflows)?;
        Ok(overflows)
    }

    /// A backward failed. The other ranks wait for gradients that will not come, and zeros in their place would be
    /// wrong: unless the ranks were not to meet, the job ends here.
    fn give_up(&self, cores: &[Arc<Core>], error: EngineError) -> EngineError {
        // A hook's own words come before those that a library wraps around them.
        let kept = cores.iter().find_map(|core| core.sequencer().failure());
        let error = kept.unwrap_or(error);
        let meets = |core: &Arc<Core>| core.sequencer().meets(core.syncs());
        if !cores.iter().any(meets) {
            cores.iter().for_each(|core| core.sequencer().cancel());
            return error;
        }
        for core in cores {
            core.sequencer().fail(error.clone());
        }
        if let (Ok(comm), false) = (self.comm(), error.is_from_peer()) {
            comm.aborter().abort(error.to_string());
        }
        error
    }

    /// End the backward of one model, and say which parameters it left out.
    fn finish(&self, core: &Core) -> EngineResult<()> {
        let mut sequencer = core.sequencer();
        let text = match sequencer.finish()? {
            Some(unused) => core.unused_report(unused),
            None if self.world_size() == 1 && core.syncs() => {
                core.unused_report(sequencer.unfilled())
            }
            None => None,
        };
        drop(sequencer);
        if let Some(text) = text {
            self.warn(text);
        }
        Ok(())
    }

    /// Run `body` without averaging the gradients of `module`: they accumulate on each rank, and the first backward
    /// outside averages their sum. With `enabled` false, `body` just runs.
    ///
    /// # Errors
    /// `body`'s.
    pub fn no_backward_sync<M: Model, T>(
        &self,
        module: &FabricModule<M>,
        enabled: bool,
        body: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let before = module.core.syncs();
        module.core.set_sync(before && !enabled);
        let restore = Restore {
            core: &module.core,
            sync: before,
        };
        let result = body();
        drop(restore);
        result
    }
}

struct Restore<'a> {
    core: &'a Core,
    sync: bool,
}

impl Drop for Restore<'_> {
    fn drop(&mut self) {
        self.core.set_sync(self.sync);
    }
}
