//! `fabric run`, jobs on several machines, and ranks that other launchers start. Method: the command line as a user would
//! type it, over shell scripts that say what they see, and over the `train` program; launchers are played by their
//! variables, machines by several supervisors on this one.

use std::{
    collections::BTreeSet,
    io::Read,
    net::{TcpListener, UdpSocket},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::process::{finish, lives, loss, signal};

pub(crate) const CLI: &str = env!("CARGO_BIN_EXE_fabric-cli");
const TRAIN: &str = env!("CARGO_BIN_EXE_train");
const PATIENCE: Duration = Duration::from_secs(30);

/// A program without the variables of whatever started these tests.
pub(crate) fn program(path: &str, args: &[&str]) -> Command {
    let mut command = Command::new(path);
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let launchers = ["FABRIC_", "SLURM_", "OMPI_", "PMI", "MPI_", "JSM_", "LSB_"];
    let others = [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    ];
    for (name, _) in std::env::vars() {
        let theirs = launchers.iter().any(|start| name.starts_with(start));
        if theirs || others.contains(&name.as_str()) {
            command.env_remove(name);
        }
    }
    command
}

fn cli(args: &[&str]) -> Command {
    program(CLI, &[&["run"], args].concat())
}

fn run(args: &[&str]) -> (Output, String) {
    finish(cli(args).spawn().unwrap())
}

/// A script that every rank runs.
fn script<'a>(options: &[&'a str], text: &'a str) -> Vec<&'a str> {
    [options, &["sh", "-c", text]].concat()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn lines(text: &str) -> BTreeSet<&str> {
    text.lines().collect()
}

/// The text once `file` has some: a script says in it that it has come so far.
fn wait_for(file: &Path) -> String {
    let started = Instant::now();
    loop {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        if text.ends_with('\n') {
            return text;
        }
        assert!(
            started.elapsed() < PATIENCE,
            "{} stays empty",
            file.display()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ends(pids: &[u32]) {
    let started = Instant::now();
    while pids.iter().any(|pid| lives(*pid)) {
        assert!(started.elapsed() < PATIENCE, "a rank outlives its job");
        std::thread::sleep(Duration::from_millis(5));
    }
}

// CLI-01, line 15
#[test]
fn two_ranks_train_under_the_command_line_as_under_their_own_launch() {
    let (own, text) = finish(program(TRAIN, &["2", "20"]).spawn().unwrap());
    assert!(own.status.success(), "{text}");
    let expected = format!("loss {}", loss(&text));
    let (output, text) = run(&["--devices", "2", TRAIN, "2", "20"]);
    assert!(output.status.success(), "{text}");
    for rank in 0..2 {
        assert!(text.contains(&format!("[rank {rank}] rank {rank} is process ")));
    }
    assert!(text.contains(&format!("[rank 0] {expected}")), "{text}");
}

// CLI-01, BUG-01, line 15
#[test]
fn line_15_options_become_variables_and_what_follows_the_program_is_the_programs() {
    let names = "ACCELERATOR STRATEGY DEVICES NUM_NODES PRECISION CLI WORLD_SIZE";
    let text = names
        .split(' ')
        .map(|name| format!("$FABRIC_{name}"))
        .collect::<Vec<_>>()
        .join(" ");
    let text = format!("echo {text} \"$@\"");
    let options = [
        "--accelerator=cpu",
        "--strategy",
        "ddp",
        "--devices",
        "2",
        "--num_nodes=1",
        "--node_rank=0",
        "--precision",
        "bf16-mixed",
        "--no-prefix",
    ];
    let mut args = script(&options, &text);
    args.extend(["name", "--devices", "5", "--unknown", "-x"]);
    let (output, _) = run(&args);
    let line = "cpu ddp 2 1 bf16-mixed 1 2 --devices 5 --unknown -x\n";
    assert_eq!(out(&output), line.repeat(2));
    // "auto" is a number before the ranks hear of it, the same for all; what was not chosen is not set.
    let (output, _) = run(&script(&["--devices", "auto"], &text));
    assert_eq!(out(&output), "1 1 1 1\n");
}

#[test]
fn the_first_failing_ranks_status_is_the_commands() {
    for (text, code, words) in [
        ("exit 0", 0, ""),
        (
            "exit $((FABRIC_RANK * 7))",
            7,
            "rank 1 ended with exit code 7",
        ),
        (
            "test $FABRIC_RANK = 1 || exec sleep 60; kill -9 $$",
            137,
            "fabric: rank 1 was killed by signal 9 (SIGKILL)",
        ),
    ] {
        let (output, said) = run(&script(&["--devices", "2"], text));
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(words), "{said}");
    }
    let (output, text) = run(&["--devices", "2", TRAIN, "2", "20", "error:1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text.contains("fabric: rank 1 failed: the data ran out"),
        "{text}"
    );
}

/// Goal: whole lines, of one rank each, none lost; a process that a rank left behind is not waited for.
#[test]
fn lines_are_prefixed_whole_and_kept_in_files() {
    let folder = tempfile::tempdir().unwrap();
    let logs = folder.path().join("a/logs");
    let logs = logs.to_str().unwrap();
    let text = "seq 3000; echo wrong >&2; printf 'no end'; sleep 50 & echo $! > left.$FABRIC_RANK";
    let mut command = cli(&script(&["--devices=2", "--log-dir", logs], text));
    let started = Instant::now();
    let (output, text) = finish(command.current_dir(folder.path()).spawn().unwrap());
    assert!(output.status.success(), "{text}");
    assert!(started.elapsed() < PATIENCE, "it waited for the sleepers");
    let printed = out(&output);
    for rank in ["0", "1"] {
        let left = wait_for(&folder.path().join(format!("left.{rank}")));
        Command::new("kill").arg(left.trim()).status().unwrap();
        let prefix = format!("[rank {rank}] ");
        let own = printed
            .lines()
            .filter_map(|line| line.strip_prefix(&prefix));
        let numbers = (1..=3000).map(|number| number.to_string());
        let expected: Vec<String> = numbers.chain(["no end".into()]).collect();
        assert!(own.eq(&expected));
        let read = |ending: &str| std::fs::read_to_string(format!("{logs}/rank-{rank}.{ending}"));
        assert!(read("out").unwrap().lines().eq(&expected));
        assert_eq!(read("err").unwrap(), "wrong\n");
    }
    assert_eq!(printed.lines().count(), 2 * 3001, "no line is torn");
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(lines(&errors), lines("[rank 0] wrong\n[rank 1] wrong"));
    // One rank writes for itself, unless told otherwise; no colour goes into a pipe.
    assert_eq!(out(&run(&script(&[], "echo hi")).0), "hi\n");
    assert_eq!(
        out(&run(&script(&["--prefix"], "echo hi")).0),
        "[rank 0] hi\n"
    );
}

#[test]
fn a_reader_that_leaves_ends_ranks_that_would_print_for_ever() {
    let mut child = cli(&["--devices", "2", "yes"]).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut begin = [0; 64];
    out.read_exact(&mut begin).unwrap();
    drop(out);
    let (output, text) = finish(child);
    assert_eq!(output.status.code(), Some(128 + 13), "{text}");
    assert!(text.contains("(SIGPIPE)"), "{text}");
}

#[test]
fn all_ranks_start_again_with_another_secret_until_they_succeed_or_have_tried_enough() {
    let text = "echo try $FABRIC_RESTART $FABRIC_RANK $FABRIC_SECRET; test $FABRIC_RESTART = 2";
    let options = ["--devices", "2", "--no-prefix", "--max-restarts"];
    let (output, said) = run(&script(&[&options[..], &["3"]].concat(), text));
    assert!(output.status.success(), "{said}");
    assert!(said.contains("starting all ranks again (2 of 3)"), "{said}");
    let printed = out(&output);
    let mut secrets = BTreeSet::new();
    for restart in 0..3 {
        let start = format!("try {restart} ");
        let own: Vec<&str> = printed
            .lines()
            .filter(|line| line.starts_with(&start))
            .collect();
        assert!(!own.is_empty() && own.len() <= 2, "{printed}"); // one may be ended before it speaks
        secrets.extend(own.iter().filter_map(|line| line.split(' ').nth(3)));
    }
    assert_eq!(secrets.len(), 3, "{printed}");
    let (output, said) = run(&script(&[&options[..], &["1"]].concat(), text));
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(!out(&output).contains("try 2"));
}

/// Start a script of two ranks that runs until it is ended, and wait until both run: the supervisor and their process ids.
fn sleepers(folder: &Path, before: &str) -> (Child, Vec<u32>) {
    let text = format!("{before} echo $$ > pid.$FABRIC_RANK; while :; do sleep 0.02; done");
    let mut command = cli(&script(&["--devices", "2"], &text));
    let temporary = folder.join("tmp");
    std::fs::create_dir(&temporary).unwrap();
    command.current_dir(folder).env("TMPDIR", temporary);
    let child = command.spawn().unwrap();
    let pids = ["pid.0", "pid.1"].map(|name| wait_for(&folder.join(name)));
    let pids = pids.map(|text| text.trim().parse().unwrap());
    (child, pids.to_vec())
}

// LAU-02, BUG-20: of any program, also one that knows nothing of its supervisor.
#[test]
fn kill_9_of_the_command_leaves_no_process_and_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let (mut child, pids) = sleepers(folder.path(), "");
    signal(Signal::KILL, child.id());
    child.wait().unwrap();
    ends(&pids);
    let left = std::fs::read_dir(folder.path().join("tmp"))
        .unwrap()
        .count();
    assert_eq!(left, 0, "temporary files are left");
}

// LAU-02, line 10
#[test]
fn kill_9_of_a_rank_ends_the_other_and_is_told_first() {
    let folder = tempfile::tempdir().unwrap();
    let (child, pids) = sleepers(folder.path(), "");
    signal(Signal::KILL, pids[1]);
    let (output, text) = finish(child);
    assert_eq!(output.status.code(), Some(137), "{text}");
    assert_eq!(text, "fabric: rank 1 was killed by signal 9 (SIGKILL)\n");
    ends(&pids);
}

#[test]
fn a_supervisor_that_is_asked_to_end_dies_by_the_signal() {
    for which in [Signal::INT, Signal::TERM, Signal::HUP] {
        let folder = tempfile::tempdir().unwrap();
        let (child, pids) = sleepers(folder.path(), "");
        signal(which, child.id());
        let (output, text) = finish(child);
        assert_eq!(output.status.signal(), Some(which.as_raw()), "{text}");
        ends(&pids);
    }
    // Also the supervisor in a program that launches itself, whose ranks say why they end.
    let folder = tempfile::tempdir().unwrap();
    let out = std::fs::File::create(folder.path().join("out")).unwrap();
    let mut command = program(TRAIN, &["2", "100000"]);
    let child = command.stdout(out).spawn().unwrap();
    let started = Instant::now();
    let said = || std::fs::read_to_string(folder.path().join("out")).unwrap();
    while said().lines().count() < 2 {
        assert!(started.elapsed() < PATIENCE, "the ranks do not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(Signal::INT, child.id());
    let (output, text) = finish(child);
    assert_eq!(output.status.signal(), Some(2), "{text}");
    assert!(text.contains("received SIGINT"), "{text}");
}

#[test]
fn ranks_that_end_well_when_they_are_asked_to_are_a_success() {
    let folder = tempfile::tempdir().unwrap();
    let (child, _) = sleepers(folder.path(), "trap 'echo saved; exit 0' TERM;");
    signal(Signal::TERM, child.id());
    let (output, text) = finish(child);
    assert!(output.status.success(), "{text}");
    assert_eq!(lines(&text), lines("[rank 0] saved\n[rank 1] saved"));
}

/// Two supervisors of two ranks each, which play two machines.
fn nodes(address: &str, port: u16, args: &[&str]) -> [Child; 2] {
    ["1", "0"].map(|node_rank| {
        let mut command = cli(&["--devices", "2", "--num-nodes", "2"]);
        command
            .args(["--node-rank", node_rank, "--main-address", address])
            .args(["--main-port", &port.to_string()])
            .args(args)
            .env("FABRIC_SECRET", "known to both");
        command.spawn().unwrap()
    })
}

fn free_port(address: &str) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// An address of this machine that is not loopback, when it has one: nothing is sent.
fn own_address() -> Option<String> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("198.51.100.1:9").ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_loopback() && !ip.is_unspecified()).then(|| ip.to_string())
}

// LAU-01, line 9
#[test]
fn two_supervisors_make_one_job() {
    let (four, text) = finish(program(TRAIN, &["4", "20"]).spawn().unwrap());
    assert!(four.status.success(), "{text}");
    let expected = format!("[rank 0] loss {}", loss(&text));
    let addresses = ["127.0.0.1".to_string()].into_iter().chain(own_address());
    for address in addresses {
        let [second, first] = nodes(&address, free_port(&address), &[TRAIN, "2", "20"]);
        let ((first, said), (second, also)) = (finish(first), finish(second));
        assert!(first.status.success(), "{address}: {said}{also}");
        assert!(second.status.success(), "{address}: {said}{also}");
        assert!(said.contains(&expected), "{address}: {said}");
        for rank in 2..4 {
            assert!(also.contains(&format!("[rank {rank}] rank {rank} is process ")));
        }
    }
}

#[test]
fn a_failure_on_one_machine_ends_the_other_with_its_story() {
    let port = free_port("127.0.0.1");
    let [second, first] = nodes("127.0.0.1", port, &[TRAIN, "2", "20", "error:3"]);
    let ((first, said), (second, also)) = (finish(first), finish(second));
    assert_eq!(
        (first.status.code(), second.status.code()),
        (Some(1), Some(1))
    );
    assert!(said.contains("the data ran out"), "{said}");
    assert!(
        also.contains("fabric: rank 3 failed: the data ran out"),
        "{also}"
    );
}

#[test]
fn what_cannot_be_started_is_said_before_anything_is() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("train.py"), "").unwrap();
    for (args, words) in [
        (
            &["target/release/examples/gpt"][..],
            "cargo build --release --example gpt first?",
        ),
        (&["target/debug/train"], "cargo build --bin train first?"),
        (&["./nothing"], "there is no program './nothing'"),
        (&["train.py"], "fabric run ./train.py"),
        (&["./train.py"], "fabric run python ./train.py"),
        (&["no-such-program"], "is on PATH"),
        (&["/"], "is a folder"),
        (&["--devices=0", "true"], "Ask for at least one"),
        (&["--devices=two", "true"], "devices = 'two'"),
        (&["--strategy=dpp", "true"], "strategy 'dpp' is not known"),
        (&["--node-rank=1", "true"], "Machines are numbered from 0"),
        (&["--num-nodes=2", "true"], "--main-address"),
        (
            &["--num-nodes=2", "--main-address=10.255.255.1", "true"],
            "openssl rand",
        ),
        (&["--log-dir=/dev/null/logs", "true"], "/dev/null/logs"),
        (&["--unknown", "true"], "unexpected argument"),
        (&[], "PROGRAM"),
    ] {
        let child = cli(args).current_dir(folder.path()).spawn().unwrap();
        let (output, text) = finish(child);
        assert!(!output.status.success(), "{args:?}");
        assert!(text.contains(words), "{args:?}: {text}");
    }
}

#[test]
fn help_has_examples_and_shells_can_complete() {
    let (_, text) = run(&["--help"]);
    assert!(text.contains("--max-restarts") && text.contains("fabric run --devices 4"));
    for (shell, words) in [("bash", "complete -F"), ("zsh", "#compdef fabric")] {
        let child = program(CLI, &["completions", shell]).spawn().unwrap();
        let (output, text) = finish(child);
        assert!(
            output.status.success() && text.contains(words),
            "{shell}: {text}"
        );
        assert!(text.contains("max-restarts"));
    }
}

/// A number of a job whose port, 15000 and the number, is free.
fn free_job() -> u16 {
    let start = std::process::id() as u16 % 10_000;
    let is_free = |job: &u16| TcpListener::bind(("127.0.0.1", 15_000 + job)).is_ok();
    (start..start + 5000).find(is_free).unwrap()
}

// ENV-02, ENV-04, ENV-06, line 5
#[test]
fn ranks_that_other_launchers_start_find_each_other() {
    let expected = {
        let (_, text) = finish(program(TRAIN, &["2", "20"]).spawn().unwrap());
        loss(&text).to_string()
    };
    let launchers = [
        (
            "SLURM",
            "SLURM_JOB_ID=JOB SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1
             SLURM_STEP_NODELIST=node7 SLURM_PROCID=OWN SLURM_LOCALID=OWN",
        ),
        (
            "LSF",
            "LSB_JOBID=JOB JSM_NAMESPACE_RANK=OWN JSM_NAMESPACE_SIZE=2
             JSM_NAMESPACE_LOCAL_RANK=OWN JSM_NAMESPACE_LOCAL_SIZE=2",
        ),
        (
            "Open MPI",
            "PMIX_NAMESPACE=JOB OMPI_COMM_WORLD_RANK=OWN OMPI_COMM_WORLD_SIZE=2
             OMPI_COMM_WORLD_LOCAL_RANK=OWN OMPI_COMM_WORLD_LOCAL_SIZE=2",
        ),
        (
            "Hydra",
            "PMI_RANK=OWN PMI_SIZE=2 MPI_LOCALRANKID=OWN MPI_LOCALNRANKS=2 FABRIC_PORT=PORT",
        ),
        (
            "PyTorchJob",
            "RANK=OWN WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=PORT",
        ),
    ];
    for (launcher, variables) in launchers {
        let job = free_job();
        let [port, job] = [15_000 + job, job].map(|number| number.to_string());
        let variables = variables.replace("=JOB", &format!("={job}"));
        let variables = variables.replace("=PORT", &format!("={port}"));
        let ranks = ["0", "1"].map(|rank| {
            let own = variables.replace("=OWN", &format!("={rank}"));
            let own = own
                .split_whitespace()
                .filter_map(|word| word.split_once('='));
            let mut command = program(TRAIN, &["auto", "20"]); // as many as the launcher says
            command.envs(own).spawn().unwrap()
        });
        let ranks = ranks.map(finish);
        for (output, text) in &ranks {
            assert!(output.status.success(), "{launcher}: {text}");
        }
        assert_eq!(loss(&ranks[0].1), expected, "{launcher}");
    }
}
