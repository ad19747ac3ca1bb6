//! What an optimizer refuses: options that make no sense, and states that are not its own. Method: what every rank says,
//! and that nothing has changed.

use std::sync::{Barrier, Mutex};

use fabric::{
    optim::{AdamW, ByElement, Elements, Elementwise, Lion, Optimizer, OptimizerState, Sgd},
    vec::VecModel,
};
use fabric_engine::{Result as EngineResult, buffer::Slab, kernels::Dtype};

use super::{SIZES, bits, fabric, gradients, params, steps, train};

/// What a step with this optimizer says on every rank of a sharded pair.
fn refusal<O: Optimizer>(optimizer: impl Fn() -> O + Sync) -> Vec<String> {
    let said = Mutex::new(Vec::new());
    let reduced = Barrier::new(2); // else a rank that still waits in backward fails there
    let outcome = fabric("zero1", 2).launch_threads(|fabric| {
        let (model, mut optimizer) = fabric.setup(VecModel::new(params(|x| x)), optimizer())?;
        fabric.backward(model.gradients(gradients(1)))?;
        reduced.wait();
        let before = bits(&model);
        let result = optimizer.step();
        assert_eq!(bits(&model), before);
        let text = result.as_ref().unwrap_err().to_string();
        said.lock().unwrap().push(text);
        result
    });
    assert!(outcome.is_err());
    said.into_inner().unwrap()
}

/// A formula that has nothing right but its name.
#[derive(Clone)]
struct Wrong(&'static [&'static str]);

impl Elementwise for Wrong {
    fn name(&self) -> &str {
        "wrong"
    }
    fn states(&self) -> &[&'static str] {
        self.0
    }
    fn learning_rate(&self) -> f64 {
        0.0
    }
    fn set_learning_rate(&mut self, _: f64) {}
    fn update(&self, elements: Elements<'_, '_>) -> EngineResult<()> {
        elements.each(|_, _, [_, _]| {})
    }
}

#[test]
fn what_makes_no_sense_is_refused_at_the_first_step_on_all_ranks() {
    let says = |said: Vec<String>, words: &[&str]| {
        assert_eq!(said.len(), 2);
        for text in said {
            for word in words {
                assert!(text.contains(word), "'{word}' is not in '{text}'");
            }
        }
    };
    let nothing = || Sgd::new(0.1).group("biases", |param| param.name == "bias", |own| own);
    says(
        refusal(nothing),
        &["no parameter is in the group 'biases'", "'p0', 'p1'"],
    );
    let shadowed = || {
        Sgd::new(0.1)
            .group("all", |_| true, |own| own)
            .group("late", |_| true, |own| own)
    };
    says(refusal(shadowed), &["group 'late'", "earlier groups"]);
    let twins = || {
        Sgd::new(0.1)
            .group("a", |_| true, |own| own)
            .group("a", |_| true, |own| own)
    };
    says(refusal(twins), &["two groups of parameters are called 'a'"]);
    says(
        refusal(|| Sgd::new(-0.1)),
        &["sgd: a learning rate of -0.1", "0 or more"],
    );
    says(
        refusal(|| AdamW::new(0.1).betas(0.9, 1.0)),
        &["adamw: a beta2 of 1"],
    );
    let in_a_group = || Lion::new(0.1).group("all", |_| true, |own| own.weight_decay(f64::NAN));
    says(refusal(in_a_group), &["lion: a weight decay of NaN"]);
    says(
        refusal(|| Sgd::new(0.1).nesterov(true)),
        &["update 'p", "nesterov needs a positive momentum"],
    );
    let wrong = |states: &'static [&'static str]| refusal(move || ByElement::of(Wrong(states)));
    says(
        wrong(&["one"]),
        &["takes 2 states, and the optimizer has 1"],
    );
    says(wrong(&["a", "a"]), &["wrong calls two states 'a'"]);
    says(wrong(&["a.b", "a"]), &["wrong calls a state 'a.b'"]);
    says(wrong(&["step", "a"]), &["wrong calls a state 'step'"]);
    says(wrong(&["a"; 9]), &["wrong has 9 states", "at most 8"]);
}

