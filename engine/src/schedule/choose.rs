//! Which algorithm for which call: one table, read from the top, rank 0's for all.
//!
//! A choice depends only on what all ranks know, so that all choose alike. The table is text: a user's own is parsed
//! from the same form that [`Tuning::to_text`] prints.

use std::fmt::{self, Write};

use super::{Algorithm, Kind};

/// What carries the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WireKind {
    /// Shared memory.
    Shm,
    /// Unix sockets.
    Unix,
    /// TCP.
    Tcp,
    /// The simulator.
    Sim,
}

impl WireKind {
    /// All of them.
    pub const ALL: [WireKind; 4] = [WireKind::Shm, WireKind::Unix, WireKind::Tcp, WireKind::Sim];

    /// The name used in tables.
    pub fn name(self) -> &'static str {
        match self {
            WireKind::Shm => "shm",
            WireKind::Unix => "unix",
            WireKind::Tcp => "tcp",
            WireKind::Sim => "sim",
        }
    }

    /// The wire of that name.
    pub fn from_name(name: &str) -> Option<WireKind> {
        WireKind::ALL.into_iter().find(|wire| wire.name() == name)
    }
}

/// One line of the table: up to so many ranks and so many bytes, this algorithm. Those of shared memory stand in rows of
/// that wire, and the others in all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The collective, or any; a root does not matter and is 0 here.
    pub kind: Option<Kind>,
    /// The wire, or any.
    pub wire: Option<WireKind>,
    /// The largest world, or any.
    pub most_ranks: Option<usize>,
    /// The longest full vector in bytes, or any.
    pub most_bytes: Option<usize>,
    /// What to do.
    pub algorithm: Algorithm,
}

/// The table. The first row that fits decides; where none does it is [`Algorithm::Direct`], which does
/// every kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// From the most particular to the most general.
    pub rows: Vec<Row>,
}

/// What ships. On sockets, crossovers follow the α-β model with α of some 7 µs and 3 GB/s (TCP on one host): doubling's log2 n
/// rounds pay up to some 20 KiB, and n-1 messages at once are cheap up to 16 ranks. In shared memory two ranks on two cores
/// meet so quickly that what a post costs (everybody loads everything) soon outweighs a second meeting; with more ranks than
/// cores a meeting costs microseconds.
const DEFAULTS: &str = "\
all_reduce shm 2 8192 post
all_reduce shm 2 * load
all_gather shm 2 8192 post
all_gather shm 2 * load
* shm * 16384 post
* shm * * load
all_reduce * * 16384 doubling
all_reduce * 16 262144 direct
all_reduce * * * halving
reduce_scatter * 16 * direct
reduce_scatter * * * halving
all_gather * * 65536 direct
all_gather * * * ring
broadcast * * 65536 tree
broadcast * * * ring
reduce * * 65536 tree
reduce * * * halving
gather * * * direct
scatter * * * direct
all_to_all * 16 * direct
all_to_all * * 65536 direct
all_to_all * * * ring
barrier * * * doubling
";

impl Default for Tuning {
    fn default() -> Tuning {
        Tuning::parse(DEFAULTS).expect("the shipped table is well formed: a test reads it")
    }
}

impl Tuning {
    /// The algorithm for this kind over `world` ranks; `bytes` is the full vector's length.
    pub fn choose(&self, kind: &Kind, world: usize, bytes: usize, wire: WireKind) -> Algorithm {
        let fits = |row: &&Row| {
            row.kind.is_none_or(|only| only.name() == kind.name())
                && row.wire.is_none_or(|only| only == wire)
                && row.most_ranks.is_none_or(|most| world <= most)
                && row.most_bytes.is_none_or(|most| bytes <= most)
        };
        self.rows
            .iter()
            .find(fits)
            .map_or(Algorithm::Direct, |row| row.algorithm)
    }

    /// The canonical text: `kind wire most_ranks most_bytes algorithm`, one row a line, `*` for any.
    pub fn to_text(&self) -> String {
        let any = |most: Option<usize>| most.map_or("*".to_string(), |most| most.to_string());
        let mut text = String::new();
        for row in &self.rows {
            let (wire, ranks, bytes) = (
                row.wire.map_or("*", WireKind::name),
                any(row.most_ranks),
                any(row.most_bytes),
            );
            writeln!(
                text,
                "{} {wire} {ranks} {bytes} {}",
                row.kind.map_or("*", Kind::name),
                row.algorithm
            )
            .expect("a String takes all");
        }
        text
    }

    /// Reads what [`to_text`](Tuning::to_text) prints; blank lines and what follows a `#` are skipped.
    pub fn parse(text: &str) -> Result<Tuning, ParseError> {
        let mut rows = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let words: Vec<&str> = line
                .split('#')
                .next()
                .unwrap_or_default()
                .split_whitespace()
                .collect();
            if !words.is_empty() {
                rows.push(Row::parse(&words).map_err(|reason| ParseError {
                    line: index + 1,
                    reason,
                })?);
            }
        }
        Ok(Tuning { rows })
    }
}

