//! One launcher's variables: read all of them, say which miss, parse each with its name at hand.

use std::{fmt::Display, net::SocketAddr, str::FromStr};

use fabric_engine::rendezvous::Secret;

use super::{Lookup, Place};
use crate::{Error, Result};

/// A number, and the variable (or the words) that said it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Number {
    pub(super) name: &'static str,
    pub(super) value: usize,
}

/// The numbers of a [`Place`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Numbers {
    pub(super) rank: Number,
    pub(super) world: Number,
    pub(super) local_rank: Number,
    pub(super) local_world: Number,
    pub(super) node_rank: Number,
    pub(super) nodes: Number,
}

impl Number {
    pub(super) fn new(name: &'static str, value: usize) -> Self {
        Self { name, value }
    }
}

impl Numbers {
    /// Compare ranks with their worlds; `refuse(name, value, what)` makes the error.
    pub(super) fn check(&self, refuse: impl Fn(&str, usize, String) -> Error) -> Result<()> {
        let fault = |number: Number, what: String| Err(refuse(number.name, number.value, what));
        let below = |number: Number, limit: Number| match number.value < limit.value {
            true => Ok(()),
            false => fault(
                number,
                format!("is not below {} ({})", limit.name, limit.value),
            ),
        };
        let at_most = |number: Number, limit: Number| match number.value <= limit.value {
            true => Ok(()),
            false => fault(
                number,
                format!("is more than {} ({})", limit.name, limit.value),
            ),
        };
        if self.world.value == 0 {
            return fault(self.world, "leaves nobody to train".into());
        }
        below(self.rank, self.world)?;
        below(self.local_rank, self.local_world)?;
        below(self.node_rank, self.world)?;
        below(self.node_rank, self.nodes)?;
        at_most(self.nodes, self.world)?;
        at_most(self.local_world, self.world)?;
        at_most(self.local_rank, self.rank)
    }
}

/// The variables of one launcher.
pub(super) struct Variables<'a> {
    get: Lookup<'a>,
    launcher: &'static str,
}

impl<'a> Variables<'a> {
    /// Whether any of `names` is set.
    pub(super) fn any(get: Lookup<'_>, names: &[&str]) -> bool {
        names.iter().any(|name| get(name).is_some())
    }

    /// The variables that `launcher` sets, once it is known that all of `required` are there.
    pub(super) fn new(
        get: Lookup<'a>,
        launcher: &'static str,
        required: &[&'static str],
    ) -> Result<Self> {
        let (present, missing): (Vec<&str>, Vec<&str>) =
            required.iter().partition(|name| get(name).is_some());
        if missing.is_empty() {
            return Ok(Self { get, launcher });
        }
        let verb = |names: &[&str]| if names.len() == 1 { "is" } else { "are" };
        let what = match present.is_empty() {
            true => format!("{} {} not set", missing.join(", "), verb(&missing)),
            false => format!(
                "{} {} set, but {} {} not",
                present.join(", "),
                verb(&present),
                missing.join(", "),
                verb(&missing)
            ),
        };
        Err(Error::argument(
            what,
            format!("Start this program with {launcher}, set what misses, or unset the others"),
        ))
    }

    /// A variable's text, if it is set and not empty.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        (self.get)(name).filter(|text| !text.is_empty())
    }

    /// A required variable, parsed; `wanted` says what it should have been.
    pub(super) fn parse<T: FromStr>(&self, name: &str, wanted: &str) -> Result<T> {
        let text = (self.get)(name).unwrap_or_default();
        text.parse()
            .map_err(|_| self.refuse(name, &text, format!("is not {wanted}")))
    }

    /// A variable that need not be there.
    pub(super) fn maybe<T: FromStr>(&self, name: &str, wanted: &str) -> Result<Option<T>> {
        (self.get)(name)
            .map(|_| self.parse(name, wanted))
            .transpose()
    }

    /// A number from 0 up.
    pub(super) fn number(&self, name: &'static str) -> Result<Number> {
        Ok(Number::new(name, self.parse(name, "a number from 0 up")?))
    }

    /// The first of `names` that is set, as a number.
    pub(super) fn first_number(&self, names: &[&'static str]) -> Result<Option<Number>> {
        let name = names.iter().find(|name| (self.get)(name).is_some());
        name.map(|name| self.number(name)).transpose()
    }

    /// A port to listen at.
    pub(super) fn port(&self, name: &str) -> Result<u16> {
        self.parse::<std::num::NonZeroU16>(name, "a port from 1 to 65535")
            .map(u16::from)
    }

    /// The port that the first of `names` asks for.
    pub(super) fn first_port(&self, names: &[&str]) -> Result<Option<u16>> {
        let name = names.iter().find(|name| (self.get)(name).is_some());
        name.map(|name| self.port(name)).transpose()
    }

    /// The job's secret, or none.
    pub(super) fn secret(&self) -> Secret {
        self.text("FABRIC_SECRET")
            .map_or_else(Secret::none, |text| Secret::from_bytes(text.as_bytes()))
    }

    /// `name`'s value is impossible, because it is or does `what`.
    pub(super) fn refuse(&self, name: &str, value: impl Display, what: impl Display) -> Error {
        Error::argument(
            format!("{name} is {value}, which {what}"),
            format!(
                "Start this program with {}, or correct or unset {name}",
                self.launcher
            ),
        )
    }

    /// The whole place, once its ranks have been compared with their worlds.
    pub(super) fn place(
        &self,
        numbers: Numbers,
        address: SocketAddr,
        source: &'static str,
    ) -> Result<Place> {
        numbers.check(|name, value, what| self.refuse(name, value, what))?;
        let told = [numbers.world, numbers.nodes]
            .map(|number| format!("{}={}", number.name, number.value))
            .join(", ");
        Ok(Place {
            rank: numbers.rank.value,
            world: numbers.world.value,
            local_rank: numbers.local_rank.value,
            local_world: numbers.local_world.value,
            node_rank: numbers.node_rank.value,
            nodes: numbers.nodes.value,
            address,
            secret: self.secret(),
            source,
            told,
            supervised: false,
        })
    }
}
