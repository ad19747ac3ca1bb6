//! Writes event files for `tests/external/tensorboard.sh`: two runs of a job, one that ends well and one that fails, and
//! `expected.json`, which says what a reader has to find.

use std::{collections::BTreeMap, path::PathBuf};

use fabric::{
    Error, Fabric, Result,
    logger::{RunFolder, TensorBoardLogger},
};
use serde_json::json;

const STEPS: u64 = 250;

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(root), None) = (arguments.next().map(PathBuf::from), arguments.next()) else {
        fabric::bail!("usage: events FOLDER");
    };
    let mut expected = BTreeMap::new();
    for (lr, fails) in [(0.1, false), (0.01, true)] {
        let run = RunFolder::new(&root, "digits");
        let logger = TensorBoardLogger::within(&run);
        let fabric = Fabric::builder().devices(1).logger(logger).build()?;
        let outcome = fabric.launch(|fabric| {
            let settings = json!({"lr": lr, "model": {"width": 64, "name": "mlp", "deep": fails}});
            fabric.log_hyperparams(&settings)?;
            for step in 0..STEPS {
                fabric.log_dict(&scalars(lr, step), step)?;
            }
            fabric.log("hp_metric", 1.0 - lr, STEPS)?;
            fabric.logger(|logger| logger.log_text("said", "**good** day", 0))?;
            match fails {
                true => Err(Error::new("on purpose")),
                false => Ok(()),
            }
        });
        assert_eq!(outcome.is_err(), fails);
        let mut tags: BTreeMap<&str, Vec<(u64, String)>> = BTreeMap::new();
        for step in 0..STEPS {
            for (name, value) in scalars(lr, step) {
                let bits = format!("{:08x}", (value as f32).to_bits());
                tags.entry(name).or_default().push((step, bits));
            }
        }
        let name = format!("digits/version_{}", run.version_text()?);
        expected.insert(name, json!({"scalars": tags, "lr": lr, "failed": fails}));
    }
    std::fs::write(
        root.join("expected.json"),
        serde_json::to_vec_pretty(&expected)?,
    )?;
    Ok(())
}

/// Ordinary numbers, tiny and huge ones, and those that are none.
fn scalars(lr: f64, step: u64) -> [(&'static str, f64); 3] {
    let time = step as f64;
    let odd = match step % 50 {
        7 => f64::NAN,
        8 => f64::INFINITY,
        9 => f64::NEG_INFINITY,
        _ => 1e-30 * time.powi(9),
    };
    let loss = 2.3 * (-time * lr / 10.0).exp() + 0.05 * (time / 7.0).sin();
    [
        ("train/loss", loss),
        ("train/accuracy", 1.0 - loss / 3.0),
        ("odd", odd),
    ]
}
