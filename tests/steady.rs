//! A training step in its stride allocates nothing: not on the engine's threads, not inside its calls, not in the optimizer.
//! Method: a program whose allocator counts trains under every row and over both wires; its model allocates nothing itself.
//! Another runs every collective in every way.

use std::process::Command;

/// Train, and expect that no rank's process has allocated anything after step 2.
fn holds_still(wire: &str, strategy: &str, ranks: usize, precision: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_steady"))
        .args([strategy, &ranks.to_string(), precision])
        .env("FABRIC_WIRE", wire)
        .env("FABRIC_SILENCE_S", "5") // so that signs of life fall into the time that counts
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let what = format!("{strategy} on {ranks} ranks over {wire} in {precision}");
    assert!(
        output.status.success(),
        "{what}:\n{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for rank in 0..ranks {
        let line = format!("rank {rank}: 0 allocations");
        assert!(text.lines().any(|said| said == line), "{what}: {text}");
    }
}

const ROWS: [(&str, usize); 5] = [
    ("ddp", 2),
    ("zero1", 3),
    ("zero2", 2),
    ("fsdp", 3),
    ("hsdp", 4),
];

#[test]
fn no_row_allocates_in_shared_memory() {
    for (strategy, ranks) in ROWS {
        holds_still("shm", strategy, ranks, "32-true");
    }
}

#[test]
fn no_row_allocates_over_tcp() {
    for (strategy, ranks) in ROWS {
        holds_still("tcp", strategy, ranks, "32-true");
    }
}

#[test]
fn no_collective_that_ran_before_allocates() {
    for wire in ["shm", "tcp"] {
        for ranks in ["2", "3", "5"] {
            let output = Command::new(env!("CARGO_BIN_EXE_calls"))
                .args([ranks, wire])
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            let counted = output.status.success() && text.starts_with("0 allocations");
            assert!(
                counted,
                "{ranks} ranks over {wire}:\n{text}{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
}

#[test]
fn neither_smaller_types_nor_a_single_device_allocate() {
    holds_still("auto", "fsdp", 2, "bf16-mixed");
    holds_still("auto", "zero1", 2, "16-mixed");
    holds_still("auto", "single", 1, "32-true");
}
