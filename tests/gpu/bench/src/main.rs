//! What only a GPU can tell, for `tests/gpu/run.sh`: it is built elsewhere, carried to a machine with a GPU, and prints
//! tables there. It needs nothing but the driver, and NCCL for ranks.

mod kernels;
mod operands;
mod ranks;
mod speeds;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Fabric's kernels and collectives on this machine's GPUs")]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// The driver, the devices, and NCCL
    Look,
    /// Every verb on every type, at crooked places, against the same verb on the host: bit for bit
    Kernels,
    /// How fast kernels are over GPT-2's shapes, beside a copy of as many bytes, and torch where its figures are given
    Speeds {
        /// Elements of the model, of 124439808; less for a try
        #[arg(long, default_value_t = 1)]
        divide_by: usize,
        /// A JSON file of `torch_peers.py`
        #[arg(long)]
        torch: Option<std::path::PathBuf>,
    },
    /// One rank of several: every operation on every type, then bus bandwidths. FABRIC_RANK, FABRIC_WORLD and FABRIC_ADDR say which
    Rank {
        /// The largest buffer, in MiB
        #[arg(long, default_value_t = 256)]
        most_mib: usize,
    },
    /// One rank of two, of which rank 1 never joins: rank 0 must time out and go on
    Hang,
    /// One rank of two, of which rank 1 ends without a word while rank 0 waits for it on the device
    Kill,
}

fn main() -> ExitCode {
    let done = match Args::parse().what {
        What::Look => ranks::look(),
        What::Kernels => kernels::check(),
        What::Speeds { divide_by, torch } => speeds::print(divide_by, torch.as_deref()),
        What::Rank { most_mib } => ranks::rank(most_mib),
        What::Hang => ranks::hang(),
        What::Kill => ranks::kill(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
