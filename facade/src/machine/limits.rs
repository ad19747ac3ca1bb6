//! What a shell's `ulimit` says, as far as ranks run into it.

use rustix::process::{Resource, Rlimit, getrlimit};

use super::Section;

const ALL: [(&str, Resource, u64); 6] = [
    ("ulimit -l (locked memory, KiB)", Resource::Memlock, 1024),
    ("ulimit -n (open files)", Resource::Nofile, 1),
    ("ulimit -u (processes)", Resource::Nproc, 1),
    ("ulimit -v (address space, KiB)", Resource::As, 1024),
    (
        "ulimit -f (file size, KiB; memfd too)",
        Resource::Fsize,
        1024,
    ),
    ("ulimit -s (stack, KiB)", Resource::Stack, 1024),
];

pub(super) fn limits() -> Section {
    let mut section = Section::new("limits");
    for (name, resource, unit) in ALL {
        section.say(name, text(&getrlimit(resource), unit));
    }
    section
}

fn text(limit: &Rlimit, unit: u64) -> String {
    let number = |limit: Option<u64>| match limit {
        Some(limit) => (limit / unit).to_string(),
        None => "unlimited".into(),
    };
    match limit.current == limit.maximum {
        true => number(limit.current),
        false => format!(
            "{} (at most {})",
            number(limit.current),
            number(limit.maximum)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_shown_in_the_shells_units() {
        let limit = |current, maximum| Rlimit { current, maximum };
        assert_eq!(text(&limit(Some(8 << 20), Some(8 << 20)), 1024), "8192");
        assert_eq!(
            text(&limit(Some(1024), None), 1),
            "1024 (at most unlimited)"
        );
        assert_eq!(limits().facts.len(), ALL.len());
    }
}
