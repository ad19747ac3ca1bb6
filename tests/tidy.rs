//! The repository about itself: who imports whom, how long files are, where unsafe code stands, and what must not be in
//! a commit. Method: read the sources as text.

use std::{fs, path::PathBuf};

const COMFORTABLE_LINES: usize = 500;
const MOST_LINES: usize = 800;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

/// All Rust sources of the workspace: path from the root, and text.
fn sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = ["kernels", "engine", "facade", "tests", "benches"]
        .map(|room| root().join(room))
        .to_vec();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "target") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let name = path
                    .strip_prefix(root())
                    .unwrap()
                    .to_string_lossy()
                    .into_owned();
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(found.len() > 40, "the sources were not found");
    found
}

/// The source without comments, so that prose does not count as code.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(|line| line.split("//").next().unwrap_or_default())
}

/// Inside the engine, a room sees only rooms to its left.
#[test]
fn arrows_point_from_right_to_left() {
    // Room, and the rooms of the engine that it may name.
    const MAY_SEE: [(&str, &[&str]); 9] = [
        ("error", &[]),
        ("clock", &[]),
        ("signal", &["error"]),
        ("buffer", &["error"]),
        ("schedule", &[]),
        ("wire", &["error", "clock", "signal", "buffer"]),
        (
            "rendezvous",
            &["error", "clock", "signal", "buffer", "wire"],
        ),
        (
            "comm",
            &[
                "error",
                "clock",
                "signal",
                "buffer",
                "wire",
                "rendezvous",
                "schedule",
            ],
        ),
        ("shard", &["error", "clock", "signal", "buffer", "comm"]),
    ];
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let Some(inside) = path.strip_prefix("engine/src/") else {
            continue;
        };
        let room = inside.split(['/', '.']).next().unwrap();
        let Some((_, may_see)) = MAY_SEE.iter().find(|(name, _)| *name == room) else {
            assert_eq!(room, "lib", "the room '{room}' is not in this table");
            continue;
        };
        for other in named_rooms(&text) {
            if other != room && !may_see.contains(&other.as_str()) {
                wrong.push(format!("{path} sees {other}"));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "imports against the arrows:\n{}",
        wrong.join("\n")
    );
}

/// Every room that `use crate::...` or a path `crate::...` names, groups in braces included.
fn named_rooms(text: &str) -> Vec<String> {
    let code = code(text).collect::<Vec<_>>().join("\n");
    let mut rooms = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_') {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        if !rest.starts_with('{') {
            rooms.push(first_word(rest));
            continue;
        }
        let (mut depth, mut start) = (0, 1);
        for (index, letter) in rest.char_indices() {
            match letter {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' => {}
                _ => continue,
            }
            if (letter == ',' && depth == 1) || depth == 0 {
                rooms.push(first_word(rest[start..index].trim()));
                start = index + 1;
            }
            if depth == 0 {
                break;
            }
        }
    }
    // `crate::Error` and `crate::Result` are the error room's.
    let known = |room: String| {
        if matches!(room.as_str(), "Error" | "Result") {
            "error".into()
        } else {
            room
        }
    };
    rooms
        .into_iter()
        .filter(|room| !room.is_empty())
        .map(known)
        .collect()
}

fn first_word(text: &str) -> String {
    text.chars()
        .take_while(|letter| letter.is_alphanumeric() || *letter == '_')
        .collect()
}

#[test]
fn the_arrow_test_reads_groups() {
    let text = "use crate::{\n    wire::{a, b},\n    error::Error, // shard::x\n};\nfn f() -> crate::shard::X {}";
    assert_eq!(named_rooms(text), ["wire", "error", "shard"]);
}

/// Packages see only packages below them.
#[test]
fn packages_depend_downwards() {
    const MAY_SEE: [(&str, &[&str]); 4] = [
        ("kernels", &[]),
        ("engine", &["fabric-kernels"]),
        ("facade", &["fabric-kernels", "fabric-engine"]),
        (
            "facade/adapters/candle",
            &["fabric-kernels", "fabric-engine", "fabric-facade"],
        ),
    ];
    for (folder, may_see) in MAY_SEE {
        let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        for line in manifest.lines().filter(|line| line.starts_with("fabric-")) {
            let name = line.split(['.', ' ', '=']).next().unwrap();
            assert!(may_see.contains(&name), "{folder} depends on {name}");
        }
    }
}

#[test]
fn unsafe_code_stays_in_its_rooms() {
    let allowed = |path: &str| {
        [
            "kernels/src/simd",
            "kernels/src/cuda",
            "kernels/cuda/host",
            "engine/src/wire/shm",
            "engine/src/comm/nccl",
            "engine/src/comm/mpi",
            "tests/gpu",
        ]
        .iter()
        .any(|room| path.starts_with(room))
            || path == "engine/src/buffer/slab.rs"
            || path == "facade/adapters/candle/src/cuda.rs"
    };
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if allowed(&path) || path == "tests/tidy.rs" {
            continue;
        }
        let words = |line: &str| {
            line.split(|letter: char| !letter.is_alphanumeric() && letter != '_')
                .any(|word| word == "unsafe")
        };
        wrong.extend(
            code(&text)
                .position(words)
                .map(|line| format!("{path}:{}", line + 1)),
        );
    }
    assert!(
        wrong.is_empty(),
        "unsafe code outside its rooms:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn files_are_short_enough_to_read() {
    let mut long = Vec::new();
    for (path, text) in sources() {
        let lines = text.lines().count();
        if lines > COMFORTABLE_LINES {
            println!("{path} has {lines} lines: does it hold two nouns?");
        }
        if lines > MOST_LINES {
            long.push(format!("{path}: {lines} lines"));
        }
    }
    assert!(
        long.is_empty(),
        "longer than {MOST_LINES} lines:\n{}",
        long.join("\n")
    );
}

#[test]
fn files_begin_by_saying_what_they_are_for() {
    for (path, text) in sources() {
        assert!(
            text.starts_with("//!"),
            "{path} does not open with a sentence about itself"
        );
    }
}

#[test]
fn time_and_sockets_stay_in_their_rooms() {
    for (path, text) in sources() {
        let in_engine = path.starts_with("engine/src/")
            && path != "engine/src/clock.rs"
            && !path.ends_with("tests.rs")
            && !path.contains("/tests/");
        if in_engine {
            let itself = text.split("#[cfg(test)]").next().unwrap(); // tests may measure
            let line = code(itself)
                .position(|line| line.contains("Instant::now()") || line.contains("thread::sleep"));
            assert_eq!(line, None, "{path} reads the machine's time itself");
        }
    }
}

#[test]
fn no_room_is_called_by_a_name_that_says_nothing() {
    for (path, _) in sources() {
        for part in path.trim_end_matches(".rs").split('/') {
            let empty = [
                "utils", "util", "common", "manager", "core", "base", "helper", "helpers", "misc",
            ];
            assert!(!empty.contains(&part), "{path} is called '{part}'");
        }
    }
}

#[test]
fn nothing_was_left_undone() {
    for (path, text) in sources() {
        if path != "tests/tidy.rs" {
            for word in ["TODO", "FIXME", "todo!(", "unimplemented!("] {
                assert!(!text.contains(word), "{path} says {word}");
            }
        }
    }
}
