//! Tells the library by which compiler, for which target and how it is built: `fabric env` says so.

use std::{env, process::Command};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(rustc).arg("--version").output().ok();
    let version = version.and_then(|output| String::from_utf8(output.stdout).ok());
    let version = version.unwrap_or_else(|| "unknown".into());
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| "unknown".into());
    println!("cargo::rustc-env=FABRIC_RUSTC={}", version.trim());
    println!("cargo::rustc-env=FABRIC_TARGET={}", variable("TARGET"));
    println!("cargo::rustc-env=FABRIC_PROFILE={}", variable("PROFILE"));
}
