//! What is kept in a folder, what is removed, and what is gone on from.

use super::*;
use crate::callback::{Hook, LoopState};

/// Run a loop of one batch an epoch with these values of "x"; every second checkpoint is a folder. What is left, sorted.
fn left(checkpoint: ModelCheckpoint, values: &[f64]) -> Vec<String> {
    let folder = checkpoint.folder.clone();
    let fabric = Fabric::builder()
        .devices(1)
        .callback(checkpoint)
        .build()
        .unwrap();
    let outcome = fabric.launch(|fabric| {
        let mut state = LoopState::default();
        for value in values {
            state.metrics.set("x", *value);
            state.progress.steps += 1;
            let as_folder = state.progress.epoch % 2 == 1;
            let mut save = |path: &Path| {
                fs::create_dir_all(path.parent().unwrap())?;
                match as_folder {
                    true => Ok(fs::create_dir_all(path)?),
                    false => Ok(fs::write(path, "x")?),
                }
            };
            fabric.notify(Hook::TrainEpochEnd, &mut state.moment().saving(&mut save))?;
            state.progress.epoch += 1;
        }
        Ok(())
    });
    outcome.unwrap();
    names(&folder)
}

fn names(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let names = names.map(|name| name.into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.ends_with(ENDING)).collect();
    names.sort();
    names
}

#[test]
fn the_best_and_the_last_are_kept() {
    let values = [3.0, 1.0, f64::NAN, 2.0, 5.0];
    for (top, last, mode, expected) in [
        (Some(2), true, Some(Mode::Min), &["2", "4", "5"][..]),
        (Some(2), false, Some(Mode::Min), &["2", "4"]),
        (Some(1), false, Some(Mode::Max), &["5"]),
        (Some(2), true, None, &["4", "5"]),
        (Some(0), true, Some(Mode::Min), &["5"]),
        (Some(0), false, Some(Mode::Min), &[]),
        (None, true, None, &["1", "2", "3", "4", "5"]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut checkpoint = ModelCheckpoint::new(folder.path())
            .filename("{step}")
            .save_last(last);
        checkpoint.top = top;
        if let Some(mode) = mode {
            checkpoint = checkpoint.monitor("x", mode);
        }
        let expected: Vec<_> = expected
            .iter()
            .map(|name| format!("{name}{ENDING}"))
            .collect();
        assert_eq!(
            left(checkpoint, &values),
            expected,
            "{top:?} {last} {mode:?}"
        );
        let linked = fs::read_link(folder.path().join(LAST));
        assert_eq!(linked.is_ok(), last);
        assert!(linked.is_err() || linked.unwrap() == Path::new("5.ckpt"));
    }
}

#[test]
fn the_latest_is_where_last_leads_or_the_highest_step() {
    let room = tempfile::tempdir().unwrap();
    let folder = room.path().join("out");
    assert_eq!(ModelCheckpoint::latest(&folder).unwrap(), None);
    let checkpoint = || ModelCheckpoint::new(&folder).keep_all();
    left(checkpoint().save_last(false), &[1.0; 10]);
    let newest = folder.join("epoch=9-step=10.ckpt");
    assert_eq!(ModelCheckpoint::latest(&folder).unwrap(), Some(newest));
    std::os::unix::fs::symlink("epoch=2-step=3.ckpt", folder.join(LAST)).unwrap();
    let linked = folder.join("epoch=2-step=3.ckpt");
    assert_eq!(
        ModelCheckpoint::latest(&folder).unwrap(),
        Some(linked.clone())
    );
    fs::remove_file(linked).unwrap(); // a link that leads nowhere
    assert!(
        ModelCheckpoint::latest(&folder)
            .unwrap()
            .unwrap()
            .ends_with("epoch=9-step=10.ckpt")
    );
}

#[test]
fn a_run_that_goes_on_goes_on_removing_and_a_new_one_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let new = || {
        ModelCheckpoint::new(folder.path())
            .save_top_k(2)
            .monitor("x", Mode::Min)
    };
    left(new(), &[1.0, 2.0, 3.0]);
    assert_eq!(
        left(new().filename("again-{x}"), &[9.0]).len(),
        4,
        "others are left alone"
    );
    fs::remove_dir_all(folder.path()).unwrap();
    left(new(), &[1.0, 2.0, 3.0]);
    let mut second = new().filename("again-{x}");
    second
        .load_state(&to_state(&State::default()).unwrap())
        .unwrap();
    assert!(second.best_path().unwrap().ends_with("epoch=0-step=1.ckpt"));
    assert!(second.last_path().unwrap().ends_with("epoch=2-step=3.ckpt"));
    let names = left(second, &[0.5]);
    assert_eq!(names, ["again-0.5000.ckpt", "epoch=0-step=1.ckpt"]);
}

