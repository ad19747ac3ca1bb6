//! One launcher's variables: read all of them, say which miss, parse each with its name at hand.

use std::{fmt::Display, net::SocketAddr, str::FromStr};

use fabric_engine::rendezvous::Secret;

use super::{Lookup, Place};
use crate::{Error, Result};

/// The variables' names, in the order of [`Place`]'s first five fields.
pub(super) type Ranks = [&'static str; 5];

/// The variables of one launcher.
pub(super) struct Variables<'a> {
    get: Lookup<'a>,
    launcher: &'static str,
}

impl<'a> Variables<'a> {
    /// Whether any of `names` is set.
    pub(super) fn any(get: Lookup<'_>, names: Ranks) -> bool {
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
        Err(Error::argument(
            format!(
                "{} {} set, but {} {} not",
                present.join(", "),
                verb(&present),
                missing.join(", "),
                verb(&missing)
            ),
            format!("Start this program with {launcher}, set what misses, or unset the others"),
        ))
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

    /// A port to listen at.
    pub(super) fn port(&self, name: &str) -> Result<u16> {
        self.parse::<std::num::NonZeroU16>(name, "a port from 1 to 65535")
            .map(u16::from)
    }

    /// The job's secret, or none.
    pub(super) fn secret(&self) -> Secret {
        (self.get)("FABRIC_SECRET")
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
        names: Ranks,
        address: SocketAddr,
        source: &'static str,
        supervised: bool,
    ) -> Result<Place> {
        let count = |name| self.parse::<usize>(name, "a number from 0 up");
        let place = Place {
            rank: count(names[0])?,
            world: count(names[1])?,
            local_rank: count(names[2])?,
            local_world: count(names[3])?,
            node_rank: count(names[4])?,
            address,
            secret: self.secret(),
            source,
            supervised,
        };
        let [rank, world, local_rank, local_world, node_rank] = names;
        let below = |name: &str, value: usize, limit: &str, size: usize| {
            if value < size {
                return Ok(());
            }
            Err(self.refuse(name, value, format!("is not below {limit} ({size})")))
        };
        if place.world == 0 {
            return Err(self.refuse(world, 0, "leaves nobody to train"));
        }
        below(rank, place.rank, world, place.world)?;
        below(local_rank, place.local_rank, local_world, place.local_world)?;
        below(node_rank, place.node_rank, world, place.world)?;
        if place.local_world > place.world {
            let what = format!("is more than {world} ({})", place.world);
            return Err(self.refuse(local_world, place.local_world, what));
        }
        if place.local_rank > place.rank {
            let what = format!("is more than {rank} ({})", place.rank);
            return Err(self.refuse(local_rank, place.local_rank, what));
        }
        Ok(place)
    }
}
