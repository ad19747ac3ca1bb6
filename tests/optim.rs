//! Optimizers: every rule does what its formula says, to the same bits alone and in shards, and so does one that a user
//! wrote. Method: small models trained through Fabric, compared by bits with each other and by formula with plain code.

mod copies;
mod groups;
mod matrices;
mod refusals;

use std::ops::Range;

use fabric::{
    Fabric, FabricModule, FabricOptimizer, Result, State,
    engine::shard::plan::Options,
    optim::{Adam, AdamW, ByElement, Elements, Elementwise, Lion, Optimizer, Sgd},
    vec::VecModel,
};
use fabric_engine::{
    Result as EngineResult,
    kernels::{self, Element, Rule},
};
use half::bf16;

const SIZES: [usize; 4] = [7, 64, 1, 33];

fn fabric(strategy: &str, world: usize) -> Fabric {
    let buckets = Options {
        bucket_bytes: 150,
        first_bucket_bytes: 100,
        ..Options::default()
    };
    let builder = Fabric::builder().devices(world).strategy(strategy);
    builder.buckets(buckets).build().unwrap()
}

fn params<T: Element>(of: impl Fn(f32) -> T) -> Vec<(String, Vec<T>)> {
    let values = |size: usize| {
        (0..size)
            .map(|index| of(index as f32 / 8.0 - 0.5))
            .collect()
    };
    let sizes = SIZES.iter().enumerate();
    sizes
        .map(|(param, size)| (format!("p{param}"), values(*size)))
        .collect()
}

/// One gradient, the same on all ranks, of so few bits that the mean over three ranks is exactly itself.
fn grad(step: usize, param: usize, element: usize) -> f32 {
    (((element * 7 + param * 13 + step * 31) % 101) as f32 - 50.0) / 8.0
}

/// The gradients of a step; parameter 2 has none in every third.
fn gradients(step: usize) -> Vec<Option<Vec<f32>>> {
    let sizes = SIZES.iter().enumerate();
    let whole = |param, size| {
        (0..size)
            .map(|element| grad(step, param, element))
            .collect()
    };
    sizes
        .map(|(param, size)| (param != 2 || !step.is_multiple_of(3)).then(|| whole(param, *size)))
        .collect()
}

fn steps<O: Optimizer>(
    fabric: &Fabric,
    model: &FabricModule<VecModel>,
    optimizer: &mut FabricOptimizer<O>,
    range: Range<usize>,
) -> Result<()> {
    for step in range {
        fabric.backward(model.gradients(gradients(step)))?;
        optimizer.step()?;
        optimizer.zero_grad();
    }
    Ok(())
}

fn bits(model: &VecModel) -> Vec<u32> {
    let params = (0..SIZES.len()).flat_map(|param| model.read(&format!("p{param}")));
    params.map(f32::to_bits).collect()
}

/// The parameters' bits after eight steps, the same on all ranks.
fn train<O: Optimizer>(strategy: &str, world: usize, optimizer: impl Fn() -> O + Sync) -> Vec<u32> {
    let ranks = fabric(strategy, world).launch_threads(|fabric| {
        let (model, mut optimizer) = fabric.setup(VecModel::new(params(|x| x)), optimizer())?;
        steps(fabric, &model, &mut optimizer, 0..8)?;
        Ok(bits(&model))
    });
    let mut ranks = ranks.unwrap();
    assert!(ranks.iter().all(|rank| *rank == ranks[0]));
    ranks.remove(0)
}

/// One of every rule, with every option.
fn rules() -> Vec<Rule> {
    let sgd = kernels::Sgd {
        lr: 0.05,
        momentum: 0.0,
        dampening: 0.0,
        weight_decay: 0.1,
        nesterov: false,
        maximize: false,
    };
    let momentum = kernels::Sgd {
        momentum: 0.9,
        ..sgd
    };
    let adam = kernels::Adam {
        lr: 0.05,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.1,
    };
    let lion = kernels::Lion {
        lr: 0.05,
        beta1: 0.9,
        beta2: 0.99,
        weight_decay: 0.1,
    };
    vec![
        Rule::Sgd(sgd),
        Rule::Sgd(kernels::Sgd {
            dampening: 0.5,
            maximize: true,
            ..momentum
        }),
        Rule::Sgd(kernels::Sgd {
            nesterov: true,
            ..momentum
        }),
        Rule::Adam(adam),
        Rule::AdamW(adam),
        Rule::Lion(lion),
    ]
}

