//! Interfaces and their addresses: where ranks of other machines may come.

use std::collections::BTreeMap;

use super::Section;

pub(super) fn network() -> Section {
    let mut section = Section::new("network");
    let found = match if_addrs::get_if_addrs() {
        Ok(found) => found,
        Err(why) => {
            section.say("interfaces", format!("cannot be listed: {why}"));
            return section;
        }
    };
    let mut interfaces: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for interface in found {
        let address = interface.ip().to_string();
        interfaces.entry(interface.name).or_default().push(address);
    }
    for (name, addresses) in interfaces {
        section.list(name, addresses);
    }
    section
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_has_its_address() {
        let section = network();
        let mut all = section.facts.iter().flat_map(|(_, addresses)| addresses);
        assert!(all.any(|address| address == "127.0.0.1"), "{section:?}");
    }
}
