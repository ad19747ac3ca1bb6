//! An example as its users run it: a process, which is waited for, but not for ever.

use std::{
    ffi::OsStr,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);

/// What a run left.
pub struct Ran {
    pub ok: bool,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

/// Run the example `name`, which `cargo test` has built beside this test.
pub fn run<S: AsRef<OsStr> + std::fmt::Debug>(name: &str, args: &[S]) -> Ran {
    let tests = std::env::current_exe().unwrap();
    let folder = tests.parent().unwrap().parent().unwrap();
    let path = folder.join("examples").join(name);
    assert!(
        path.exists(),
        "build it first: cargo build -p fabric-candle --examples"
    );
    let started = Instant::now();
    let mut child = Command::new(path)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("{args:?} takes longer than {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let took = started.elapsed();
    let output = child.wait_with_output().unwrap();
    Ran {
        ok: output.status.success(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        took,
    }
}

/// The last line of a run that ended well.
pub fn report(ran: &Ran) -> Value {
    assert!(ran.ok, "{}", ran.stderr);
    serde_json::from_str(ran.stdout.lines().last().unwrap()).unwrap()
}