#[test]
fn every_rule_ends_with_the_same_bits_alone_and_in_shards() {
    for rule in rules() {
        let alone = train("single", 1, || ByElement::of(rule));
        for world in 1..=3 {
            let sharded = train("zero1", world, || ByElement::of(rule));
            assert_eq!(sharded, alone, "{rule:?}, {world} ranks");
        }
        assert_eq!(train("ddp", 3, || ByElement::of(rule)), alone, "{rule:?}");
    }
}

#[test]
fn optimizers_that_read_like_torch_are_the_rules() {
    let rules = rules();
    let rule = |index: usize| train("single", 1, || ByElement::of(rules[index]));
    let sgd = || Sgd::new(0.05).weight_decay(0.1);
    assert_eq!(train("single", 1, sgd), rule(0));
    let momentum = || sgd().momentum(0.9).dampening(0.5).maximize(true);
    assert_eq!(train("single", 1, momentum), rule(1));
    let nesterov = || sgd().momentum(0.9).nesterov(true);
    assert_eq!(train("single", 1, nesterov), rule(2));
    let adam = || Adam::new(0.05).betas(0.9, 0.99).weight_decay(0.1);
    assert_eq!(train("single", 1, adam), rule(3));
    let adamw = || {
        AdamW::new(0.05)
            .betas(0.9, 0.99)
            .eps(1e-8)
            .weight_decay(0.1)
    };
    assert_eq!(train("single", 1, adamw), rule(4));
    let lion = || Lion::new(0.0).lr(0.05).betas(0.9, 0.99).weight_decay(0.1);
    assert_eq!(train("single", 1, lion), rule(5));
}

/// One step of one element, from the papers: parameter, two states.
fn formula(rule: Rule, step: i32, p: f64, g: f64, [m, v]: [f64; 2]) -> (f64, [f64; 2]) {
    match rule {
        Rule::Sgd(sgd) => {
            let g = if sgd.maximize { -g } else { g } + sgd.weight_decay * p;
            if sgd.momentum == 0.0 {
                return (p - sgd.lr * g, [m, v]);
            }
            let mixed = sgd.momentum * m + (1.0 - sgd.dampening) * g;
            let m = if step == 1 { g } else { mixed };
            let way = if sgd.nesterov {
                g + sgd.momentum * m
            } else {
                m
            };
            (p - sgd.lr * way, [m, v])
        }
        Rule::Adam(adam) | Rule::AdamW(adam) => {
            let decoupled = matches!(rule, Rule::AdamW(_));
            let decay = adam.weight_decay;
            let g = if decoupled { g } else { g + decay * p };
            let p = if decoupled {
                p * (1.0 - adam.lr * decay)
            } else {
                p
            };
            let m = adam.beta1 * m + (1.0 - adam.beta1) * g;
            let v = adam.beta2 * v + (1.0 - adam.beta2) * g * g;
            let mean = m / (1.0 - adam.beta1.powi(step));
            let square = v / (1.0 - adam.beta2.powi(step));
            (p - adam.lr * mean / (square.sqrt() + adam.eps), [m, v])
        }
        Rule::Lion(lion) => {
            let c = lion.beta1 * m + (1.0 - lion.beta1) * g;
            let sign = if c == 0.0 { 0.0 } else { c.signum() };
            let p = p * (1.0 - lion.lr * lion.weight_decay) - lion.lr * sign;
            (p, [lion.beta2 * m + (1.0 - lion.beta2) * g, v])
        }
    }
}

/// The formula's parameters after eight steps; a parameter without a gradient takes no step.
fn by_formula(rule: Rule) -> Vec<f64> {
    let mut all = Vec::new();
    for (param, (_, values)) in params(f64::from).into_iter().enumerate() {
        for (element, value) in values.into_iter().enumerate() {
            let (mut p, mut states, mut taken) = (value, [0.0; 2], 0);
            for step in 0..8 {
                if let Some(grads) = &gradients(step)[param] {
                    taken += 1;
                    (p, states) = formula(rule, taken, p, f64::from(grads[element]), states);
                }
            }
            all.push(p);
        }
    }
    all
}

#[test]
fn every_rule_does_what_its_formula_says() {
    for rule in rules() {
        let trained = train("single", 1, || ByElement::of(rule));
        for (ours, plain) in trained.into_iter().zip(by_formula(rule)) {
            let ours = f64::from(f32::from_bits(ours));
            assert!((ours - plain).abs() < 1e-4, "{ours} for {plain}, {rule:?}");
        }
    }
}

