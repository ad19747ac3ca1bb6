//! The networks: an actor, who says what to do, and a critic, who says what is to be expected.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, ops::log_softmax};

use crate::{
    network::{Activation, Mlp},
    ppo::cartpole::Sight,
};

const HIDDEN: usize = 64;

pub struct Policy {
    actor: Mlp,
    critic: Mlp,
    device: Device,
}

impl Policy {
    pub fn new(vb: VarBuilder) -> Result<Self> {
        let mlp = |name: &str, outputs| {
            let sizes = [4, HIDDEN, HIDDEN, outputs];
            Mlp::new(&sizes, Activation::Tanh, &vb.pp(name))
        };
        Ok(Self {
            actor: mlp("actor", 2)?,
            critic: mlp("critic", 1)?,
            device: vb.device().clone(),
        })
    }

    /// sights: [rows, 4] -> the logarithms of the actions' odds, f32[rows, 2]; the values, f32[rows].
    pub fn forward(&self, sights: &Tensor) -> Result<(Tensor, Tensor)> {
        let odds = log_softmax(&self.actor.forward(sights)?.to_dtype(DType::F32)?, 1)?;
        let values = self.critic.forward(sights)?.squeeze(1)?;
        Ok((odds, values.to_dtype(DType::F32)?))
    }

    /// [`Policy::forward`] of what was seen, to act by.
    pub fn look(&self, sights: &[Sight]) -> Result<(Vec<[f32; 2]>, Vec<f32>)> {
        let sights = sights.iter().flatten().map(|seen| *seen as f32);
        let (odds, values) = self.forward(&tensor(sights, &self.device)?)?;
        let odds = odds.to_vec2::<f32>()?;
        let odds = odds.into_iter().map(|odds| [odds[0], odds[1]]);
        Ok((odds.collect(), values.to_vec1()?))
    }
}

/// Sights, one behind the other, as f32[rows, 4].
pub fn tensor(sights: impl Iterator<Item = f32>, device: &Device) -> Result<Tensor> {
    Tensor::from_iter(sights, device)?.reshape(((), 4))
}
