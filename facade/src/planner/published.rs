//! What others have published for their systems, as formulas: to set our plans beside, and to be tested against the tables
//! that they print. Bytes; `params` elements, `ranks` that share the states.

/// The stages of ZeRO (Rajbhandari et al. 2020, section 3 and table 1), for fp16 parameters and gradients and Adam's 12
/// bytes of states in fp32: stage 0 is plain data parallelism.
///
/// # Panics
/// Beyond stage 3.
pub fn zero(stage: usize, params: f64, ranks: f64) -> f64 {
    match stage {
        0 => 16.0 * params,
        1 => 4.0 * params + 12.0 * params / ranks,
        2 => 2.0 * params + 14.0 * params / ranks,
        3 => 16.0 * params / ranks,
        _ => panic!("ZeRO has the stages 0 to 3"),
    }
}

/// The types of Megatron's parameters and gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Megatron {
    /// fp16 parameters and gradients, and gradients once more in fp32.
    Fp16,
    /// bf16 parameters, fp32 gradients.
    Bf16,
    /// fp32 throughout.
    Fp32,
}

/// Megatron's bytes a parameter with its distributed optimizer over `ranks` (user guide, "Distributed Optimizer"); with
/// one rank, those without it.
pub fn megatron(types: Megatron, ranks: f64) -> f64 {
    match types {
        Megatron::Fp16 => 4.0 + 16.0 / ranks,
        Megatron::Bf16 => 6.0 + 12.0 / ranks,
        Megatron::Fp32 => 8.0 + 8.0 / ranks,
    }
}

/// A machine's memory by DeepSpeed's estimators (docs, "Memory Requirements").
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeepSpeed {
    /// Bytes of a GPU.
    pub gpu: f64,
    /// Bytes of a machine's own memory.
    pub cpu: f64,
}

/// What a job is, for DeepSpeed's estimators.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cluster {
    /// Parameters.
    pub params: f64,
    /// Parameters of the largest layer.
    pub largest: f64,
    /// GPUs in a machine.
    pub gpus: f64,
    /// Machines.
    pub nodes: f64,
}

/// DeepSpeed's head-room for what it does not count.
const SLACK: f64 = 1.5;

impl Cluster {
    /// Stage 2, and whether the optimizer lies in the machine's own memory.
    pub fn stage_2(&self, offload: bool) -> DeepSpeed {
        let (params, ranks) = (self.params, self.gpus * self.nodes);
        match offload {
            true => DeepSpeed {
                gpu: 2.0 * params,
                cpu: params * (4.0 * ranks).max(16.0) * SLACK,
            },
            false => DeepSpeed {
                gpu: 2.0 * params + 18.0 * params / ranks,
                cpu: 4.0 * self.gpus * params * SLACK,
            },
        }
    }

    /// Stage 3. `offload`: nothing, the optimizer, or the parameters too; `init`: whether the model is built in shards
    /// (`zero.Init`).
    pub fn stage_3(&self, offload: Offload, init: bool) -> DeepSpeed {
        let (params, ranks) = (self.params, self.gpus * self.nodes);
        let layer = 4.0 * self.largest;
        let built = |states: f64| match init {
            true => params * states / self.nodes,
            false => params * (4.0 * self.gpus).max(states / self.nodes),
        };
        match offload {
            Offload::Nothing => DeepSpeed {
                gpu: layer + 18.0 * params / ranks,
                cpu: 4.0 * self.gpus * SLACK * if init { self.largest } else { params },
            },
            Offload::Optimizer => DeepSpeed {
                gpu: layer + 2.0 * params / ranks,
                cpu: built(16.0) * SLACK,
            },
            Offload::All => DeepSpeed {
                gpu: layer,
                cpu: built(18.0) * SLACK,
            },
        }
    }
}

/// What lies in a machine's own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Nothing.
    Nothing,
    /// The optimizer's states.
    Optimizer,
    /// The parameters too.
    All,
}
