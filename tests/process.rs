//! Real processes: they train, they die, they are told nonsense. Method: the `train` program of this package, started
//! as a user would start it; what it prints and what it leaves behind.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn train(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_train"));
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for (name, _) in std::env::vars() {
        if name.starts_with("FABRIC_") || name == "RANK" || name == "WORLD_SIZE" {
            command.env_remove(name);
        }
    }
    command
}

/// Wait for a child, but not for ever; its output as text.
pub(crate) fn finish(mut child: Child) -> (Output, String) {
    let started = Instant::now();
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        out.as_mut().map(|out| out.read_to_end(&mut text));
        text
    });
    let errors = std::thread::spawn(move || {
        let mut text = Vec::new();
        err.as_mut().map(|err| err.read_to_end(&mut text));
        text
    });
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("the program hangs");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let output = Output {
        status,
        stdout: reader.join().unwrap(),
        stderr: errors.join().unwrap(),
    };
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    (output, text)
}

fn run(args: &[&str]) -> (Output, String) {
    finish(train(args).spawn().unwrap())
}

pub(crate) fn loss(text: &str) -> &str {
    text.lines()
        .find_map(|line| line.strip_prefix("loss "))
        .unwrap_or_else(|| panic!("no loss in:\n{text}"))
}

/// The process ids that the ranks printed.
fn pids(text: &str) -> Vec<u32> {
    text.lines()
        .filter_map(|line| line.split(" is process ").nth(1)?.trim().parse().ok())
        .collect()
}

/// Whether a process runs (one that is dead but not yet buried does not).
pub(crate) fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.trim_start().starts_with('Z') && !rest.trim().is_empty())
}

pub(crate) fn signal(signal: Signal, pid: u32) {
    let pid = Pid::from_raw(pid as i32).expect("a process id");
    kill_process(pid, signal).unwrap();
}

/// Start `world` ranks that train for long, and wait until all have begun: the supervisor, the ranks' process ids, and
/// what it prints from then on.
fn start(
    world: &str,
    extra: &[(&str, &str)],
) -> (Child, Vec<(usize, u32)>, mpsc::Receiver<String>) {
    let mut command = train(&[world, "100000"]);
    command.envs(extra.iter().copied());
    let mut child = command.spawn().unwrap();
    let (sender, lines) = mpsc::channel();
    let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let errors = sender.clone();
    std::thread::spawn(move || {
        BufReader::new(out)
            .lines()
            .map_while(Result::ok)
            .for_each(|l| drop(sender.send(l)))
    });
    std::thread::spawn(move || {
        BufReader::new(err)
            .lines()
            .map_while(Result::ok)
            .for_each(|l| drop(errors.send(l)))
    });
    let mut ranks = Vec::new();
    while ranks.len() < world.parse().unwrap() {
        let line = lines.recv_timeout(PATIENCE).expect("the ranks start");
        if let Some((rank, pid)) = line
            .strip_prefix("rank ")
            .and_then(|rest| rest.split_once(" is process "))
        {
            ranks.push((rank.parse().unwrap(), pid.parse().unwrap()));
        }
    }
    ranks.sort_unstable();
    std::thread::sleep(Duration::from_millis(300)); // some steps
    (child, ranks, lines)
}

#[test]
fn the_same_program_trains_on_one_two_and_three_processes() {
    let (one, text) = run(&["1", "50"]);
    assert!(one.status.success(), "{text}");
    let single = loss(&text).parse::<f64>().unwrap();
    assert!(single.is_finite());
    let (two, text) = run(&["2", "50"]);
    assert!(two.status.success(), "{text}");
    assert_eq!(pids(&text).len(), 2, "{text}");
    let again = run(&["2", "50"]).1;
    assert_eq!(
        loss(&text),
        loss(&again),
        "two runs give the same loss to the last digit"
    );
    assert!(run(&["3", "20"]).0.status.success());
}

#[test]
fn a_program_may_launch_twice() {
    for _ in 0..3 {
        let (output, text) = run(&["3", "5", "twice"]);
        assert!(output.status.success(), "{text}");
        let losses = text
            .lines()
            .filter(|line| line.starts_with("loss "))
            .count();
        assert_eq!((losses, pids(&text).len()), (2, 6), "{text}");
    }
}

