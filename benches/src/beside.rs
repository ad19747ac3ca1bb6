//! Ours beside another's in one run: each side prints lines of JSON, from processes of its own, and whoever started them
//! reads these and prints a table.

use std::process::{Command, Stdio};

use fabric::{Error, Result};
use serde::{Serialize, de::DeserializeOwned};

/// Run `command` to its end, and read the lines of JSON that it prints. Other lines are passed over; what it says on
/// standard error is shown.
///
/// # Errors
/// When it cannot be started, does not succeed, or prints another kind of JSON.
pub fn run<L: DeserializeOwned>(command: &mut Command) -> Result<Vec<L>> {
    let output = command.stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(Error::argument(
            format!("{:?} ended with {}", command.get_program(), output.status),
            "Look at what it printed above; torch's side needs `pip install torch`",
        ));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().filter(|line| line.starts_with('{'));
    lines
        .map(|line| {
            serde_json::from_str(line).map_err(|error| Error::new(format!("{line}: {error}")))
        })
        .collect()
}

/// Torch's side: the script `name` of `peers`, run by `python`.
pub fn script(python: &str, name: &str, args: &[&str]) -> Command {
    let mut command = Command::new(python);
    command.arg(format!("{}/peers/{name}", env!("CARGO_MANIFEST_DIR")));
    command.args(args);
    command
}

/// Print `line` for [`run`].
///
/// # Errors
/// When it is no JSON.
pub fn print(line: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(line).map_err(|error| Error::new(error.to_string()))?;
    println!("{text}");
    Ok(())
}
