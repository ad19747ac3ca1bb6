//! The program that `fabric run` starts: found before the first rank, and put in the place of a process that dies with its
//! supervisor.

use std::{
    ffi::{OsStr, OsString},
    os::unix::{ffi::OsStrExt, fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

use fabric::{Error, Result, environment::supervisor, launch};

/// Become a rank's program
#[derive(clap::Args)]
pub(crate) struct ExecArgs {
    /// The file, what it is to be called, and its arguments
    #[arg(num_args = 2.., trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<OsString>,
}

/// The words after which this program becomes `path`, called `name`, with `args`.
pub(crate) fn words(path: PathBuf, name: OsString, args: Vec<OsString>) -> Vec<OsString> {
    let front = [OsString::from("exec-rank"), path.into(), name];
    front.into_iter().chain(args).collect()
}

/// Ask the kernel to kill this process when its supervisor dies, and become the program. The promise survives that, so
/// that it holds for any program, one that has never heard of this library too.
pub(crate) fn exec(args: &ExecArgs) -> Result<()> {
    if let Some(pid) = supervisor(&|name| std::env::var(name).ok())? {
        launch::die_with_supervisor(pid)?;
    }
    let [path, name, rest @ ..] = args.words.as_slice() else {
        return Err(Error::new("exec-rank is for fabric run alone"));
    };
    let why = Command::new(path).arg0(name).args(rest).exec();
    Err(Error::argument(
        format!("'{}' cannot be run: {why}", path.display()),
        "See that it is a program for this machine, or a script whose first line names its interpreter",
    ))
}

/// The file that `name` stands for: a path, or a name on PATH.
pub(crate) fn find(name: &OsStr) -> Result<PathBuf> {
    if name.as_bytes().contains(&b'/') {
        let path = PathBuf::from(name);
        return check(&path).map(|()| path);
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let files = std::env::split_paths(&folders).map(|folder| folder.join(name));
    let mut found = files.filter(|path| check(path).is_ok());
    found.next().ok_or_else(|| {
        let shown = name.display();
        let hint = match Path::new(name).is_file() {
            true => format!("There is one in this folder: fabric run ./{shown}"),
            false => format!("Give a path, like target/debug/{shown}"),
        };
        Error::argument(format!("no program '{shown}' is on PATH"), hint)
    })
}

/// Whether the file at `path` can be run.
fn check(path: &Path) -> Result<()> {
    let shown = path.display();
    let Ok(metadata) = path.metadata() else {
        return Err(Error::argument(
            format!("there is no program '{shown}'"),
            how_to_build(path),
        ));
    };
    if metadata.is_dir() {
        return Err(Error::argument(
            format!("'{shown}' is a folder"),
            "Name a program",
        ));
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        let hint = match path.extension().is_some_and(|ending| ending == "py") {
            true => format!("Name its interpreter too: fabric run python {shown}"),
            false => format!("chmod +x {shown}"),
        };
        return Err(Error::argument(
            format!("'{shown}' is not executable"),
            hint,
        ));
    }
    Ok(())
}

/// What cargo would have to build, where the path looks like cargo's.
fn how_to_build(path: &Path) -> String {
    let words: Vec<_> = path.iter().map(OsStr::to_string_lossy).collect();
    let profile = |word: &str| match word {
        "debug" => "".to_string(),
        "release" => " --release".into(),
        other => format!(" --profile {other}"),
    };
    match words.as_slice() {
        [.., parent, folder, name] if folder == "examples" => {
            format!("cargo build{} --example {name} first?", profile(parent))
        }
        [.., target, folder, name] if target == "target" => {
            format!("cargo build{} --bin {name} first?", profile(folder))
        }
        _ => "Check the path".into(),
    }
}
