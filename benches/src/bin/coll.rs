//! Collectives: how long they take, and whether what they deliver is right, with the conventions of nccl-tests.
//!
//! `cargo run --release -p fabric-benches --bin coll -- all_reduce -n 2 --wire shm -b 1K -e 256M -f 4 -c 1 -J out.json`

use std::process::ExitCode;

use clap::Parser;
use fabric_benches::coll::{self, args::Args};

fn main() -> ExitCode {
    match coll::run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coll: {error}");
            ExitCode::FAILURE
        }
    }
}
