//! The stage: a process in which the stand-ins are libcuda and libnccl.
//!
//! The dynamic loader reads its path once, before a program starts. So a test runs itself again: [`with_fakes`] makes a
//! folder with links to the libraries that cargo has built beside the test's executable, starts that executable with
//! the folder on the loader's path for this one test, and reports what came of it. Each test has a process of its own:
//! settings, counts and broken contexts are nobody else's.

use std::{
    any::type_name_of_val,
    io::Read,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const MARK: &str = "FABRIC_STAGE";
const PATIENCE: Duration = Duration::from_secs(240); // a test that hangs is stopped, and says so

/// The file that cargo has built, and the names under which programs look for it.
const LINKS: [(&str, &[&str]); 2] = [
    ("libcuda.so", &["libcuda.so", "libcuda.so.1"]),
    ("libnccl.so", &["libnccl.so", "libnccl.so.2"]),
];

/// Run `body`, a test's whole body, in a process in which the stand-ins are the libraries, with these environment
/// variables.
///
/// # Panics
/// When the test fails in there, or is not over in time; its output is shown.
pub fn with_fakes<F: FnOnce()>(settings: &[(&str, &str)], body: F) {
    if std::env::var_os(MARK).is_some() {
        return body();
    }
    let name = test_name(type_name_of_val(&body));
    let folder = tempfile::tempdir().expect("a temporary folder");
    link(folder.path());
    let mut command = again(&name);
    command
        .envs(settings.iter().copied())
        .env(MARK, folder.path());
    command.env("LD_LIBRARY_PATH", path(folder.path()));
    let (is_right, output) = finish(command.spawn().expect("the test runs again"), PATIENCE);
    assert!(
        is_right && output.contains("1 passed"),
        "on the stage, {name}:\n{output}"
    );
}

/// The test of this name once more, as another process on the same stage, with these variables besides: a rank of its
/// own.
///
/// # Panics
/// When there is no stage, or the process cannot be started.
pub fn another(test: &str, settings: &[(&str, &str)]) -> Child {
    assert!(std::env::var_os(MARK).is_some(), "only on the stage");
    let mut command = again(test);
    command.envs(settings.iter().copied());
    command.spawn().expect("the test runs again")
}

/// Wait for a process: whether it ended well, and what it said. It is stopped after `patience`.
///
/// # Panics
/// When the system says nothing about the process.
pub fn finish(mut child: Child, patience: Duration) -> (bool, String) {
    let readers = [
        child
            .stdout
            .take()
            .map(|out| Box::new(out) as Box<dyn Read + Send>),
        child
            .stderr
            .take()
            .map(|err| Box::new(err) as Box<dyn Read + Send>),
    ];
    let readers = readers.into_iter().flatten().map(|mut reader| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = reader.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        })
    });
    let readers: Vec<_> = readers.collect();
    let deadline = Instant::now() + patience;
    let mut note = String::new();
    let status = loop {
        if let Some(status) = child.try_wait().expect("its state") {
            break status;
        }
        if Instant::now() > deadline {
            note = format!("\n(stopped after {} s)", patience.as_secs());
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let output: String = readers
        .into_iter()
        .map(|reader| reader.join().unwrap_or_default())
        .collect();
    (
        status.success() && note.is_empty(),
        format!("{output}{note}\n{status}"),
    )
}

/// This executable, for one of its tests.
fn again(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this executable"));
    command.args([
        name,
        "--exact",
        "--nocapture",
        "--test-threads=1",
        "--include-ignored",
    ]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// "suite::module::test::{{closure}}" without its ends.
fn test_name(closure: &str) -> String {
    let inside = closure.split_once("::").expect("a path with a crate").1;
    inside.trim_end_matches("::{{closure}}").to_string()
}

fn path(folder: &Path) -> std::ffi::OsString {
    let before = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let all = std::iter::once(folder.to_path_buf()).chain(std::env::split_paths(&before));
    std::env::join_paths(all.filter(|one| !one.as_os_str().is_empty()))
        .expect("a folder without a colon")
}

fn link(folder: &Path) {
    for (built, names) in LINKS {
        let library = find(built);
        for name in names {
            symlink(&library, folder.join(name)).expect("a link");
        }
    }
}

/// A library that was built with this executable, which is in `deps` or in a folder beside it.
fn find(name: &str) -> PathBuf {
    let executable = std::env::current_exe().expect("this executable");
    let near = executable.ancestors().skip(1).take(3);
    let places = near.flat_map(|folder| [folder.join("deps").join(name), folder.join(name)]);
    let found = places.into_iter().find(|place| place.exists());
    found.unwrap_or_else(|| panic!("{name} was not built beside {}", executable.display()))
}
