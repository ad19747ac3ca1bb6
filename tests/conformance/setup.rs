//! What is set up: launchers of one's own, optimizers by themselves, what is printed once.

use std::process::{Command, Stdio};

use fabric::{
    Fabric, Result, State,
    environment::{Applies, ClusterEnvironment, Lookup, Place},
    optim::Adam,
    vec::VecModel,
};

use crate::process::finish;

/// A launcher that has started one rank, this one.
struct Alone;
impl ClusterEnvironment for Alone {
    fn name(&self) -> &'static str {
        "alone"
    }
    fn applies(&self, _: Lookup<'_>) -> Applies {
        Applies::Yes("a test".into())
    }
    fn place(&self, _: Lookup<'_>) -> Result<Place> {
        let local = ([127, 0, 0, 1], 0).into();
        Ok(Place::new(self.name(), 0, 1, local))
    }
}

// API-06, CON-03: a launcher of the program's own is asked first, and held to what the program asks for.
#[test]
fn con_03_a_launcher_of_ones_own_comes_first() {
    let fabric = Fabric::builder().environment(Alone).build().unwrap();
    assert_eq!(fabric.ranks(), 1);
    let said = fabric.explain();
    assert!(said.contains("ranks: 1, started by a test"), "{said}");
    let refused = Fabric::builder().environment(Alone).devices(2).build();
    let text = refused.err().unwrap().to_string();
    assert!(
        text.contains("2 devices") && text.contains("alone started 1"),
        "{text}"
    );
}

// API-24, GAP-15: module and optimizer set up one after the other, and an optimizer saved and loaded without its model.
#[test]
fn api_24_an_optimizer_by_itself_is_set_up_saved_and_loaded() {
    for strategy in ["ddp", "zero1", "zero2", "fsdp"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("optimizer");
        let fabric = Fabric::builder()
            .devices(2)
            .strategy(strategy)
            .build()
            .unwrap();
        let run = fabric.launch_threads(|fabric| {
            let steps = |count: usize, load: bool| {
                let model = VecModel::new([("w", vec![1f32; 5])]).in_units(["w"])?;
                let model = fabric.setup_module(model)?;
                let mut optimizer = fabric.setup_optimizers(Adam::new(0.1), &model);
                if load {
                    fabric.load(&path, State::new().optimizer("o", &mut optimizer))?;
                }
                for step in 0..count {
                    let gradient = vec![0.5 + step as f32; 5];
                    fabric.backward(model.gradients(vec![Some(gradient)]))?;
                    optimizer.step()?;
                    optimizer.zero_grad();
                }
                if !load {
                    fabric.save(&path, State::new().optimizer("o", &mut optimizer))?;
                }
                let view = model.view();
                let mine = view
                    .find("w")
                    .map(|id| view.read(id))
                    .collect::<Result<Vec<_>>>()?;
                Ok::<_, fabric::Error>(mine.concat())
            };
            steps(3, false)?;
            let warm = steps(1, true)?;
            fabric.barrier()?;
            // Without the saved moments Adam's first step is the learning rate; with those of larger gradients it is less.
            assert!(
                warm.iter().all(|value| *value > 0.91 && *value < 1.0),
                "{strategy}: {warm:?}"
            );
            Ok(())
        });
        run.unwrap();
    }
}

// API-43: once for each machine, whatever the number of ranks.
#[test]
fn api_43_a_line_is_printed_once_for_each_machine() {
    let trainer = env!("CARGO_BIN_EXE_trainer");
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(trainer);
    command
        .args(["--devices", "3", "--epochs", "1", "--out"])
        .arg(folder.path());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let (output, text) = finish(command.spawn().unwrap());
    assert!(output.status.success(), "{text}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(printed.matches("strategy = ddp").count(), 1, "{printed}");
    assert_eq!(printed.matches("val_accuracy").count(), 1, "{printed}");
}