impl Row {
    fn parse(words: &[&str]) -> Result<Row, String> {
        let &[kind, wire, ranks, bytes, algorithm] = words else {
            return Err(format!(
                "expected `kind wire most_ranks most_bytes algorithm`, found {} words",
                words.len()
            ));
        };
        let most = |word: &str| match word {
            "*" => Ok(None),
            _ => word
                .parse()
                .map(Some)
                .map_err(|_| format!("`{word}` is neither a number nor `*`")),
        };
        let row = Row {
            kind: match kind {
                "*" => None,
                _ => Some(
                    Kind::ALL
                        .into_iter()
                        .find(|known| known.name() == kind)
                        .ok_or(format!("no collective `{kind}`"))?,
                ),
            },
            wire: match wire {
                "*" => None,
                _ => Some(
                    WireKind::from_name(wire)
                        .ok_or(format!("no wire `{wire}`: shm, unix, tcp, sim or `*`"))?,
                ),
            },
            most_ranks: most(ranks)?,
            most_bytes: most(bytes)?,
            algorithm: Algorithm::from_name(algorithm)
                .ok_or(format!("no algorithm `{algorithm}`"))?,
        };
        let shares = row.wire == Some(WireKind::Shm);
        let does = match row.kind {
            _ if shares => row.algorithm.shares(),
            Some(kind) => row.algorithm.does(kind),
            None => Kind::ALL.into_iter().all(|kind| row.algorithm.does(kind)),
        };
        if does {
            Ok(row)
        } else if row.algorithm.shares() != shares {
            Err(
                "post and load are how shared memory works: rows of wire shm take these alone"
                    .into(),
            )
        } else {
            Err(format!("{algorithm} does not do {kind}"))
        }
    }
}

/// A line of a table that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// From 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tuning table, line {}: {}", self.line, self.reason)
    }
}

impl std::error::Error for ParseError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_table_reads_back_as_itself() {
        let tuning = Tuning::default();
        assert_eq!(tuning.to_text(), DEFAULTS);
        assert_eq!(Tuning::parse(&tuning.to_text()), Ok(tuning));
    }

    #[test]
    fn the_first_row_that_fits_decides() {
        let tuning = Tuning::default();
        let choose = |kind, world, bytes| tuning.choose(&kind, world, bytes, WireKind::Tcp);
        assert_eq!(choose(Kind::AllReduce, 64, 16 << 10), Algorithm::Doubling);
        assert_eq!(choose(Kind::AllReduce, 16, 256 << 10), Algorithm::Direct);
        assert_eq!(choose(Kind::AllReduce, 17, 256 << 10), Algorithm::Halving);
        assert_eq!(
            choose(Kind::AllReduce, 2, (256 << 10) + 1),
            Algorithm::Halving
        );
        assert_eq!(choose(Kind::ReduceScatter, 16, 1 << 30), Algorithm::Direct);
        assert_eq!(choose(Kind::AllGather, 4, 1 << 20), Algorithm::Ring);
        assert_eq!(choose(Kind::Broadcast { root: 3 }, 4, 100), Algorithm::Tree);
        assert_eq!(choose(Kind::Barrier, 1000, 0), Algorithm::Doubling);
        let shm = |bytes| tuning.choose(&Kind::AllGather, 4, bytes, WireKind::Shm);
        assert_eq!(
            (shm(16 << 10), shm(1 << 20)),
            (Algorithm::Post, Algorithm::Load)
        );
    }

    #[test]
    fn a_row_for_one_wire_leaves_the_others_alone() {
        let tuning =
            Tuning::parse("# mine\nall_gather tcp * * doubling\n\nall_gather * * * ring # rest")
                .unwrap();
        assert_eq!(
            tuning.choose(&Kind::AllGather, 4, 9, WireKind::Tcp),
            Algorithm::Doubling
        );
        assert_eq!(
            tuning.choose(&Kind::AllGather, 4, 9, WireKind::Unix),
            Algorithm::Ring
        );
        assert_eq!(
            tuning.choose(&Kind::AllReduce, 4, 9, WireKind::Unix),
            Algorithm::Direct
        );
    }

    #[test]
    fn a_bad_line_is_named() {
        let error = |text| Tuning::parse(text).unwrap_err().to_string();
        assert_eq!(
            error("\nall_reduce * * * ring"),
            "tuning table, line 2: ring does not do all_reduce"
        );
        assert!(error("all_reduce * many * tree").contains("`many`"));
        assert!(error("all_reduce carrier_pigeon * * tree").contains("`carrier_pigeon`"));
        assert!(error("all_reduce *").contains("2 words"));
        assert!(error("all_reduce shm * * ring").contains("wire shm take these alone"));
        assert!(error("* tcp * * load").contains("wire shm"));
        assert!(error("* tcp * * ring").contains("ring does not do *"));
    }
}
