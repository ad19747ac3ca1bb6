//! Groups of parameters: who belongs to which, and what a schedule does to their learning rates.

use fabric::{
    optim::{AdamW, Optimizer, Sgd},
    vec::VecModel,
};

use super::{fabric, grad};
use crate::puppet::{Puppet, Script};

/// Two matrices and two vectors, trained with a group by shape and a group by name; the bytes of all parameters.
fn grouped(strategy: &str, world: usize) -> Vec<Vec<u8>> {
    let ranks = fabric(strategy, world).launch_threads(|fabric| {
        let model = Puppet::new()
            .param("body.weight", &[1f32; 40])
            .shape(&[5, 8])
            .param("body.bias", &[1f32; 8])
            .param("head.weight", &[1f32; 16])
            .shape(&[2, 8])
            .param("head.bias[0..2]", &[1f32; 2]); // a name that looks like a piece's
        let optimizer = AdamW::new(0.5)
            .group(
                "head",
                |param| param.name.starts_with("head."),
                |own| own.lr(5.0),
            )
            .group(
                "flat",
                |param| param.shape.len() == 1,
                |own| own.weight_decay(0.0),
            )
            .weight_decay(0.1);
        let (model, mut optimizer) = fabric.setup(model, optimizer)?;
        for step in 0..6 {
            optimizer.set_learning_rate(0.5 / (step + 1) as f64);
            fabric.backward(Script(|| {
                let sizes = [40, 8, 16, 2];
                let grads = |param: usize| vec![grad(step, param, 3); sizes[param]];
                (0..4)
                    .rev()
                    .try_for_each(|param| model.ready(param, grads(param)))
            }))?;
            optimizer.step()?;
            optimizer.zero_grad();
        }
        Ok(model.bytes())
    });
    let mut ranks = ranks.unwrap();
    assert!(ranks.iter().all(|rank| *rank == ranks[0]));
    ranks.remove(0)
}

#[test]
fn groups_see_whole_parameters_also_where_ranks_update_pieces() {
    let alone = grouped("single", 1);
    for world in 1..=3 {
        assert_eq!(grouped("zero1", world), alone, "{world} ranks");
    }
    // By hand: each parameter alone, with the options that its group should have given it.
    let options = [(0.5, 0.1), (0.5, 0.0), (5.0, 0.1), (5.0, 0.1)];
    for (param, (lr, decay)) in options.into_iter().enumerate() {
        let expected = fabric("single", 1).launch_threads(|fabric| {
            let model = VecModel::new([("w", vec![1f32])]);
            let (model, mut optimizer) = fabric.setup(model, AdamW::new(lr).weight_decay(decay))?;
            for step in 0..6 {
                optimizer.set_learning_rate(lr / 0.5 * (0.5 / (step + 1) as f64));
                fabric.backward(model.gradients(vec![Some(vec![grad(step, param, 3)])]))?;
                optimizer.step()?;
                optimizer.zero_grad();
            }
            Ok(model.read("w")[0].to_le_bytes())
        });
        assert_eq!(alone[param][..4], expected.unwrap()[0], "parameter {param}");
    }
}

#[test]
fn line_23_the_learning_rate_of_a_group_keeps_its_proportion() {
    let mut optimizer = Sgd::new(0.1)
        .group("fast", |_| true, |own| own.lr(0.4))
        .group("same", |_| true, |own| own.momentum(0.5))
        .group("still", |_| true, |own| own.lr(0.0));
    let rates = |optimizer: &Sgd| {
        let group = |name| optimizer.group_learning_rate(name).unwrap();
        [
            optimizer.learning_rate(),
            group("fast"),
            group("same"),
            group("still"),
        ]
    };
    assert_eq!(rates(&optimizer), [0.1, 0.4, 0.1, 0.0]);
    optimizer.set_learning_rate(0.0); // a warm-up from nothing forgets no proportion
    assert_eq!(rates(&optimizer), [0.0; 4]);
    optimizer.set_learning_rate(0.3);
    assert_eq!(rates(&optimizer)[0], 0.3);
    assert!((rates(&optimizer)[1] - 1.2).abs() < 1e-12);
    assert_eq!(rates(&optimizer)[2..], [0.3, 0.0]);
    optimizer.set_group_learning_rate("fast", 0.6).unwrap();
    optimizer.set_learning_rate(0.5);
    assert_eq!(rates(&optimizer), [0.5, 1.0, 0.5, 0.0]);
    assert_eq!(optimizer.group_learning_rate("slow"), None);
    let text = optimizer
        .set_group_learning_rate("slow", 1.0)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("no group 'slow'") && text.contains("'fast', 'same', 'still'"),
        "{text}"
    );
}

#[test]
fn options_reach_groups_whatever_the_order_of_the_calls() {
    let late = Sgd::new(0.1)
        .group("all", |_| true, |own| own.weight_decay(0.0))
        .momentum(0.5);
    let early = Sgd::new(0.1)
        .momentum(0.5)
        .group("all", |_| true, |own| own.weight_decay(0.0));
    assert_eq!(format!("{late:?}"), format!("{early:?}"));
}