/// Training that is cut after four steps by this change of the optimizer's state, and goes on.
fn cut(
    optimizer: impl Fn() -> Sgd + Sync,
    change: impl Fn(OptimizerState) -> OptimizerState + Sync,
) -> Vec<u32> {
    let ranks = fabric("single", 1).launch_threads(|fabric| {
        let (model, mut before) = fabric.setup(VecModel::new(params(|x| x)), optimizer())?;
        steps(fabric, &model, &mut before, 0..4)?;
        let state = change(before.optimizer().state(&*model)?);
        let mut after = fabric.setup_optimizers(optimizer(), &model);
        after.optimizer_mut().load_state(&*model, state)?;
        steps(fabric, &model, &mut after, 4..8)?;
        Ok(bits(&model))
    });
    ranks.unwrap().remove(0)
}

#[test]
fn momentum_that_was_saved_without_counts_goes_on() {
    // With dampening a first step differs from every later one.
    let optimizer = || Sgd::new(0.05).momentum(0.9).dampening(0.5);
    let without_counts = |mut state: OptimizerState| {
        state.tensors.retain(|(name, _)| !name.starts_with("step."));
        assert_eq!(state.tensors.len(), SIZES.len());
        state
    };
    let whole = train("single", 1, optimizer);
    assert_eq!(cut(optimizer, |state| state), whole);
    assert_eq!(cut(optimizer, without_counts), whole);
    assert_ne!(cut(optimizer, |_| OptimizerState::default()), whole);
}

#[test]
fn states_that_do_not_fit_are_refused_by_name() {
    let model = VecModel::new([("a", vec![0f32; 3]), ("b.c", vec![0f32; 2])]);
    let tensor = |name: &str, numel| (name.to_string(), Slab::zeroed(Dtype::F32, numel));
    let count = |count: i64| ("step.a".to_string(), Slab::from_slice(&[count]));
    let says = |tensors: Vec<(String, Slab)>, words: &str| {
        let state = OptimizerState { steps: 1, tensors };
        let mut optimizer = AdamW::new(0.1);
        let text = optimizer
            .check_state(&model, &state)
            .unwrap_err()
            .to_string();
        assert!(text.contains(words), "'{words}' is not in '{text}'");
        assert!(optimizer.load_state(&model, state).is_err());
        assert!(
            optimizer.state(&model).unwrap().tensors.is_empty(),
            "nothing was loaded"
        );
    };
    let means = || vec![tensor("exp_avg.a", 3), tensor("exp_avg_sq.a", 3)];
    let with = |more| means().into_iter().chain([more]).collect();
    AdamW::new(0.1)
        .check_state(
            &model,
            &OptimizerState {
                steps: 1,
                tensors: with(count(4)),
            },
        )
        .unwrap();
    says(
        vec![tensor("exp_avg.b.c", 2)],
        "has 'exp_avg.b.c' and no 'exp_avg_sq.b.c'",
    );
    says(
        with(tensor("exp_avg_sq.c", 2)),
        "'exp_avg_sq.c', which this optimizer does not know",
    );
    says(
        with(tensor("momentum.a", 3)),
        "'momentum.a', which this optimizer does not know",
    );
    says(
        with(tensor("a", 3)),
        "'a', which this optimizer does not know",
    );
    says(with(tensor("exp_avg.a", 3)), "'exp_avg.a' twice");
    says(
        with(tensor("exp_avg.b.c", 3)),
        "exp_avg of 'b.c' is 3 x f32, this model needs 2 x f32",
    );
    says(
        with(tensor("step.a", 1)),
        "step of 'a' is 1 x f32, this model needs 1 x i64",
    );
    says(with(count(-3)), "step of 'a' is -3");
}
