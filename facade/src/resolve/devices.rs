//! How many devices, or which: in Lightning's forms.

use crate::{
    accelerator::Found,
    error::{Error, Result},
};

/// More processes than a machine can have are a slip of the keyboard.
const MOST: usize = 1 << 15;

/// How many devices of a machine, or which.
///
/// ```
/// use fabric::resolve::Devices;
///
/// assert_eq!(Devices::from(2), Devices::from("2"));
/// assert_eq!(Devices::from("0, 2"), Devices::List(vec![0, 2]));
/// assert_eq!(Devices::from("1,"), Devices::List(vec![1]));
/// assert_eq!(Devices::from(-1), Devices::All);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Devices {
    /// "auto": all, but on a CPU one.
    #[default]
    Auto,
    /// -1: all of them.
    All,
    /// So many.
    Count(usize),
    /// Those of these numbers.
    List(Vec<usize>),
    /// A text or a number that is none of these, kept for the error.
    Unreadable(String),
}

impl Devices {
    /// Read "auto", "-1", a number, or a list like "0,2" ("1," is device 1 alone).
    ///
    /// # Errors
    /// When the text is none of them.
    pub fn parse(text: &str) -> Result<Self> {
        match Self::from(text) {
            Self::Unreadable(text) => Err(unreadable(&text)),
            devices => Ok(devices),
        }
    }

    /// How many that makes among what was found, and of a numbered accelerator, which.
    pub(super) fn among(&self, found: &Found) -> Result<Vec<usize>> {
        let name = &found.name;
        let present = found.devices.as_ref().map_or(0, Vec::len);
        match self {
            Self::Count(0) => Err(Error::argument(
                "0 devices were asked for",
                "Ask for at least one: devices(1), or --devices 1",
            )),
            Self::List(list) if list.is_empty() => Err(Error::argument(
                "an empty list of devices was asked for",
                "Ask for at least one, or for \"auto\"",
            )),
            Self::Unreadable(text) => Err(unreadable(text)),
            Self::Count(count) if *count > MOST => Err(Error::argument(
                format!("{count} devices of one machine were asked for"),
                format!("Ask for at most {MOST}"),
            )),
            Self::Auto => Ok((0..found.auto_count).collect()),
            Self::Count(count) if !found.is_numbered => Ok((0..*count).collect()),
            Self::All | Self::List(_) if !found.is_numbered => Err(Error::argument(
                format!("devices = {self} on accelerator '{name}', whose devices have no numbers"),
                "Give the number of processes: devices(2)",
            )),
            Self::All => Ok((0..present).collect()),
            Self::Count(count) if *count > present => Err(Error::argument(
                format!("{count} devices of '{name}' were asked for, and there are {present}"),
                "Ask for fewer, or for -1: all",
            )),
            Self::Count(count) => Ok((0..*count).collect()),
            Self::List(list) => {
                for (index, device) in list.iter().enumerate() {
                    if *device >= present {
                        return Err(Error::argument(
                            format!(
                                "device {device} of '{name}' was asked for, and there are {present}"
                            ),
                            "Devices are numbered from 0",
                        ));
                    }
                    if list[..index].contains(device) {
                        return Err(Error::argument(
                            format!("device {device} of '{name}' was asked for twice"),
                            "Name each device once",
                        ));
                    }
                }
                Ok(list.clone())
            }
        }
    }
}

pub(super) fn unreadable(text: &str) -> Error {
    Error::argument(
        format!("devices = '{text}'"),
        "Give a number of processes, like 2, a list of devices, like \"0,2\", -1 for all, or \"auto\"",
    )
}

impl std::fmt::Display for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::All => f.write_str("-1"),
            Self::Count(count) => write!(f, "{count}"),
            Self::List(list) => {
                let list: Vec<_> = list.iter().map(ToString::to_string).collect();
                write!(f, "[{}]", list.join(", "))
            }
            Self::Unreadable(text) => write!(f, "'{text}'"),
        }
    }
}

