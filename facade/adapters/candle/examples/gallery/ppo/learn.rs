//! Learning from moves that were made: proximal policy optimisation (Schulman et al. 2017).

use candle_core::{Device, Result as CandleResult, Tensor};
use fabric::{Clip, Fabric, FabricModule, FabricOptimizer, ReduceOp, Result, optim::AdamW};
use fabric_candle::{CandleFabric, CandleModel, Loss};
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{
    play::Rollout,
    policy::{Policy, tensor},
};
use crate::network::scalar;

const PASSES: usize = 10; // over the same moves
const PARTS: usize = 2; // steps of the optimizer in a pass
const WORTH_OF_VALUES: f64 = 0.5;
const LARGEST_NORM: f64 = 0.5;

/// A policy that learns, on all ranks of `fabric` together: each has moves of its own, and gradients are averaged.
pub struct Learner {
    pub policy: FabricModule<CandleModel<Policy>>,
    fabric: Fabric,
    optimizer: FabricOptimizer<AdamW>,
    rng: ChaCha8Rng,
}

/// How it went, a mean over the last pass.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub struct Lesson {
    pub policy_loss: f64,
    pub value_loss: f64,
    pub entropy: f64,
    pub norm: f64,
}

/// What changes while the policy grows up.
#[derive(Clone, Copy)]
pub struct Pace {
    pub lr: f64,
    /// How far the odds of an action may go before nothing is gained any more.
    pub clip: f64,
    /// What the policy is paid for being undecided.
    pub entropy: f64,
}

impl Learner {
    pub fn new(fabric: &Fabric, policy: CandleModel<Policy>, seed: u64) -> Result<Self> {
        let (policy, optimizer) = fabric.setup(policy, AdamW::new(1e-3).weight_decay(0.0))?;
        Ok(Self {
            policy,
            fabric: fabric.clone(),
            optimizer,
            rng: fabric::seed::rng(seed),
        })
    }

    /// Learn from this rank's moves, of which every rank has as many.
    pub fn learn(&mut self, rollout: &Rollout, pace: Pace) -> Result<Lesson> {
        self.optimizer.set_learning_rate(pace.lr);
        let device = self.fabric.tensor_device()?;
        let moves = Moves::new(rollout, &self.advantages(rollout)?, &device)?;
        let mut order: Vec<u32> = (0..rollout.len() as u32).collect();
        let mut lesson = Lesson::default();
        for _ in 0..PASSES {
            lesson = Lesson::default();
            order.shuffle(&mut self.rng);
            for part in order.chunks(order.len().div_ceil(PARTS)) {
                let losses = self.step(&moves.select(part)?, pace)?;
                let share = part.len() as f64 / order.len() as f64;
                lesson.policy_loss += share * losses.policy_loss;
                lesson.value_loss += share * losses.value_loss;
                lesson.entropy += share * losses.entropy;
                lesson.norm += share * losses.norm;
            }
        }
        self.fabric.all_reduce_value(lesson, ReduceOp::Avg)
    }

    /// The advantages with mean 0 and deviation 1, over the moves of all ranks.
    fn advantages(&self, rollout: &Rollout) -> Result<Vec<f32>> {
        let advantages = || {
            rollout
                .advantages
                .iter()
                .map(|advantage| f64::from(*advantage))
        };
        let own = (
            advantages().sum::<f64>(),
            advantages().map(|own| own * own).sum::<f64>(),
            rollout.len(),
        );
        let (sum, squares, count) = self.fabric.all_reduce_value(own, ReduceOp::Sum)?;
        let mean = sum / count as f64;
        let deviation = (squares / count as f64 - mean * mean).max(0.0).sqrt() + 1e-8;
        Ok(advantages()
            .map(|advantage| ((advantage - mean) / deviation) as f32)
            .collect())
    }

    fn step(&mut self, moves: &Moves, pace: Pace) -> Result<Lesson> {
        let (odds, values) = self.policy.forward(&moves.sights)?;
        let (policy_loss, value_loss, entropy) = moves.losses(&odds, &values, pace.clip)?;
        let loss = ((&policy_loss + value_loss.affine(WORTH_OF_VALUES, 0.0)?)?
            - entropy.affine(pace.entropy, 0.0)?)?;
        self.fabric.backward(Loss(&loss))?;
        let norm = self
            .fabric
            .clip_gradients(&self.policy, Clip::norm(LARGEST_NORM))?;
        self.optimizer.step()?;
        self.optimizer.zero_grad();
        Ok(Lesson {
            policy_loss: scalar(&policy_loss)?,
            value_loss: scalar(&value_loss)?,
            entropy: scalar(&entropy)?,
            norm: norm.unwrap_or(f64::NAN),
        })
    }
}

/// Moves as tensors: [moves, 4], [moves, 1] and [moves].
struct Moves {
    sights: Tensor,
    actions: Tensor,
    odds: Tensor,
    advantages: Tensor,
    returns: Tensor,
}

impl Moves {
    fn new(rollout: &Rollout, advantages: &[f32], device: &Device) -> CandleResult<Self> {
        Ok(Self {
            sights: tensor(rollout.sights.iter().copied(), device)?,
            actions: Tensor::new(&rollout.actions[..], device)?.unsqueeze(1)?,
            odds: Tensor::new(&rollout.odds[..], device)?,
            advantages: Tensor::new(advantages, device)?,
            returns: Tensor::new(&rollout.returns[..], device)?,
        })
    }

    fn select(&self, which: &[u32]) -> CandleResult<Self> {
        let which = Tensor::new(which, self.odds.device())?;
        let select = |tensor: &Tensor| tensor.index_select(&which, 0);
        Ok(Self {
            sights: select(&self.sights)?,
            actions: select(&self.actions)?,
            odds: select(&self.odds)?,
            advantages: select(&self.advantages)?,
            returns: select(&self.returns)?,
        })
    }

    /// The policy's loss, the values', and the policy's entropy.
    fn losses(
        &self,
        odds: &Tensor,
        values: &Tensor,
        clip: f64,
    ) -> CandleResult<(Tensor, Tensor, Tensor)> {
        let now = odds.gather(&self.actions, 1)?.squeeze(1)?;
        let ratio = (now - &self.odds)?.exp()?;
        let free = (&ratio * &self.advantages)?;
        let near = (ratio.clamp(1.0 - clip, 1.0 + clip)? * &self.advantages)?;
        let policy = free.minimum(&near)?.mean_all()?.neg()?;
        let value = (values - &self.returns)?.sqr()?.mean_all()?;
        let entropy = (odds.exp()? * odds)?.sum(1)?.mean_all()?.neg()?;
        Ok((policy, value, entropy))
    }
}
