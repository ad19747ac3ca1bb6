//! Choices from the environment: `FABRIC_ACCELERATOR`, `FABRIC_STRATEGY`, `FABRIC_DEVICES`, `FABRIC_NUM_NODES` and
//! `FABRIC_PRECISION`, which `fabric run` sets, `FABRIC_WIRE` and `FABRIC_TIMEOUT_S`. They take the place of what a program leaves open; where it has chosen
//! otherwise, nobody can know who is right, and that is an error which names both.

use std::{fmt::Display, time::Duration};

use super::{Devices, Request, Wire};
use crate::{
    environment::Lookup,
    error::{Error, Result},
    precision::Precision,
    strategy::Strategy,
};

impl Request {
    /// The request, with what the environment adds to it.
    ///
    /// # Errors
    /// When the environment contradicts the request, or a variable cannot be read.
    pub fn with_environment(mut self, get: Lookup<'_>) -> Result<Self> {
        let text = |name: &str| get(name).map(|text| text.trim().to_string());
        if let Some(asked) = text("FABRIC_ACCELERATOR") {
            let same = |own: &String| own.trim().eq_ignore_ascii_case(&asked);
            let open = |own: &String| own.trim().eq_ignore_ascii_case("auto");
            let own = self.accelerator.as_ref().filter(|own| !open(own));
            check("accelerator", "FABRIC_ACCELERATOR", own, &asked, same)?;
            self.accelerator = Some(asked);
        }
        if let Some(asked) = text("FABRIC_STRATEGY") {
            let own = self.strategy.as_ref().map(|own| own.name().to_string());
            let open = |own: &String| own.eq_ignore_ascii_case("auto");
            let same = |own: &String| own.eq_ignore_ascii_case(&asked);
            let own = own.filter(|own| !open(own));
            check("strategy", "FABRIC_STRATEGY", own.as_ref(), &asked, same)?;
            if own.is_none() {
                self.strategy = Some(Strategy::Named(asked));
            }
        }
        if let Some(asked) = text("FABRIC_DEVICES") {
            let read = Devices::parse(&asked)?;
            let own = Some(&self.devices).filter(|own| **own != Devices::Auto);
            check("devices", "FABRIC_DEVICES", own, &asked, |own| *own == read)?;
            self.devices = read;
        }
        if let Some(asked) = text("FABRIC_NUM_NODES") {
            let read = asked.parse::<usize>().map_err(|_| {
                Error::argument(
                    format!("FABRIC_NUM_NODES = '{asked}'"),
                    "Give the number of machines, like 2",
                )
            })?;
            let own = self.num_nodes.as_ref();
            check("num_nodes", "FABRIC_NUM_NODES", own, &asked, |own| {
                *own == read
            })?;
            self.num_nodes = Some(read);
        }
        if let Some(asked) = text("FABRIC_PRECISION") {
            let read = Precision::parse(&asked)?;
            let own = self.precision.as_ref();
            let same = |own: &String| Precision::parse(own).is_ok_and(|own| own == read);
            check("precision", "FABRIC_PRECISION", own, &asked, same)?;
            self.precision = Some(asked);
        }
        if let Some(asked) = text("FABRIC_WIRE") {
            let read = Wire::parse("FABRIC_WIRE", &asked)?;
            let open = |own: &String| own.trim().eq_ignore_ascii_case("auto");
            let own = self.wire.as_ref().filter(|own| !open(own));
            let same = |own: &String| Wire::parse("wire", own).is_ok_and(|own| own == read);
            check("wire", "FABRIC_WIRE", own, &asked, same)?;
            self.wire = Some(asked);
        }
        if let Some(read) = seconds(get, "FABRIC_TIMEOUT_S", "a collective may take")? {
            let shown = |time: Duration| format!("{} s", time.as_secs_f64());
            let own = self.timeout.map(shown);
            let same = |_: &String| self.timeout == Some(read);
            check(
                "timeout",
                "FABRIC_TIMEOUT_S",
                own.as_ref(),
                &shown(read),
                same,
            )?;
            self.timeout = Some(read);
        }
        Ok(self)
    }
}

/// A time in seconds from the environment.
pub(crate) fn seconds(get: Lookup<'_>, name: &str, what: &str) -> Result<Option<Duration>> {
    let Some(text) = get(name) else {
        return Ok(None);
    };
    let seconds = text.trim().parse().ok();
    let seconds = seconds.filter(|seconds| *seconds > 0.0 && *seconds < 1e9);
    seconds
        .map(|seconds| Some(Duration::from_secs_f64(seconds)))
        .ok_or_else(|| {
            Error::argument(
                format!("{name} = '{text}'"),
                format!("Give how long {what}, in seconds, like 600"),
            )
        })
}

