//! What the environment says about this machine that is not there.

use std::str::FromStr;

/// The environment's settings.
pub struct Settings {
    /// How many devices there are.
    pub devices: usize,
    /// Bytes of memory of each.
    pub memory: usize,
    /// Major and minor, as 80.
    pub capability: i32,
    /// The longest pause before a piece of work, in microseconds.
    pub delay_us: u64,
    /// Where the pauses' random numbers begin.
    pub seed: u64,
    /// Calls that fail: the function, which call of it, with which code.
    pub faults: Vec<(String, u64, i32)>,
}

impl Settings {
    /// As the environment has them now.
    pub fn read() -> Self {
        let faults = std::env::var("FAKE_CUDA_FAIL").unwrap_or_default();
        Self {
            devices: number("FAKE_CUDA_DEVICES", 2),
            memory: number("FAKE_CUDA_MEMORY", 1 << 30),
            capability: number("FAKE_CUDA_CAPABILITY", 80),
            delay_us: number("FAKE_CUDA_DELAY_US", 200),
            seed: number("FAKE_CUDA_SEED", 1),
            faults: faults
                .split(',')
                .filter(|one| !one.is_empty())
                .map(fault)
                .collect(),
        }
    }
}

fn number<T: FromStr>(name: &str, usual: T) -> T {
    match std::env::var(name) {
        Err(_) => usual,
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
    }
}

fn fault(text: &str) -> (String, u64, i32) {
    let parts: Vec<_> = text.split(':').collect();
    match parts[..] {
        [name, call, code] => {
            let number = "FAKE_CUDA_FAIL: the call and the code are numbers";
            (
                name.into(),
                call.parse().expect(number),
                code.parse().expect(number),
            )
        }
        _ => panic!("FAKE_CUDA_FAIL={text} is not function:call:code"),
    }
}
