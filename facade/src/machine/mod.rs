//! This machine as a training job meets it, for the head of a bug report: what is there, what this process may use of it, and
//! who started it. Looking never fails: what cannot be read is left out, or says why.
//!
//! ```
//! let report = fabric::machine::Report::look();
//! let text = report.to_string();
//! assert!(text.contains("cores allowed"));
//! assert!(report.find("fabric", "version").is_some());
//! ```

mod cgroup;
mod libraries;
mod limits;
mod memory;
mod network;
mod processor;
mod system;
mod variables;
mod wires;

use std::{fmt, path::Path};

use serde::{Serialize, Serializer, ser::SerializeMap};

use crate::{accelerator::Hardware, environment};

/// What is known of this machine and this process, in sections. Its `Display` form is a table, its JSON form a map of maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The sections, in the order of reading.
    pub sections: Vec<Section>,
}

/// Facts of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Of what.
    pub name: &'static str,
    /// The facts: their names, and what is so; several lines for what is there several times.
    pub facts: Vec<(String, Vec<String>)>,
}

impl Report {
    /// Look at this machine and this process.
    pub fn look() -> Self {
        let variables: Vec<_> = std::env::vars_os()
            .map(|(name, value)| (lossy(&name), lossy(&value)))
            .collect();
        let root = Path::new("/");
        Self {
            sections: vec![
                system::build(),
                system::system(root),
                processor::processor(root),
                memory::memory(root),
                limits::limits(),
                wires::wires(),
                accelerators(&Hardware::look()),
                launcher(&|name| std::env::var(name).ok()),
                variables::variables(&variables),
                network::network(),
                libraries::libraries(&libraries::folders(&variables)),
            ],
        }
    }

    /// The lines of a fact.
    pub fn find(&self, section: &str, fact: &str) -> Option<&[String]> {
        let section = self.sections.iter().find(|known| known.name == section)?;
        section.find(fact)
    }
}

impl Section {
    fn new(name: &'static str) -> Self {
        let facts = Vec::new();
        Self { name, facts }
    }

    /// The lines of a fact.
    pub fn find(&self, fact: &str) -> Option<&[String]> {
        let found = self.facts.iter().find(|(known, _)| known == fact);
        found.map(|(_, lines)| lines.as_slice())
    }

    /// Add a fact.
    fn say(&mut self, fact: impl Into<String>, what: impl Into<String>) {
        self.facts.push((fact.into(), vec![what.into()]));
    }

    /// Add a fact, if it is known.
    fn say_if(&mut self, fact: impl Into<String>, what: Option<impl Into<String>>) {
        if let Some(what) = what {
            self.say(fact, what);
        }
    }

    /// Add a fact of several lines, or of none.
    fn list(&mut self, fact: impl Into<String>, lines: Vec<String>) {
        self.facts.push((fact.into(), lines));
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for section in &self.sections {
            writeln!(f, "{}", section.name)?;
            let names = section.facts.iter().map(|(name, _)| name.chars().count());
            let width = names.max().unwrap_or(0);
            for (name, lines) in &section.facts {
                let first = lines.first().map_or("none", String::as_str);
                writeln!(f, "  {name:width$}  {first}")?;
                for line in lines.iter().skip(1) {
                    writeln!(f, "  {:width$}  {line}", "")?;
                }
            }
            if section.facts.is_empty() {
                writeln!(f, "  none")?;
            }
        }
        Ok(())
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.sections.iter().map(|section| (section.name, section)))
    }
}

impl Serialize for Section {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.facts.len()))?;
        for (name, lines) in &self.facts {
            match lines.as_slice() {
                [line] => map.serialize_entry(name, line)?,
                lines => map.serialize_entry(name, lines)?,
            }
        }
        map.end()
    }
}

/// What was found to compute on, and why the rest was not.
fn accelerators(hardware: &Hardware) -> Section {
    let mut section = Section::new("accelerators");
    for found in &hardware.0 {
        let text = match found.is_available().and(found.devices.clone()) {
            Ok(devices) => devices.join(", "),
            Err(why) => format!("no: {why}"),
        };
        section.say(&found.name, text);
    }
    section
}

/// Who started this process.
fn launcher(get: environment::Lookup<'_>) -> Section {
    let mut section = Section::new("launcher");
    match environment::detect(get) {
        Err(error) => section.say("error", error.to_string()),
        Ok(found) => {
            section.say("found", found.reason);
            if let Some(place) = found.place {
                let what = format!(
                    "rank {} of {} (local rank {} of {}, machine {} of {}), which meet at {}",
                    place.rank,
                    place.world,
                    place.local_rank,
                    place.local_world,
                    place.node_rank,
                    place.nodes,
                    place.address
                );
                section.say("place", what);
            }
            if !found.remarks.is_empty() {
                section.list("remarks", found.remarks);
            }
        }
    }
    section
}

fn lossy(text: &std::ffi::OsStr) -> String {
    text.to_string_lossy().into_owned()
}

/// A file's text without the space around it; `None` where it cannot be read.
fn read(path: impl AsRef<Path>) -> Option<String> {
    let text = std::fs::read(path).ok()?;
    Some(String::from_utf8_lossy(&text).trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_machine_has_a_report_too() {
        let room = tempfile::tempdir().unwrap();
        let root = room.path();
        let sections = vec![
            system::system(root),
            processor::processor(root),
            memory::memory(root),
            libraries::libraries(&[root.join("lib")]),
            variables::variables(&[]),
            accelerators(&Hardware(Vec::new())),
        ];
        let report = Report { sections };
        let text = report.to_string();
        assert!(text.contains("accelerators\n  none\n"), "{text}");
        assert!(text.contains("kernels"), "{text}");
        serde_json::to_string(&report).unwrap();
    }

    #[test]
    fn this_machine_has_one() {
        let report = Report::look();
        let cores = &report.find("processor", "cores allowed").unwrap()[0];
        assert!(cores.starts_with(|c: char| c.is_ascii_digit()), "{cores}");
        for (section, fact) in [
            ("fabric", "rustc"),
            ("system", "kernel"),
            ("memory", "total"),
            ("limits", "ulimit -n (open files)"),
            ("wires", "tcp"),
            ("accelerators", "cpu"),
            ("launcher", "found"),
        ] {
            assert!(
                report.find(section, fact).is_some(),
                "{section}: {fact}\n{report}"
            );
        }
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["processor"]["cores allowed"], *cores);
    }

    #[test]
    fn whoever_started_the_process_is_named_or_what_is_wrong_with_its_variables() {
        let own = |name: &str| match name {
            "FABRIC_RANK" | "FABRIC_LOCAL_RANK" => Some("1".to_string()),
            "FABRIC_WORLD_SIZE" | "FABRIC_LOCAL_WORLD_SIZE" => Some("2".into()),
            "FABRIC_NODE_RANK" => Some("0".into()),
            "FABRIC_ADDR" => Some("127.0.0.1".into()),
            "FABRIC_PORT" => Some("4000".into()),
            _ => None,
        };
        let section = launcher(&own);
        assert!(
            section.find("place").unwrap()[0].contains("rank 1 of 2"),
            "{section:?}"
        );
        let half = launcher(&|name| (name == "FABRIC_RANK").then(|| "0".into()));
        assert!(
            half.find("error").unwrap()[0].contains("FABRIC_WORLD_SIZE"),
            "{half:?}"
        );
        assert!(launcher(&|_| None).find("found").unwrap()[0].contains("no launcher"));
    }
}
