//! An all-reduce in ten lines: `cargo run -p fabric-facade --example 01_all_reduce`.

use fabric::{Fabric, ReduceOp, Result};

fn main() -> Result<()> {
    let fabric = Fabric::builder().devices(4).build()?;
    fabric.launch(|fabric| {
        let mut mine = vec![fabric.global_rank() as f32; 3];
        fabric.all_reduce(&mut mine, ReduceOp::Avg)?;
        println!(
            "rank {} of {}: {mine:?}",
            fabric.global_rank(),
            fabric.world_size()
        );
        Ok(())
    })?;
    Ok(())
}
