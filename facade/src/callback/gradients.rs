//! A callback that logs how large gradients are.

use super::{Callback, Metrics, ModelView, Moment};
use crate::{Error, Fabric, ReduceOp, Result};

/// Logs the 2-norm of the gradients before an optimizer's step, of all (`grad_norm`) and of groups (`grad_norm/blocks.0`), as
/// the optimizer will see them: reduced, and clipped if they are. Right under every strategy: ranks add what they hold.
#[derive(Clone, Debug)]
pub struct GradientStatistics {
    every: u64,
    depth: usize,
}

impl GradientStatistics {
    /// Of all gradients together, at every `every`th step.
    pub fn new(every: u64) -> Self {
        let every = every.max(1);
        Self { every, depth: 0 }
    }

    /// Also of groups: parameters whose names begin with the same `parts` parts between dots are one.
    pub fn groups(mut self, parts: usize) -> Self {
        self.depth = parts;
        self
    }

    /// Also of each parameter.
    pub fn params(self) -> Self {
        self.groups(usize::MAX)
    }

    /// The norms, on all ranks, which call this together.
    ///
    /// # Errors
    /// When a rank is gone.
    pub fn norms(&self, fabric: &Fabric, model: &ModelView) -> Result<Metrics> {
        let mut groups: Vec<String> = Vec::new(); // the same on all ranks
        let mut group_of = Vec::new(); // by parameter
        for param in model.params() {
            let parts: Vec<_> = param.name.split('.').take(self.depth).collect();
            let name = parts.join(".");
            let index = groups.iter().position(|known| *known == name);
            group_of.push(index.unwrap_or(groups.len()));
            if index.is_none() {
                groups.push(name);
            }
        }
        let mut squares = vec![0f64; groups.len()];
        for piece in model.trained() {
            let Some(grad) = model.gradient(piece)? else {
                continue;
            };
            let sum: f64 = grad.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            squares[group_of[model.whole(piece).0]] += sum / model.copies(piece) as f64;
        }
        if fabric.world_size() > 1 {
            fabric.all_reduce(&mut squares, ReduceOp::Sum)?;
        }
        let mut norms = Metrics::new();
        norms.set("grad_norm", squares.iter().sum::<f64>().sqrt());
        if self.depth > 0 {
            for (name, squares) in groups.iter().zip(&squares) {
                norms.set(format!("grad_norm/{name}"), squares.sqrt());
            }
        }
        Ok(norms)
    }
}

impl Callback for GradientStatistics {
    fn on_before_optimizer_step(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        let step = moment.progress.steps;
        if !step.is_multiple_of(self.every) {
            return Ok(());
        }
        let model = moment.model.as_ref().ok_or_else(|| {
            Error::argument(
                "GradientStatistics was shown no model",
                "Show it: fabric.notify(Hook::BeforeOptimizerStep, &mut state.moment().model(&model))",
            )
        })?;
        let norms = self.norms(fabric, model)?;
        let named: Vec<_> = norms.iter().collect();
        fabric.log_dict(&named, step)
    }

    fn twin(&self) -> Option<Box<dyn Callback>> {
        Some(Box::new(self.clone()))
    }
}
