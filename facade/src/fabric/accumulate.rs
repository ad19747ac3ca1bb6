//! Accumulating gradients over micro-batches, right in three places where a hand-written loop goes wrong: which micro-batch
//! synchronises, what each is weighed by, and what happens to the last ones of an epoch.

use fabric_engine::comm::ReduceOp;

use super::Fabric;
use crate::{
    error::{Error, Result},
    model::{Backward, FabricModule, Model},
};

type Weigh<'a, B> = Box<dyn Fn(&B) -> f64 + 'a>;

/// Micro-batches to be made into steps: [`Fabric::accumulate`].
pub struct Accumulate<'a, B> {
    fabric: &'a Fabric,
    micro_batches: usize,
    weigh: Option<Weigh<'a, B>>,
}

/// One micro-batch, and its place in its step.
pub struct Micro<'a, B> {
    /// What the loader gave.
    pub batch: B,
    fabric: &'a Fabric,
    index: usize,
    count: usize,
    weight: f64,
}

impl Fabric {
    /// Make steps of `micro_batches` batches each; the last of an epoch has what is left. The mean over a step's batches is
    /// what is differentiated: each weighs the same, or, with [`Accumulate::weighted`], as much as it has tokens.
    ///
    /// ```
    /// use fabric::{Fabric, data::DataLoader, optim::Sgd, vec::VecModel};
    ///
    /// let fabric = Fabric::builder().devices(2).build()?;
    /// fabric.launch_threads(|fabric| {
    ///     let (model, mut optimizer) = fabric.setup(VecModel::new([("w", vec![0f32])]), Sgd::new(1.0))?;
    ///     let loader = fabric.setup_dataloaders(DataLoader::new(vec![1f32, 2.0, 3.0, 4.0, 5.0, 6.0]))?;
    ///     let mut steps = 0;
    ///     for micro in fabric.accumulate(2).over(&loader) {
    ///         let micro = micro?;
    ///         let loss = model.gradients(vec![Some(micro.batch.clone())]);
    ///         micro.backward(&model, loss)?; // communicates once a step
    ///         if micro.is_last() {
    ///             optimizer.step()?;
    ///             optimizer.zero_grad();
    ///             steps += 1;
    ///         }
    ///     }
    ///     // Two ranks have three batches each: a step of two, and one of the one that is left.
    ///     assert_eq!((steps, model.read("w")), (2, vec![-(1.0 + 2.0 + 3.0 + 4.0) / 4.0 - (5.0 + 6.0) / 2.0]));
    ///     Ok(())
    /// })?;
    /// # Ok::<(), fabric::Error>(())
    /// ```
    ///
    /// # Panics
    /// When `micro_batches` is 0.
    pub fn accumulate<B>(&self, micro_batches: usize) -> Accumulate<'_, B> {
        assert!(
            micro_batches > 0,
            "steps of 0 micro-batches. Ask for at least one"
        );
        Accumulate {
            fabric: self,
            micro_batches,
            weigh: None,
        }
    }
}

impl<'a, B: 'a> Accumulate<'a, B> {
    /// Weigh each batch by `weight`, such as its tokens or its samples: its loss is a mean over so many. A step is then the
    /// mean over all of them, of all its batches and of all ranks, which costs one more all_reduce of a number.
    pub fn weighted(self, weight: impl Fn(&B) -> f64 + 'a) -> Self {
        Self {
            weigh: Some(Box::new(weight)),
            ..self
        }
    }

    /// The micro-batches of `batches`, such as a loader. Those of a step are read before its first is handed out, because
    /// what each weighs depends on how many there are. The first error is the last item.
    pub fn over(
        self,
        batches: impl IntoIterator<Item = Result<B>> + 'a,
    ) -> impl Iterator<Item = Result<Micro<'a, B>>> + 'a
    where
        B: 'a,
    {
        let mut batches = batches.into_iter().fuse();
        let mut step = Vec::new().into_iter();
        let mut ended = false;
        std::iter::from_fn(move || {
            if let Some(micro) = step.next() {
                return Some(Ok(micro));
            }
            if ended {
                return None;
            }
            let read: Result<Vec<B>> = batches.by_ref().take(self.micro_batches).collect();
            let read = read.and_then(|read| self.step(read));
            match read {
                Err(error) => {
                    ended = true;
                    Some(Err(error))
                }
                Ok(micros) => {
                    step = micros.into_iter();
                    step.next().map(Ok)
                }
            }
        })
    }

    /// The micro-batches of one step.
    fn step(&self, batches: Vec<B>) -> Result<Vec<Micro<'a, B>>> {
        let count = batches.len();
        let mut weights = vec![1.0 / count as f64; count];
        if let (Some(weigh), true) = (&self.weigh, count > 0) {
            for (weight, batch) in weights.iter_mut().zip(&batches) {
                *weight = weigh(batch);
                if !(*weight >= 0.0 && weight.is_finite()) {
                    return Err(Error::argument(
                        format!("a micro-batch of weight {weight}"),
                        "Give a finite number, not below 0, such as the number of tokens",
                    ));
                }
            }
            // Gradients are averaged over ranks; what is wanted is the sum over ranks of weights, by their total.
            let total = weights.iter().sum();
            let mean: f64 = self.fabric.all_reduce_value(total, ReduceOp::Avg)?;
            let factor = if mean > 0.0 { 1.0 / mean } else { 0.0 };
            weights.iter_mut().for_each(|weight| *weight *= factor);
        }
        let micros = batches.into_iter().zip(weights).enumerate();
        Ok(micros
            .map(|(index, (batch, weight))| Micro {
                batch,
                fabric: self.fabric,
                index,
                count,
                weight,
            })
            .collect())
    }
}

impl<B> Micro<'_, B> {
    /// Its number in its step, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// How many its step has.
    pub fn count(&self) -> usize {
        self.count
    }

    /// What its loss is multiplied by.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// Whether it is its step's last: after its backward, gradients are those of the whole step, and the optimizer steps.
    pub fn is_last(&self) -> bool {
        self.index + 1 == self.count
    }

    /// Run backward on this batch's loss, weighed; the step's last batch synchronises `module`'s gradients.
    ///
    /// # Errors
    /// As [`Fabric::backward`].
    pub fn backward<M: Model>(&self, module: &FabricModule<M>, loss: impl Backward) -> Result<()> {
        self.fabric.no_backward_sync(module, !self.is_last(), || {
            self.fabric.backward_scaled(loss, self.weight as f32)
        })
    }
}
