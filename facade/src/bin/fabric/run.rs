//! `fabric run` starts a program on several ranks.

use std::{ffi::OsString, path::PathBuf};

use fabric::{
    Result,
    accelerator::Hardware,
    launch::{Job, Output, Program, supervise},
    resolve::{Devices, Request, resolve},
    strategy::Strategy,
};

use crate::program;

/// Start a program on several ranks, and watch over them
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fabric run --devices 4 target/release/train --epochs 3
  fabric run --devices 2 --strategy fsdp --precision bf16-mixed --log-dir logs target/release/examples/gpt
  fabric run --devices 4 --max-restarts 3 target/release/train

On two machines, the same on both but for the node's rank:
  export FABRIC_SECRET=...          # openssl rand -hex 32 makes one, once
  fabric run --devices 4 --num-nodes 2 --node-rank 0 --main-address 10.0.0.7 target/release/train
  fabric run --devices 4 --num-nodes 2 --node-rank 1 --main-address 10.0.0.7 target/release/train

The program learns what was chosen from FABRIC_ACCELERATOR, FABRIC_STRATEGY, FABRIC_DEVICES, FABRIC_NUM_NODES and
FABRIC_PRECISION, its rank from FABRIC_RANK and its kin, and from FABRIC_RESTART how often all were started again.
When a rank fails the others are ended, and the exit status is that rank's: its exit code, or 128 and its signal.")]
pub(crate) struct RunArgs {
    /// auto, cpu, ... The program decides where this is left out
    #[arg(long)]
    accelerator: Option<String>,
    /// auto, single, ddp, zero1, zero2, fsdp, hsdp, ... The program decides where this is left out
    #[arg(long)]
    strategy: Option<String>,
    /// Ranks on this machine: a number, or auto for one on each device
    #[arg(long, default_value = "1")]
    devices: String,
    /// Machines
    #[arg(long, alias = "num_nodes", default_value_t = 1)]
    num_nodes: usize,
    /// This machine's number, from 0; FABRIC_NODE_RANK where this is left out
    #[arg(long, alias = "node_rank")]
    node_rank: Option<usize>,
    /// Machine 0's address, where rank 0 listens; FABRIC_ADDR where this is left out
    #[arg(long, alias = "main_address")]
    main_address: Option<String>,
    /// The port there; FABRIC_PORT, or 29400 (on one machine any free one), where this is left out
    #[arg(long, alias = "main_port", value_parser = clap::value_parser!(u16).range(1..))]
    main_port: Option<u16>,
    /// 32-true, bf16-mixed, 16-mixed, ... The program decides where this is left out
    #[arg(long)]
    precision: Option<String>,
    /// Start all ranks again, at a new port and with a new secret, so many times after a failure
    #[arg(long, alias = "max_restarts", default_value_t = 0, value_name = "N")]
    max_restarts: usize,
    /// Write what each rank prints to rank-0.out, rank-0.err, ... in this folder too
    #[arg(long, alias = "log_dir", value_name = "DIR")]
    log_dir: Option<PathBuf>,
    /// Put [rank 1] before every line that rank 1 prints: the default for several ranks
    #[arg(long, overrides_with = "no_prefix")]
    prefix: bool,
    /// Let ranks write to this terminal themselves: the default for one rank
    #[arg(long, alias = "no_prefix", overrides_with = "prefix")]
    no_prefix: bool,
    /// What to start, by its path or its name on PATH, and what to pass to it
    #[arg(required = true, trailing_var_arg = true, value_names = ["PROGRAM", "ARGS"])]
    command: Vec<OsString>,
}

pub(crate) fn run(args: RunArgs) -> Result<()> {
    // What is wrong with the choices is said here, once, and not by every rank.
    let request = Request {
        accelerator: args.accelerator.clone(),
        strategy: args.strategy.as_deref().map(Strategy::from),
        devices: Devices::parse(&args.devices)?,
        precision: args.precision.clone(),
        ..Request::default()
    };
    let local = resolve(&request, None, &Hardware::look())?.devices();
    let given = [
        (
            "FABRIC_NODE_RANK",
            args.node_rank.map(|rank| rank.to_string()),
        ),
        ("FABRIC_ADDR", args.main_address.clone()),
        ("FABRIC_PORT", args.main_port.map(|port| port.to_string())),
    ];
    let job = Job::from_variables(local, args.num_nodes, &|name| {
        let flag = given.iter().find(|(known, _)| *known == name);
        let flag = flag.and_then(|(_, value)| value.clone());
        flag.or_else(|| std::env::var(name).ok())
    })?;
    let mut words = args.command.into_iter();
    let name = words.next().unwrap_or_default(); // it is required
    let path = program::find(&name)?;
    // The number and not "auto", so that a rank on its own machine cannot come to another.
    let devices = match request.devices {
        Devices::List(_) => args.devices,
        _ => local.to_string(),
    };
    let mut variables = vec![("FABRIC_CLI".to_string(), OsString::from("1"))];
    for (variable, value) in [
        ("FABRIC_ACCELERATOR", args.accelerator),
        ("FABRIC_STRATEGY", args.strategy),
        ("FABRIC_DEVICES", Some(devices)),
        ("FABRIC_NUM_NODES", Some(args.num_nodes.to_string())),
        ("FABRIC_PRECISION", args.precision),
    ] {
        variables.extend(value.map(|value| (variable.to_string(), value.into())));
    }
    supervise(Job {
        program: Program {
            args: program::words(path, name, words.collect()),
            ..Program::this()
        },
        variables,
        output: Output {
            prefix: args.prefix || (local > 1 && !args.no_prefix),
            folder: args.log_dir,
        },
        restarts: args.max_restarts,
        address: args.main_address.or(job.address),
        port: args.main_port.or(job.port),
        ..job
    })
}
