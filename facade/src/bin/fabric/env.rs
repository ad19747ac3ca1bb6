//! `fabric env` says what this machine is, for the head of a bug report.

use fabric::{Result, machine::Report};

/// Say what this machine, this build and this process's environment are: for the head of a bug report
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fabric env
  fabric env --json > environment.json
  srun fabric env                          # who would start ranks, and what they would see

Secrets are not shown: \"set, 64 characters\". fabric doctor tries out what is here.")]
pub(crate) struct EnvArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn env(args: &EnvArgs) -> Result<String> {
    let report = Report::look();
    Ok(match args.json {
        true => serde_json::to_string_pretty(&report)? + "\n",
        false => report.to_string(),
    })
}
