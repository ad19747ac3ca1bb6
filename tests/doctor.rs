//! `fabric doctor` and `fabric env`. Method: the command line as a user would type it, on this machine, and on it once more with
//! something taken away.

use std::{fs, process::Output};

use serde_json::Value;

use crate::{
    launching::{CLI, program},
    process::finish,
};

fn cli(args: &[&str], variables: &[(&str, &str)]) -> (Output, String) {
    let mut command = program(CLI, args);
    command.envs(variables.iter().copied());
    finish(command.spawn().unwrap())
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The checks of a wire: how many, and how many have passed.
fn passed(findings: &Value, wire: &str) -> (usize, usize) {
    let checks = findings["checks"].as_array().unwrap();
    let of_wire: Vec<_> = checks
        .iter()
        .filter(|check| check["wire"] == wire)
        .collect();
    let passed = of_wire.iter().filter(|check| check["status"] == "PASS");
    (of_wire.len(), passed.count())
}

// GAP-36
#[test]
fn this_machine_is_well() {
    // What a user has set for jobs of another shape is not for the doctor's.
    let odd = [
        ("FABRIC_DEVICES", "7"),
        ("FABRIC_WIRE", "tcp"),
        ("FABRIC_STRATEGY", "single"),
    ];
    let (output, text) = cli(&["doctor", "--devices", "2", "--quick"], &odd);
    assert!(output.status.success(), "{text}");
    assert!(
        !text.contains("FAIL") && !text.contains('\x1b'),
        "no terminal, no colours:\n{text}"
    );
    for what in [
        "PASS  shm   all_reduce              f32, bf16, i64 of 1, 1000 elements",
        "PASS  unix  split groups",
        "PASS  tcp   uneven lengths",
        "the supervisor names it, and rank 0 after",
        "busbw",
        "memory is copied at",
    ] {
        assert!(text.contains(what), "{what} is not in:\n{text}");
    }
}

// GAP-36
#[test]
fn what_was_found_is_there_for_scripts_too() {
    let args = [
        "doctor",
        "--devices",
        "3",
        "--quick",
        "--json",
        "--wire",
        "shm",
    ];
    let (output, text) = cli(&args, &[]);
    assert!(output.status.success(), "{text}");
    let findings = json(&output);
    assert_eq!(findings["devices"], 3);
    assert_eq!(passed(&findings, "shm"), (16, 16), "{text}");
    assert_eq!(passed(&findings, "tcp"), (0, 0));
    let speeds = findings["speeds"].as_array().unwrap();
    assert_eq!(speeds.len(), 3);
    let large = &speeds[2];
    let number = |name: &str| large[name].as_f64().unwrap();
    // 2 (n - 1) / n of three ranks.
    let ratio = number("bus_bytes_per_s") / number("bytes_per_s");
    assert!((ratio - 4.0 / 3.0).abs() < 1e-9, "{large}");
    assert!((number("bytes_per_s") * number("seconds") / number("bytes") - 1.0).abs() < 1e-9);
}

// GAP-36: with too little address space, ranks cannot map one another's memory; sockets still work.
#[test]
fn a_wire_that_cannot_be_fails_says_why_and_what_to_do() {
    let script = format!("ulimit -v 8000000; exec {CLI} doctor --quick --json");
    let (output, text) = finish(program("sh", &["-c", &script]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("1 of 32 checks failed; fabric env"), "{text}");
    let findings = json(&output);
    let checks = findings["checks"].as_array().unwrap();
    let failed = checks
        .iter()
        .find(|check| check["status"] == "FAIL")
        .unwrap();
    assert_eq!(
        (&failed["wire"], &failed["name"]),
        (&"shm".into(), &"ranks meet".into())
    );
    let what = failed["what"].as_str().unwrap();
    assert!(
        what.contains("cannot share memory") && what.contains("cannot be mapped"),
        "{what}"
    );
    assert!(
        failed["hint"].as_str().unwrap().contains("ulimit -v"),
        "{failed}"
    );
    // The rank is lost on a wire that works.
    assert_eq!(
        (passed(&findings, "unix"), passed(&findings, "tcp")),
        ((16, 16), (15, 15))
    );

    let (output, text) = cli(&["doctor", "--quick"], &[("FABRIC_TUNING", "/nowhere")]);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("FAIL  tcp   ranks meet") && text.contains("/nowhere"),
        "{text}"
    );
}

#[test]
fn a_doctor_needs_ranks_and_wires_that_there_are() {
    for args in [
        ["--devices", "1"],
        ["--devices", "65"],
        ["--wire", "pigeon"],
    ] {
        let (output, text) = cli(&[&["doctor"], &args[..]].concat(), &[]);
        assert_eq!(output.status.code(), Some(2), "{text}");
    }
}

// GAP-36
#[test]
fn a_report_names_the_launcher_and_keeps_the_secret() {
    let room = tempfile::tempdir().unwrap();
    let secret = "0123456789abcdef".repeat(4);
    let variables = [
        ("FABRIC_SECRET", secret.as_str()),
        ("FABRIC_WIRE", "tcp"),
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("GROUP_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29500"),
        ("LD_LIBRARY_PATH", room.path().to_str().unwrap()),
    ];
    fs::write(room.path().join("libnccl.so.2"), b"").unwrap();
    let (output, text) = cli(&["env"], &variables);
    assert!(output.status.success(), "{text}");
    for what in [
        "set, 64 characters",
        "started by torchrun",
        "rank 1 of 2",
        "libnccl.so.2",
        "rustc 1.",
    ] {
        assert!(text.contains(what), "{what} is not in:\n{text}");
    }
    assert!(!text.contains(&secret), "{text}");
    let (output, _) = cli(&["env", "--json"], &variables);
    let report = json(&output);
    assert_eq!(report["variables"]["FABRIC_WIRE"], "tcp");
    assert!(report["accelerators"]["cuda"].is_string());
    assert_eq!(report["fabric"]["version"], env!("CARGO_PKG_VERSION"));
    assert!(!report.to_string().contains(&secret));
}
