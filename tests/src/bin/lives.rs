//! Many Fabrics, one after the other: counts what this process holds (threads, open files, memory maps, shared memory) after some
//! launches, and after many more. `lives threads shm` launches threads, `lives processes tcp` launches processes.

use std::{fs, path::Path};

use fabric::{Fabric, Result, State, logger::CsvLogger, optim::AdamW, vec::VecModel};

const FEW: usize = 4; // until everything that is made once is made
const MANY: usize = 50;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(how), Some(wire)) = (args.next(), args.next()) else {
        fabric::bail!("say how to launch, and over which wire");
    };
    let room = tempfile::tempdir()?;
    let live = |times: usize| {
        for _ in 0..times {
            let fabric = Fabric::builder().devices(2).strategy("zero1").wire(&wire);
            let fabric = fabric.logger(CsvLogger::new(room.path(), "run")).build()?;
            match how.as_str() {
                "threads" => drop(fabric.launch_threads(|fabric| life(fabric, room.path()))?),
                _ => drop(fabric.launch(|fabric| life(fabric, room.path()))?),
            }
            fabric.teardown()?; // there is nothing left to leave
            if fabric.barrier().is_ok() {
                fabric::bail!("a job that is over has a barrier");
            }
        }
        Ok(())
    };
    live(FEW)?;
    let few = counts();
    live(MANY)?;
    let many = counts();
    let rank = std::env::var("FABRIC_RANK");
    if how == "threads" || rank.is_ok() {
        println!("few {few:?}\nmany {many:?}");
    }
    Ok(())
}

/// A little of everything; `room` is rank 0's.
fn life(fabric: &Fabric, room: &Path) -> Result<()> {
    let model = VecModel::new([("w", vec![1f32; 5000])]);
    let (model, mut optimizer) = fabric.setup(model, AdamW::new(0.1))?;
    let gradient = vec![fabric.global_rank() as f32; 5000];
    fabric.backward(model.gradients(vec![Some(gradient)]))?;
    optimizer.step()?;
    let group = fabric.split(0, 0)?;
    group.barrier()?;
    fabric.log("loss", 1.0, 0)?;
    fabric.save(room.join("last"), State::new().model("model", &model))
}

/// Threads, open files, memory maps, and those of them that are shared memory.
type Counts = [usize; 4];

fn counts() -> Counts {
    let entries = |folder: &str| fs::read_dir(folder).map_or(0, Iterator::count);
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let shared = maps.lines().filter(|line| line.contains("memfd:"));
    [
        entries("/proc/self/task"),
        entries("/proc/self/fd"),
        maps.lines().count(),
        shared.count(),
    ]
}