/// A user's own: the sign of a mean, in f64, and a count of the elements' steps.
#[derive(Clone)]
struct Signum {
    lr: f64,
    beta: f64,
}

impl Elementwise for Signum {
    fn name(&self) -> &str {
        "signum"
    }
    fn states(&self) -> &[&'static str] {
        &["mean", "count"]
    }
    fn learning_rate(&self) -> f64 {
        self.lr
    }
    fn set_learning_rate(&mut self, lr: f64) {
        self.lr = lr;
    }
    fn update(&self, elements: Elements<'_, '_>) -> EngineResult<()> {
        let step = elements.step as f64;
        elements.each(|param, grad, [mean, count]| {
            *count += 1.0;
            assert_eq!(*count, step, "states and steps are of the same age");
            *mean = self.beta * *mean + (1.0 - self.beta) * grad;
            *param -= self.lr * mean.signum();
        })
    }
}

fn signum() -> ByElement<Signum> {
    ByElement::of(Signum {
        lr: 0.07,
        beta: 0.9,
    })
}

#[test]
fn a_users_own_optimizer_runs_sharded_to_the_bits_of_replicated() {
    let alone = train("single", 1, signum);
    for world in 1..=3 {
        assert_eq!(train("zero1", world, signum), alone, "{world} ranks");
        assert_eq!(train("ddp", world, signum), alone, "{world} ranks");
    }
}

#[test]
fn a_users_own_optimizer_is_saved_and_goes_on_under_another_strategy() {
    let whole = train("single", 1, signum);
    let folder = tempfile::tempdir().unwrap();
    for (before, after) in [("zero1", "ddp"), ("ddp", "zero1"), ("zero1", "zero1")] {
        let path = folder.path().join(format!("{before}-{after}"));
        let run = |strategy, world, range: Range<usize>| {
            let ranks = fabric(strategy, world).launch_threads(|fabric| {
                let (model, mut optimizer) =
                    fabric.setup(VecModel::new(params(|x| x)), signum())?;
                if range.start > 0 {
                    fabric.load(
                        &path,
                        State::new()
                            .model("m", &model)
                            .optimizer("o", &mut optimizer),
                    )?;
                }
                steps(fabric, &model, &mut optimizer, range.clone())?;
                fabric.save(
                    &path,
                    State::new()
                        .model("m", &model)
                        .optimizer("o", &mut optimizer),
                )?;
                Ok(bits(&model))
            });
            ranks.unwrap().remove(0)
        };
        run(before, 3, 0..4);
        assert_eq!(run(after, 2, 4..8), whole, "{before}, then {after}");
    }
}

#[test]
fn every_type_of_parameter_is_updated_in_its_own() {
    fn by<T: Element + Into<f64>, E: Elementwise + Sync>(
        rule: E,
        of: impl Fn(f32) -> T + Sync,
    ) -> Vec<f64> {
        let ranks = fabric("zero1", 2).launch_threads(|fabric| {
            let model = VecModel::new(params(&of));
            let (model, mut optimizer) = fabric.setup(model, ByElement::of(rule.clone()))?;
            for step in 0..4 {
                let grads = gradients(step).into_iter();
                let grads = grads.map(|grad| Some(grad?.into_iter().map(&of).collect()));
                fabric.backward(model.gradients(grads.collect()))?;
                optimizer.step()?;
                optimizer.zero_grad();
            }
            Ok(model.read("p1"))
        });
        ranks.unwrap().remove(0).into_iter().map(T::into).collect()
    }
    let adam = rules()[4];
    let (wide, single) = (by(adam, f64::from), by(adam, |x| x));
    let small = by(adam, bf16::from_f32);
    for ((wide, single), small) in wide.iter().zip(single).zip(small) {
        assert!(
            (wide - single).abs() < 1e-5,
            "{wide} in f64, {single} in f32"
        );
        assert!((wide - small).abs() < 0.1, "{wide} in f64, {small} in bf16");
    }
    let own = Signum { lr: 0.5, beta: 0.5 };
    // Steps of a half: every type has them exactly, while numbers are small.
    assert_eq!(by(own.clone(), f64::from), by(own.clone(), |x| x));
    assert_eq!(
        by(own.clone(), f64::from)[..16],
        by(own, bf16::from_f32)[..16]
    );
}
