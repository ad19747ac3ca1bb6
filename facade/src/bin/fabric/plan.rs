//! `fabric plan` says what a job would need, before there is one.

use clap::ValueEnum;
use fabric::{
    Error, Result,
    engine::{
        comm::Link,
        shard::plan::{Accumulate, Options, Reshard, bytes_text, several},
    },
    planner::{Description, parse_bytes, parse_count, published},
};

/// Say what a rank would need and send, from a description alone: no model, no ranks, no device
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fabric plan --params 70b --layers 80 --world 64 --strategy fsdp --precision bf16-mixed --memory 80g
  fabric plan --params 7.5b --layers 36 --world 64 --strategy zero1 --precision 16-mixed
  fabric plan --params 13b --layers 40 --world 32 --strategy hsdp --group 8 --gb-per-s 25 --latency-us 8")]
pub(crate) struct PlanArgs {
    /// Parameters: 70b, 1.3b, 350m
    #[arg(long)]
    params: String,
    /// Layers, over which they are spread evenly; each is a unit
    #[arg(long, default_value_t = 1)]
    layers: usize,
    /// Ranks
    #[arg(long)]
    world: usize,
    /// single, ddp, zero1, zero2, fsdp or hsdp
    #[arg(long, default_value = "fsdp")]
    strategy: String,
    /// 32-true, 64-true, bf16-true, 16-true, bf16-mixed or 16-mixed
    #[arg(long, default_value = "bf16-mixed")]
    precision: String,
    /// The optimizer
    #[arg(long, value_enum, default_value_t = Optimizer::Adamw)]
    optimizer: Optimizer,
    /// Ranks in a group that shards, under hsdp
    #[arg(long)]
    group: Option<usize>,
    /// Micro-batches a step
    #[arg(long, default_value_t = 1)]
    micro_batches: usize,
    /// Keep full gradients between micro-batches, and reduce once: Accumulate::Keep
    #[arg(long)]
    keep_gradients: bool,
    /// Keep a unit's parameters from its forward until the update: Reshard::No
    #[arg(long)]
    no_reshard: bool,
    /// Units that are gathered ahead
    #[arg(long, default_value_t = 1)]
    prefetch: usize,
    /// What a rank has: 80g, or 80gib in powers of 1024
    #[arg(long)]
    memory: Option<String>,
    /// The wire's bandwidth a rank, in GB/s, to say how long a step's communication takes
    #[arg(long)]
    gb_per_s: Option<f64>,
    /// What a message costs, in microseconds; counts where --gb-per-s is given
    #[arg(long, default_value_t = 10.0)]
    latency_us: f64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Optimizer {
    Adamw,
    Adam,
    Lion,
    Momentum,
    Sgd,
}

pub(crate) fn plan(args: &PlanArgs) -> Result<String> {
    let params = parse_count(&args.params)?;
    let memory = args.memory.as_deref().map(parse_bytes).transpose()?;
    if args.micro_batches == 0 {
        return Err(Error::argument(
            "a step of 0 micro-batches",
            "Give at least 1",
        ));
    }
    let options = Options {
        group: args.group,
        prefetch: args.prefetch,
        accumulate: match args.keep_gradients {
            true => Accumulate::Keep,
            false => Accumulate::Reduce,
        },
        reshard_after_forward: match args.no_reshard {
            true => Reshard::No,
            false => Reshard::Yes,
        },
        ..Options::default()
    };
    let states = match args.optimizer {
        Optimizer::Adamw | Optimizer::Adam => 2,
        Optimizer::Lion | Optimizer::Momentum => 1,
        Optimizer::Sgd => 0,
    };
    let description = Description::new(params, args.layers, args.world, &args.strategy)?
        .precision(&args.precision)?
        .states(states)
        .options(options);
    let link = match args.gb_per_s {
        Some(speed) if !(speed > 0.0 && args.latency_us >= 0.0) => {
            return Err(Error::argument(
                format!("a wire of {speed} GB/s and {} us", args.latency_us),
                "Give a positive bandwidth and a latency",
            ));
        }
        speed => speed.map(|speed| Link {
            alpha_s: args.latency_us * 1e-6,
            bytes_per_s: speed * 1e9,
        }),
    };
    let mut lines = vec![description.explain(link)?.trim_end().to_string()];
    let sharded = description.plan()?.row().shard.shards_param();
    if sharded && args.layers == 1 {
        lines.push(
            "one layer is one unit, which is whole while it is used: give the model's --layers"
                .into(),
        );
    }
    if args.micro_batches > 1 {
        let spent = description.forecast()?.total(args.micro_batches);
        lines.push(format!(
            "a step of {} micro-batches sends {} in {}",
            args.micro_batches,
            bytes_text(spent.bytes as f64),
            several(spent.collectives as usize, "collective")
        ));
    }
    let stages = (0..=3).map(|stage| {
        let bytes = published::zero(stage, params as f64, args.world as f64);
        format!("stage {stage} {}", bytes_text(bytes))
    });
    lines.push(format!(
        "for comparison, ZeRO's formula for states in fp16 with Adam: {}",
        stages.collect::<Vec<_>>().join(", ")
    ));
    if let Some(have) = memory {
        let need = description.footprint()?.total();
        let verdict = match have.checked_sub(need) {
            Some(left) => format!(
                "fits, and leaves {} for activations",
                bytes_text(left as f64)
            ),
            None => format!(
                "does not fit: {} too much",
                bytes_text((need - have) as f64)
            ),
        };
        lines.push(format!(
            "{} of {}: {verdict}",
            bytes_text(need as f64),
            bytes_text(have as f64)
        ));
    }
    lines.push(String::new());
    Ok(lines.join("\n"))
}