#[test]
fn kill_9_of_a_rank_ends_the_others_with_its_name_and_its_last_operation() {
    for wire in ["tcp", "auto"] {
        let (mut child, ranks, lines) = start("3", &[("FABRIC_WIRE", wire)]);
        let killed = Instant::now();
        signal(Signal::KILL, ranks[1].1);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            assert!(
                killed.elapsed() < Duration::from_secs(5),
                "{wire}: the job did not end within 5 s"
            );
            std::thread::sleep(Duration::from_millis(10));
        };
        assert!(!status.success());
        let text = lines.iter().collect::<Vec<_>>().join("\n");
        for rank in [0, 2] {
            let line = text
                .lines()
                .find(|line| line.contains(&format!("rank {rank}: rank 1 is gone")));
            let line = line.unwrap_or_else(|| {
                panic!("{wire}: rank {rank} does not say that rank 1 is gone:\n{text}")
            });
            assert!(
                line.contains("The last operation it joined: #"),
                "{wire}: {line}"
            );
            assert!(line.contains("Waiting for it: #"), "{wire}: {line}");
        }
        assert!(
            text.contains("rank 1 was killed by signal 9 (SIGKILL)"),
            "{wire}: {text}"
        );
        assert!(
            ranks.iter().all(|(_, pid)| !lives(*pid)),
            "{wire}: a process is left"
        );
        let left = std::fs::read_dir("/dev/shm")
            .into_iter()
            .flatten()
            .flatten();
        let left = left
            .filter(|entry| entry.file_name().to_string_lossy().contains("fabric"))
            .count();
        assert_eq!(left, 0, "{wire}: a shared-memory segment is left");
    }
}

/// Goal: a rank that is alive and does nothing is found, rank 0 with its hub too. Method: stop it; its sockets stay open.
#[test]
fn a_rank_that_falls_silent_is_named_by_the_others() {
    for silent in [0, 1] {
        let (mut child, ranks, lines) = start("3", &[("FABRIC_SILENCE_S", "1.5")]);
        signal(Signal::STOP, ranks[silent].1);
        let stopped = Instant::now();
        while child.try_wait().unwrap().is_none() {
            assert!(
                stopped.elapsed() < Duration::from_secs(20),
                "rank {silent}: nobody noticed"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        let text = lines.iter().collect::<Vec<_>>().join("\n");
        let words = format!("rank 2: rank {silent} is gone (it has been silent for");
        assert!(text.contains(&words), "{text}");
        assert!(
            ranks.iter().all(|(_, pid)| !lives(*pid)),
            "a process is left"
        );
    }
}

#[test]
fn sigterm_to_the_supervisor_leaves_no_process_behind() {
    let (child, ranks, lines) = start("2", &[]);
    signal(Signal::TERM, child.id());
    let (output, _) = finish(child);
    assert!(!output.status.success());
    drop(lines);
    assert!(ranks.iter().all(|(_, pid)| !lives(*pid)));
}

#[test]
fn kill_9_of_the_supervisor_leaves_no_process_behind() {
    let (mut child, ranks, _lines) = start("2", &[]);
    signal(Signal::KILL, child.id());
    child.wait().unwrap();
    let started = Instant::now();
    while ranks.iter().any(|(_, pid)| lives(*pid)) {
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "a rank outlives its supervisor"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_first_failure_is_shown_in_its_own_words() {
    for (fault, words) in [
        ("error:1", "the data ran out"),
        ("panic:2", "rank 2"),
        ("exit:1", "rank 1"),
        (
            "models",
            "set up different models: rank 0 has parameter 'weight': f32 [1000], rank 1 has parameter 'weight': f32 [999]",
        ),
    ] {
        let (output, text) = run(&["3", "50", fault]);
        assert!(!output.status.success(), "{fault}: {text}");
        assert!(
            text.contains(words),
            "{fault}: '{words}' is not in:\n{text}"
        );
    }
}

#[test]
fn a_rank_that_hangs_is_named_by_the_time_out() {
    let mut command = train(&["2", "50", "hang:1"]);
    command.env("FABRIC_TIMEOUT_S", "1");
    let (output, text) = finish(command.spawn().unwrap());
    assert!(!output.status.success());
    assert!(text.contains("waiting for rank 1"), "{text}");
}

#[test]
fn nonsense_is_refused_in_one_sentence() {
    let (output, text) = run(&["0", "5"]);
    assert!(!output.status.success());
    assert!(
        text.contains("0 devices were asked for. Ask for at least one"),
        "{text}"
    );
    let mut command = train(&["2", "5"]);
    command.env("TEST_STRATEGY", "dpp");
    let (output, text) = finish(command.spawn().unwrap());
    assert!(!output.status.success());
    assert!(
        text.contains("strategy 'dpp' is not known. Choose one of auto, single, ddp"),
        "{text}"
    );
    let mut command = train(&["2", "5"]);
    command.env("FABRIC_WIRE", "pigeon");
    let (output, text) = finish(command.spawn().unwrap());
    assert!(!output.status.success());
    assert!(
        text.contains("FABRIC_WIRE = 'pigeon' is not known"),
        "{text}"
    );
}

#[test]
fn ranks_that_a_launcher_started_find_each_other() {
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
        .to_string();
    let children = ["0", "1"].map(|rank| {
        let mut command = train(&["2", "20"]);
        command.envs([
            ("RANK", rank),
            ("LOCAL_RANK", rank),
            ("WORLD_SIZE", "2"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("GROUP_RANK", "0"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "1"), // torchrun's own store
            ("FABRIC_PORT", &port),
        ]);
        command.spawn().unwrap()
    });
    for child in children {
        let (output, text) = finish(child);
        assert!(output.status.success(), "{text}");
    }
}
