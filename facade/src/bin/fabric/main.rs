//! The command line: `fabric run` starts a program on several ranks, `fabric plan` says what a job would need, `fabric
//! consolidate` and `fabric inspect` are about checkpoints, `fabric env` and `fabric doctor` about this machine.

mod consolidate;
mod doctor;
mod env;
mod plan;
mod program;
mod run;

use std::{
    io::{ErrorKind, Write},
    process::ExitCode,
};

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use fabric::{Result, launch::RankFailed};

/// Lightning Fabric for Rust
#[derive(Parser)]
#[command(name = "fabric", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::RunArgs),
    Plan(plan::PlanArgs),
    Consolidate(consolidate::ConsolidateArgs),
    Inspect(consolidate::InspectArgs),
    Env(env::EnvArgs),
    Doctor(doctor::DoctorArgs),
    /// Print a shell's completions: fabric completions bash > ~/.local/share/bash-completion/completions/fabric
    Completions {
        /// The shell
        shell: Shell,
    },
    #[command(hide = true)]
    ExecRank(program::ExecArgs),
    #[command(hide = true)]
    DoctorRank(doctor::RankArgs),
}

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Run(args) => run::run(args),
        Command::Plan(args) => plan::plan(&args).and_then(|text| print(text.as_bytes())),
        Command::Consolidate(args) => {
            consolidate::consolidate(&args).and_then(|text| print(text.as_bytes()))
        }
        Command::Doctor(args) => doctor::doctor(&args),
        Command::DoctorRank(args) => match doctor::rank(&args) {
            Ok(()) => Ok(()),
            Err(_) => return ExitCode::FAILURE, // its supervisor knows why, and says so
        },
        Command::Env(args) => env::env(&args).and_then(|text| print(text.as_bytes())),
        Command::Inspect(args) => consolidate::inspect(&args)
            .and_then(|(text, verdict)| print(text.as_bytes()).and(verdict)),
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "fabric", &mut text);
            print(&text)
        }
        Command::ExecRank(args) => program::exec(&args),
    };
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    eprintln!("fabric: {error}");
    let rank = error.downcast_ref::<RankFailed>();
    ExitCode::from(rank.map_or(1, RankFailed::exit_code))
}

fn print(text: &[u8]) -> Result<()> {
    match std::io::stdout().write_all(text) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()), // `| head`
        result => Ok(result?),
    }
}