/// Refuse when the program has chosen, and not the same.
fn check<T: Display>(
    what: &str,
    variable: &str,
    own: Option<&T>,
    asked: &str,
    same: impl Fn(&T) -> bool,
) -> Result<()> {
    match own {
        Some(own) if !same(own) => Err(Error::argument(
            format!(
                "the program asks for {what} = {own}, and the environment for {variable} = {asked}"
            ),
            match what {
                "wire" | "timeout" => format!(
                    "Leave {what} out of the program to choose it outside, or unset {variable}"
                ),
                _ => format!(
                    "Leave {what} out of the program to choose it outside, or unset {variable} (`fabric run` sets it from --{})",
                    what.replace('_', "-")
                ),
            },
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(request: Request, variables: &[(&str, &str)]) -> Result<Request> {
        request.with_environment(&|name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.to_string())
        })
    }

    const ALL: [(&str, &str); 7] = [
        ("FABRIC_ACCELERATOR", "CPU"),
        ("FABRIC_STRATEGY", "Zero2"),
        ("FABRIC_DEVICES", "3"),
        ("FABRIC_NUM_NODES", "2"),
        ("FABRIC_PRECISION", "bf16"),
        ("FABRIC_WIRE", "Unix"),
        ("FABRIC_TIMEOUT_S", "90"),
    ];

    // Line 4 and API-09: what the program leaves open comes from the environment.
    #[test]
    fn line_4_the_environment_fills_what_is_open() {
        let request = with(Request::default(), &ALL).unwrap();
        assert_eq!(request.accelerator.as_deref(), Some("CPU"));
        assert_eq!(request.strategy.unwrap().name(), "Zero2");
        assert_eq!(
            (request.devices, request.num_nodes),
            (Devices::Count(3), Some(2))
        );
        assert_eq!(request.precision.as_deref(), Some("bf16"));
        assert_eq!(request.wire.as_deref(), Some("Unix"));
        assert_eq!(request.timeout, Some(Duration::from_secs(90)));
        let auto = Request {
            accelerator: Some("auto".into()),
            strategy: Some("AUTO".into()),
            wire: Some("auto".into()),
            ..Request::default()
        };
        assert_eq!(with(auto, &ALL).unwrap().strategy.unwrap().name(), "Zero2");
    }

    #[test]
    fn line_4_the_same_choice_twice_is_no_conflict() {
        let request = Request {
            accelerator: Some("cpu".into()),
            strategy: Some("zero2".into()),
            devices: 3.into(),
            num_nodes: Some(2),
            precision: Some("bf16-mixed".into()),
            state_dict_type: None,
            wire: Some("unix".into()),
            timeout: Some(Duration::from_secs(90)),
        };
        with(request, &ALL).unwrap();
    }

    #[test]
    fn line_4_a_conflict_names_both_sides() {
        let of = |request: Request| with(request, &ALL).unwrap_err().to_string();
        let accelerator = Request {
            accelerator: Some("cuda".into()),
            ..Request::default()
        };
        let strategy = Request {
            strategy: Some("ddp".into()),
            ..Request::default()
        };
        let devices = Request {
            devices: 2.into(),
            ..Request::default()
        };
        let nodes = Request {
            num_nodes: Some(4),
            ..Request::default()
        };
        let precision = Request {
            precision: Some("32-true".into()),
            ..Request::default()
        };
        // STR-02: the wire is what a backend is there.
        let wire = Request {
            wire: Some("tcp".into()),
            ..Request::default()
        };
        let timeout = Request {
            timeout: Some(Duration::from_millis(1500)),
            ..Request::default()
        };
        for (request, own, variable) in [
            (wire, "wire = tcp", "FABRIC_WIRE = Unix"),
            (timeout, "timeout = 1.5 s", "FABRIC_TIMEOUT_S = 90 s"),
            (
                accelerator,
                "accelerator = cuda",
                "FABRIC_ACCELERATOR = CPU",
            ),
            (strategy, "strategy = ddp", "FABRIC_STRATEGY = Zero2"),
            (devices, "devices = 2", "FABRIC_DEVICES = 3"),
            (nodes, "num_nodes = 4", "FABRIC_NUM_NODES = 2"),
            (precision, "precision = 32-true", "FABRIC_PRECISION = bf16"),
        ] {
            let text = of(request);
            assert!(text.contains(own) && text.contains(variable), "{text}");
        }
    }

    #[test]
    fn a_variable_that_cannot_be_read_is_shown() {
        for (name, value) in [
            ("FABRIC_DEVICES", "many"),
            ("FABRIC_NUM_NODES", "two"),
            ("FABRIC_PRECISION", "7"),
            ("FABRIC_WIRE", "pigeon"),
            ("FABRIC_TIMEOUT_S", "soon"),
            ("FABRIC_TIMEOUT_S", "0"),
        ] {
            let text = with(Request::default(), &[(name, value)]).unwrap_err();
            assert!(text.to_string().contains(value), "{text}");
        }
    }
}
