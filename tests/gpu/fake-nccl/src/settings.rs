//! What the environment says this library is, and what is to go wrong.

use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex},
};

use crate::code::{Code, Result};

static SETTINGS: LazyLock<Settings> = LazyLock::new(Settings::read);
static COUNTS: LazyLock<Mutex<HashMap<String, u64>>> = LazyLock::new(Mutex::default);

struct Settings {
    version: i32,
    hang: Option<(usize, u64)>,
    faults: Vec<(String, u64, i32)>,
}

impl Settings {
    fn read() -> Self {
        let text = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
        let parts = |text: String| text.split(':').map(str::to_string).collect::<Vec<_>>();
        let number = |text: &str| {
            text.parse::<u64>()
                .unwrap_or_else(|_| panic!("FAKE_NCCL_*: {text} is no number"))
        };
        let hang = text("FAKE_NCCL_HANG")
            .map(parts)
            .map(|parts| match &parts[..] {
                [rank, n] => (number(rank) as usize, number(n)),
                _ => panic!("FAKE_NCCL_HANG is <rank>:<n>"),
            });
        let faults = text("FAKE_NCCL_FAIL").unwrap_or_default();
        let fault = |one: &str| match &parts(one.into())[..] {
            [function, n, code] => (function.clone(), number(n), number(code) as i32),
            _ => panic!("FAKE_NCCL_FAIL is <function>:<n>:<code>"),
        };
        Self {
            version: text("FAKE_NCCL_VERSION").map_or(22_803, |text| number(&text) as i32),
            hang,
            faults: faults
                .split(',')
                .filter(|one| !one.is_empty())
                .map(fault)
                .collect(),
        }
    }
}

/// Whether a rank's operation of this number on a communicator, from 1 on, never starts.
pub fn hangs(rank: usize, number: u64) -> bool {
    SETTINGS.hang == Some((rank, number))
}

/// That this library has what came with a version.
pub fn since(version: i32) -> Result {
    match SETTINGS.version >= version {
        true => Ok(()),
        false => {
            Err(Code::USAGE.because(format!("NCCL {} has no such function", SETTINGS.version)))
        }
    }
}

/// The library's version.
pub fn version() -> i32 {
    SETTINGS.version
}

/// What every call does: count itself, fail if it was told to, and turn its result into a number.
pub fn call(name: &str, body: impl FnOnce() -> Result) -> i32 {
    let result = enter(name).and_then(|()| body());
    result.map_or_else(|code| code.0, |()| Code::SUCCESS)
}

fn enter(name: &str) -> Result {
    let mut counts = COUNTS.lock().unwrap_or_else(|held| held.into_inner());
    let count = counts.entry(name.into()).or_default();
    *count += 1;
    let mut faults = SETTINGS.faults.iter();
    match faults.find(|(function, call, _)| function == name && call == count) {
        Some((_, _, code)) => Err(Code(*code).because("FAKE_NCCL_FAIL told it to fail")),
        None => Ok(()),
    }
}