#[test]
fn what_is_missing_is_said() {
    let folder = tempfile::tempdir().unwrap();
    for (checkpoint, word) in [
        (ModelCheckpoint::new(folder.path()), "no way to save"),
        (
            ModelCheckpoint::new(folder.path()).monitor("y", Mode::Min),
            "metric 'y'",
        ),
        (
            ModelCheckpoint::new(folder.path()).filename("{y}"),
            "'{y}.ckpt'",
        ),
    ] {
        let fabric = Fabric::builder()
            .devices(1)
            .callback(checkpoint)
            .build()
            .unwrap();
        let outcome = fabric.launch(|fabric| {
            fabric.notify(Hook::TrainEpochEnd, &mut LoopState::default().moment())
        });
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

// A name that a worse checkpoint has too must not cost the better one.
#[test]
fn a_worse_checkpoint_does_not_replace_the_best_of_the_same_name() {
    let folder = tempfile::tempdir().unwrap();
    let new = || {
        ModelCheckpoint::new(folder.path())
            .monitor("x", Mode::Min)
            .filename("best")
    };
    let fabric = Fabric::builder()
        .devices(1)
        .callback(new())
        .build()
        .unwrap();
    let outcome = fabric.launch(|fabric| {
        let mut state = LoopState::default();
        for (steps, value) in [(1, 1.0), (2, 2.0), (3, 3.0)] {
            state.metrics.set("x", value);
            state.progress.steps = steps;
            let mut save = |path: &Path| Ok(fs::write(path, value.to_string())?);
            fabric.notify(Hook::TrainEpochEnd, &mut state.moment().saving(&mut save))?;
        }
        fabric.with_callback(|keep: &mut ModelCheckpoint| {
            let paths = [keep.best_path(), keep.last_path()];
            Ok(paths.map(|path| fs::read_to_string(path.unwrap()).unwrap()))
        })
    });
    let [best, last] = outcome.unwrap().flatten().unwrap();
    assert_eq!((&*best, &*last), ("1", "3"));
    assert_eq!(names(folder.path()).len(), 2);
}

// "A new run leaves other runs' files alone", also where it gives the same names.
#[test]
fn a_new_run_does_not_overwrite_another_runs_files() {
    let folder = tempfile::tempdir().unwrap();
    let new = || ModelCheckpoint::new(folder.path()).keep_all();
    left(new(), &[1.0]);
    fs::write(folder.path().join("epoch=0-step=1.ckpt"), "theirs").unwrap();
    let names = left(new(), &[1.0]);
    assert_eq!(names, ["epoch=0-step=1-v1.ckpt", "epoch=0-step=1.ckpt"]);
    let theirs = fs::read_to_string(folder.path().join("epoch=0-step=1.ckpt"));
    assert_eq!(theirs.unwrap(), "theirs");
}

// Two in one folder: after a restart each goes on with its own files, and removes none of the other's.
#[test]
fn two_in_one_folder_do_not_remove_one_anothers_files_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let best = || {
        ModelCheckpoint::new(folder.path())
            .monitor("x", Mode::Min)
            .save_last(false)
            .filename("best-{step}")
    };
    let all = || ModelCheckpoint::new(folder.path()).keep_all();
    let run = |states: Option<_>, values: &[f64], from: u64| {
        let builder = Fabric::builder().devices(1).callback(best());
        let fabric = builder.callback(all()).build().unwrap();
        let states = fabric.launch(|fabric| {
            if let Some(states) = &states {
                fabric.load_callback_states(states)?;
            }
            let mut state = LoopState::default();
            for (steps, value) in (from..).zip(values) {
                state.metrics.set("x", *value);
                state.progress.steps = steps;
                let mut save = |path: &Path| Ok(fs::write(path, "x")?);
                fabric.notify(Hook::TrainEpochEnd, &mut state.moment().saving(&mut save))?;
            }
            fabric.callback_states()
        });
        states.unwrap().unwrap()
    };
    let states = run(None, &[3.0, 2.0], 1);
    run(Some(states), &[1.0], 3);
    let expected = [
        "best-3.ckpt",
        "epoch=0-step=1.ckpt",
        "epoch=0-step=2.ckpt",
        "epoch=0-step=3.ckpt",
    ];
    assert_eq!(names(folder.path()), expected);
}
