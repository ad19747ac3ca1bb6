//! The carried program runs: over the stand-ins its checks pass, and its tables have all their rows. (Its speeds mean
//! nothing here.)

use std::{
    net::TcpListener,
    process::{Command, Stdio},
};

use gpu_suite::stage::with_fakes;

fn gpu(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpu"));
    command
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    text
}

/// Two ranks of one command; what both print, and whether they ended well.
fn two(what: &str) -> [(bool, String); 2] {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let address = format!("127.0.0.1:{port}");
    let mut arguments = vec![what];
    if what == "rank" {
        arguments.extend(["--most-mib", "1"]);
    }
    let ranks = [0, 1].map(|rank| {
        let mut command = gpu(&arguments);
        let device = rank.to_string();
        let named = [
            ("GPU_RANK", &*device),
            ("GPU_WORLD", "2"),
            ("GPU_ADDRESS", &address),
            ("GPU_DEVICE", &device),
        ];
        command.envs(named).spawn().unwrap()
    });
    ranks.map(|rank| {
        let output = rank.wait_with_output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    })
}

#[test]
fn it_looks_and_measures() {
    with_fakes(&[("FAKE_CUDA_DELAY_US", "0")], || {
        let text = output(&mut gpu(&["look"]));
        assert!(
            text.contains("cuda:1") && text.contains("NCCL 2.28.3"),
            "{text}"
        );
        let text = output(&mut gpu(&["speeds", "--divide-by", "5000"]));
        assert!(
            text.contains("148 tensors") && text.contains("adamw f32, and the bf16 copy"),
            "{text}"
        );
    });
}

#[test]
fn without_a_driver_it_says_what_was_looked_for() {
    // Off the stage: cargo's own path leads to the stand-ins.
    let text = output(
        gpu(&["look"])
            .env_remove("LD_LIBRARY_PATH")
            .env("FABRIC_NCCL", "/nowhere/libnccl.so"),
    );
    let is_told = text.contains("libcuda.so or libcuda.so.1") || text.contains("cuda:0");
    assert!(is_told, "{text}");
    assert!(text.contains("/nowhere/libnccl.so"), "{text}");
}

#[test]
fn its_kernels_are_those_of_the_host() {
    with_fakes(&[("FAKE_CUDA_DELAY_US", "0")], || {
        let text = output(&mut gpu(&["kernels"]));
        assert_eq!(text.matches("  0 wrong").count(), 7, "{text}");
    });
}

#[test]
fn its_ranks_meet_time_out_and_die() {
    with_fakes(&[("FAKE_CUDA_DELAY_US", "0")], || {
        let [(is_right, text), (other, more)] = two("rank");
        assert!(
            is_right && other && text.contains("compared on all ranks, 0 wrong"),
            "{text}{more}"
        );
        assert!(text.contains("busbw"), "{text}");
        let [(is_right, text), (other, more)] = two("hang");
        assert!(
            is_right && other && text.contains("was not complete after 5 s"),
            "{text}{more}"
        );
        assert!(more.contains("rank 1 was told"), "{more}");
        let [(is_right, text), (other, more)] = two("kill");
        assert!(
            is_right && !other && text.contains("rank 1 is gone"),
            "{text}{more}"
        );
    });
}