impl From<i32> for Devices {
    fn from(count: i32) -> Self {
        match count {
            -1 => Self::All,
            count => usize::try_from(count)
                .map_or_else(|_| Self::Unreadable(count.to_string()), Self::Count),
        }
    }
}

impl From<usize> for Devices {
    fn from(count: usize) -> Self {
        Self::Count(count)
    }
}

impl From<Vec<usize>> for Devices {
    fn from(list: Vec<usize>) -> Self {
        Self::List(list)
    }
}

impl<const N: usize> From<[usize; N]> for Devices {
    fn from(list: [usize; N]) -> Self {
        Self::List(list.into())
    }
}

impl From<&str> for Devices {
    fn from(text: &str) -> Self {
        let trimmed = text.trim();
        let number = |text: &str| text.trim().parse::<usize>().ok();
        let read = match trimmed {
            _ if trimmed.eq_ignore_ascii_case("auto") => Some(Self::Auto),
            "-1" => Some(Self::All),
            _ if trimmed.contains(',') => {
                let entries = trimmed.strip_suffix(',').unwrap_or(trimmed).split(',');
                entries.map(number).collect::<Option<_>>().map(Self::List)
            }
            _ => number(trimmed).map(Self::Count),
        };
        read.unwrap_or_else(|| Self::Unreadable(text.into()))
    }
}

impl From<&String> for Devices {
    fn from(text: &String) -> Self {
        Self::from(text.as_str())
    }
}

impl From<String> for Devices {
    fn from(text: String) -> Self {
        Self::from(text.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cards(count: usize) -> Found {
        Found {
            name: "cuda".into(),
            aliases: Vec::new(),
            devices: Ok(vec!["a card".into(); count]),
            backend: Ok(()),
            auto_count: count,
            is_numbered: true,
        }
    }

    fn cpu() -> Found {
        Found {
            name: "cpu".into(),
            auto_count: 1,
            is_numbered: false,
            ..cards(1)
        }
    }

    // Line 8: strings, duplicates, devices that are not there.
    #[test]
    fn line_8_devices_are_read_as_lightning_reads_them() {
        let four = cards(4);
        let among = |devices: Devices| devices.among(&four);
        assert_eq!(among("auto".into()).unwrap(), [0, 1, 2, 3]);
        assert_eq!(among("-1".into()).unwrap(), [0, 1, 2, 3]);
        assert_eq!(among((-1).into()).unwrap(), [0, 1, 2, 3]);
        assert_eq!(among("2".into()).unwrap(), [0, 1]);
        assert_eq!(among("0, 3".into()).unwrap(), [0, 3]);
        assert_eq!(among("2,".into()).unwrap(), [2]);
        assert_eq!(among([3, 1].into()).unwrap(), [3, 1]);
        let why = |devices: Devices| devices.among(&four).unwrap_err().to_string();
        assert!(why(usize::MAX.into()).contains("Ask for at most 32768"));
        assert!(why("0,4".into()).contains("device 4"));
        assert!(why("1,1".into()).contains("twice"));
        assert!(why(5.into()).contains("there are 4"));
        assert!(why(Vec::new().into()).contains("empty list"));
        for text in ["0", " 0 "] {
            assert!(why(text.into()).contains("Ask for at least one"));
        }
        for text in ["many", "", "1.5", "-2", "1,,2", "a,b"] {
            assert!(
                why(text.into()).contains(&format!("devices = '{text}'")),
                "{text}"
            );
        }
        assert!(why((-3).into()).contains("devices = '-3'"));
    }

    #[test]
    fn processes_on_a_cpu_are_counted() {
        let cpu = cpu();
        assert_eq!(Devices::Auto.among(&cpu).unwrap().len(), 1);
        assert_eq!(Devices::from(3).among(&cpu).unwrap().len(), 3);
        for devices in [Devices::All, Devices::from("0,1")] {
            let why = devices.among(&cpu).unwrap_err().to_string();
            assert!(why.contains("have no numbers"), "{why}");
        }
    }
}
