//! What a rank's memory grows by is what the plan predicted. Method: a program that trains 67 million parameters in 16
//! blocks and looks at its own resident memory while they and their gradients are there.

use std::process::Command;

use serde_json::Value;

const TOLERANCE: f64 = 0.10;

/// What each rank's memory grew by, and what was predicted, in bytes.
fn measure(strategy: &str, ranks: usize) -> Vec<(f64, f64)> {
    let output = Command::new(env!("CARGO_BIN_EXE_footprint"))
        .args([strategy, &ranks.to_string()])
        // Otherwise the system's allocator keeps what was freed, in amounts that depend on what came before.
        .env("MALLOC_MMAP_THRESHOLD_", (1 << 20).to_string())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let lines = text.lines().map(|line| {
        let line = serde_json::from_str::<Value>(line).unwrap();
        let number = |name: &str| line[name].as_f64().unwrap();
        (
            number("own") + number("shared"),
            number("predicted") + number("declared"),
        )
    });
    let lines = lines.collect::<Vec<_>>();
    assert_eq!(lines.len(), ranks, "{text}");
    lines
}

#[test]
fn every_row_needs_the_memory_that_its_plan_predicts() {
    for ranks in [2, 4] {
        let mut most = Vec::new();
        for strategy in ["ddp", "zero1", "zero2", "fsdp", "hsdp"] {
            let lines = measure(strategy, ranks);
            for (measured, predicted) in &lines {
                let off = (measured - predicted).abs() / predicted;
                assert!(
                    off < TOLERANCE,
                    "{strategy} on {ranks} ranks: {measured:.3e} bytes, predicted {predicted:.3e}"
                );
            }
            most.push(lines.iter().map(|line| line.0).fold(0.0, f64::max));
        }
        if ranks == 4 {
            let (ddp, fsdp) = (most[0], most[3]);
            assert!(
                fsdp < 0.45 * ddp,
                "fsdp {fsdp:.3e} bytes a rank, ddp {ddp:.3e}"
            );
        }
    }
}
