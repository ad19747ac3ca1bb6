//! Units whose parameters come and go compute what a whole model computes. Method: an engine of paper (`puppet.rs`) against
//! the same model left alone, to the bit; and every mistake in declaring and running units.

use candle_core::{DType, Result as CandleResult, Tensor, bail};
use candle_nn::{Init, Linear, Module, VarBuilder, VarMap};
use fabric::{
    Fabric, FabricModule, Result,
    model::{Edge, Model, ParamId, UnitId},
    optim::{AdamW, Sgd},
};
use fabric_candle::{CandleModel, CandleOptimizer, Loss, Unit, build, build_deferred};
use fabric_engine::kernels::SpanMut;

use crate::{
    CPU, build_with, flat,
    model::{Config, Gpt, batch},
    puppet::{Puppet, read, step_whole},
    ranks, values,
};

const SMALL: Config = Config {
    layers: 4,
    heads: 2,
    width: 16,
    context: 8,
};

fn gpt(vb: VarBuilder<'static>) -> CandleResult<Gpt> {
    Gpt::new(&SMALL, vb)
}

fn text_loss(step: usize) -> impl Fn(&Gpt) -> CandleResult<Tensor> {
    let windows = ["to be or ", "not to be", "that is a", " question"];
    let windows = [0, 1].map(|row| windows[(step + row) % 4].as_bytes().to_vec());
    move |model| {
        let (input, target) = batch(&windows, &CPU)?;
        model.loss(&input, &target)
    }
}

/// Bytes of a model's parameters that are always there, and of its largest unit.
fn sizes<M: Send + Sync + 'static>(model: &CandleModel<M>) -> (usize, usize) {
    let bytes = |unit: Option<UnitId>| {
        let params = model.params().iter();
        let own = params.filter(move |param| param.home() == unit);
        own.map(|param| 4 * param.numel()).sum::<usize>()
    };
    let units = (0..model.units().len()).map(|unit| bytes(Some(UnitId(unit))));
    (bytes(None), units.max().unwrap_or(0))
}

#[test]
fn a_gpt_whose_blocks_come_and_go_trains_to_the_same_bits() {
    for deferred in [false, true] {
        let whole = build_with(3, DType::F32, gpt).unwrap();
        let model = match deferred {
            false => build_with(3, DType::F32, gpt).unwrap(),
            true => deferred_with(3, DType::F32, gpt),
        };
        let puppet = Puppet::new(model);
        assert_eq!(
            puppet.model.units(),
            ["block.0", "block.1", "block.2", "block.3"]
        );
        for step in 0..5 {
            let expected = step_whole(&whole, text_loss(step));
            assert_eq!(puppet.step(text_loss(step)), expected, "step {step}");
        }
        let last = (0..whole.params().len()).map(|index| read(&whole, ParamId(index)));
        assert_eq!(puppet.values(), last.collect::<Vec<_>>());
        let (root, unit) = sizes(&whole);
        assert_eq!(puppet.state().most_bytes, root + unit, "one unit at once");
    }
}

#[test]
fn edges_come_in_the_order_of_the_passes() {
    use Edge::{BackwardEnter, ForwardEnter, ForwardLeave};
    let puppet = Puppet::new(build_with(3, DType::F32, gpt).unwrap());
    puppet.step(text_loss(0));
    let forward = (0..4).flat_map(|unit| [(unit, ForwardEnter), (unit, ForwardLeave)]);
    let backward = (0..4).rev().map(|unit| (unit, BackwardEnter));
    let edges = forward.clone().chain(backward).collect::<Vec<_>>();
    assert_eq!(std::mem::take(&mut puppet.state().edges), edges);
    // To look at a loss, no backward is needed.
    text_loss(1)(&puppet.model).unwrap();
    assert_eq!(puppet.state().edges, forward.collect::<Vec<_>>());
    puppet.step(text_loss(1));
}

#[test]
fn a_steady_state_uses_the_memory_of_one_unit_again_and_again() {
    let puppet = Puppet::new(build_with(3, DType::F32, gpt).unwrap());
    puppet.step(text_loss(0));
    let mut first = std::mem::take(&mut puppet.state().places);
    (1..5).for_each(|step| drop(puppet.step(text_loss(step))));
    let mut later = std::mem::take(&mut puppet.state().places);
    for places in [&mut first, &mut later] {
        places.sort_unstable();
        places.dedup();
    }
    assert_eq!(first, later);
    let unit = puppet
        .model
        .params()
        .iter()
        .filter(|param| param.unit == Some(UnitId(0)));
    assert_eq!(later.len(), unit.count());
}

#[test]
fn before_set_up_and_where_parameters_stay_units_add_nothing_to_the_graph() {
    let nodes = |model: &Gpt| text_loss(0)(model).unwrap().sorted_nodes().len();
    let map = VarMap::new();
    let theirs = Gpt::new(&SMALL, VarBuilder::from_varmap(&map, DType::F32, &CPU)).unwrap();
    let model = build_with(3, DType::F32, gpt).unwrap();
    let hooks = model.params().len(); // each is a node beside its variable
    let expected = nodes(&theirs) + hooks;
    assert_eq!(nodes(&model), expected);
    ranks(1)
        .unwrap()
        .launch_threads(|fabric| {
            let model = build_with(3, DType::F32, gpt)?;
            let (model, _) = fabric.setup(model, Sgd::new(0.1))?;
            assert_eq!(nodes(&model), expected);
            Ok(())
        })
        .unwrap();
    let puppet = Puppet::new(model);
    assert_eq!(nodes(&puppet.model), expected + SMALL.layers);
}

/// Blocks x + tanh(x w + b), run in one of two ways; the input of the first has no gradient.
#[derive(Clone)]
struct Stack {
    blocks: Vec<(Unit, Linear)>,
    forgets: bool,
}

impl Stack {
    fn new(forgets: bool) -> impl Fn(VarBuilder<'static>) -> CandleResult<Self> {
        move |vb| {
            let block = |index: usize| {
                let vb = vb.pp(format!("block.{index}"));
                Ok((Unit::new(&vb)?, candle_nn::linear(6, 6, vb.pp("layer"))?))
            };
            let blocks = (0..12).map(block).collect::<CandleResult<_>>()?;
            Ok(Self { blocks, forgets })
        }
    }

    fn loss(&self) -> CandleResult<Tensor> {
        let x = Tensor::arange(0f32, 30.0, &CPU)?.reshape((5, 6))?;
        let mut x = (x / 30.0)?;
        for (unit, layer) in &self.blocks {
            let layer = layer.clone();
            let block = move |x: &Tensor| x + layer.forward(x)?.tanh()?;
            x = match self.forgets {
                true => unit.checkpoint(&x, block)?,
                false => unit.run(&x, block)?,
            };
        }
        x.sqr()?.mean_all()
    }
}

#[test]
fn a_checkpointed_unit_computes_again_to_the_same_bits() {
    let whole = build_with(3, DType::F32, Stack::new(false)).unwrap();
    let run = Puppet::new(build_with(3, DType::F32, Stack::new(false)).unwrap());
    let again = Puppet::new(build_with(3, DType::F32, Stack::new(true)).unwrap());
    for step in 0..4 {
        let expected = step_whole(&whole, Stack::loss);
        assert_eq!(run.step(Stack::loss), expected, "step {step}");
        assert_eq!(again.step(Stack::loss), expected, "step {step}");
    }
    assert_eq!(again.state().edges, run.state().edges);
    assert_eq!(again.state().most_bytes, run.state().most_bytes);
    // What is kept for the backward: an operation and its anchor for each unit, and the loss.
    let nodes = again.model.loss().unwrap().sorted_nodes().len();
    assert_eq!(nodes, 2 * 12 + 4);
}

#[test]
fn a_unit_that_runs_twice_in_a_forward_keeps_its_parameters_until_the_last_gradient() {
    let twice = |model: &Stack| {
        let mut x = Tensor::arange(0f32, 30.0, &CPU)?.reshape((5, 6))?;
        for (unit, layer) in model.blocks[..3].iter().chain(&model.blocks) {
            x = unit.run(&x, |x| layer.forward(x)?.tanh())?;
        }
        x.sqr()?.mean_all()
    };
    let whole = build_with(3, DType::F32, Stack::new(false)).unwrap();
    let puppet = Puppet::new(build_with(3, DType::F32, Stack::new(false)).unwrap());
    for _ in 0..3 {
        assert_eq!(puppet.step(twice), step_whole(&whole, twice));
    }
}

#[test]
fn a_checkpoint_before_set_up_is_an_ordinary_run() {
    let [run, again] = [false, true].map(|forgets| {
        let model = build_with(3, DType::F32, Stack::new(forgets)).unwrap();
        step_whole(&model, Stack::loss)
    });
    assert_eq!(run, again);
}

/// A model whose first values follow from `seed`, deferred.
fn deferred_with<M>(
    seed: u64,
    dtype: DType,
    f: impl FnOnce(VarBuilder<'static>) -> CandleResult<M>,
) -> CandleModel<M> {
    crate::seeded(seed, || Ok(build_deferred(&CPU, dtype, f)?)).unwrap()
}

#[test]
fn line_25_deferred_values_are_those_that_build_gives() {
    let every = |vb: VarBuilder<'static>| {
        let uniform = Init::Uniform { lo: -1.0, up: 2.0 };
        let normal = candle_nn::init::DEFAULT_KAIMING_UNIFORM;
        vb.get_with_hints((7, 5), "uniform", uniform)?;
        vb.get_with_hints((7, 5), "kaiming", normal)?;
        vb.get_with_hints((), "constant", Init::Const(1.0 / 3.0))?;
        candle_nn::linear(5, 3, vb.pp("layer"))
    };
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        let now = build_with(5, dtype, every).unwrap();
        let later = crate::seeded(5, || {
            let later = build_deferred(&CPU, dtype, every)?;
            assert_eq!(later.params(), now.params());
            // In any order, and a second time changes nothing.
            for index in [3, 0, 2, 4, 1, 1, 0] {
                later.initialize(ParamId(index))?;
            }
            Ok(later)
        });
        assert_eq!(values(&later.unwrap()).unwrap(), values(&now).unwrap());
    }
}

#[test]
fn memory_alone_has_no_first_values_and_values_once_given_up_do_not_return() {
    let model = deferred_with(5, DType::F32, gpt);
    let id = ParamId(0);
    model.acquire(id).unwrap();
    assert!(read(&model, id).iter().all(|value| *value == 0.0));
    model.release(id).unwrap();
    model.initialize(id).unwrap();
    let text = model.with(id, &mut |_| Ok(())).unwrap_err().to_string();
    assert!(text.contains("'tokens' gave up its memory"), "{text}");
    let text = model.with(ParamId(1), &mut |_| Ok(())).unwrap_err();
    assert!(
        text.to_string().contains("Call fabric.setup first"),
        "{text}"
    );
}

#[test]
fn a_deferred_model_trains_under_strategies_that_keep_parameters_whole() {
    for world in [1, 2] {
        let run = ranks(world).unwrap().launch_threads(|fabric| {
            let [now, later] = [false, true].map(|deferred| {
                let model = match deferred {
                    true => deferred_with(3, DType::F32, gpt),
                    false => build_with(3, DType::F32, gpt)?,
                };
                let (model, mut optimizer) = fabric.setup(model, Sgd::new(0.1))?;
                for step in 0..3 {
                    fabric.backward(Loss(&text_loss(step)(&model)?))?;
                    optimizer.step()?;
                    optimizer.zero_grad();
                }
                Ok::<_, fabric::Error>(values(model.module())?)
            });
            assert_eq!(now?, later?);
            Ok(())
        });
        run.unwrap();
    }
}

#[test]
fn giving_up_and_getting_twice_is_as_once() {
    let model = build_with(5, DType::F32, gpt).unwrap();
    let id = ParamId(2);
    let before = read(&model, id);
    model.acquire(id).unwrap();
    assert_eq!(read(&model, id), before, "it had memory already");
    model.release(id).unwrap();
    model.release(id).unwrap();
    model.acquire(id).unwrap();
    model.acquire(id).unwrap();
    assert_eq!(read(&model, id).len(), before.len());
}

fn sgd(vars: Vec<candle_core::Var>) -> CandleResult<candle_nn::SGD> {
    candle_nn::Optimizer::new(vars, 0.1)
}

#[test]
fn what_needs_whole_parameters_is_refused_while_one_is_away() {
    let model = build_with(5, DType::F32, gpt).unwrap();
    model.release(ParamId(3)).unwrap();
    model.release(ParamId(7)).unwrap();
    let name = &model.params()[3].name;
    let absent = format!("'{name}' and 1 more parameters have no memory now");
    let text = model.with_vars(|_| Ok(())).unwrap_err().to_string();
    assert!(text.contains(&absent), "{text}");
    let error = model.with(ParamId(3), &mut |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains(name), "{error}");
    let typed = matches!(error, fabric::engine::Error::Argument { .. });
    assert!(typed, "{error:?}");
    let made = CandleOptimizer::new(&deferred_with(5, DType::F32, gpt), sgd);
    let text = made.err().expect("refused").to_string();
    assert!(text.contains("fabric_candle::build"), "{text}");
}

#[test]
fn a_step_of_candles_optimizer_is_refused_while_a_parameter_is_away() {
    let run = ranks(1).unwrap().launch_threads(|fabric| {
        let model = build_with(3, DType::F32, gpt)?;
        let optimizer = CandleOptimizer::new(&model, sgd)?;
        let (model, mut optimizer) = fabric.setup(model, optimizer)?;
        fabric.backward(Loss(&text_loss(0)(&model)?))?;
        model.release(ParamId(3))?;
        optimizer.step()
    });
    let text = run.unwrap_err().to_string();
    assert!(text.contains("has no memory now"), "{text}");
}

/// What `build` says of a model.
fn refusal<M>(f: impl FnOnce(VarBuilder<'static>) -> CandleResult<M>) -> String {
    match build(&CPU, DType::F32, f) {
        Ok(_) => panic!("built"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn units_that_make_no_sense_are_refused_by_name() {
    let weight = |vb: VarBuilder<'static>| vb.get(3, "weight");
    let nested = refusal(|vb| {
        let units = [Unit::new(&vb.pp("a"))?, Unit::new(&vb.pp("a").pp("b"))?];
        weight(vb.pp("a").pp("b"))?;
        Ok(units)
    });
    assert!(
        nested.contains("'a.b.weight' is in two units, 'a' and 'a.b'"),
        "{nested}"
    );
    let same = refusal(|vb| Ok([Unit::new(&vb.pp("a"))?, Unit::new(&vb.pp("a"))?]));
    assert!(same.contains("two units 'a'"), "{same}");
    let empty = refusal(|vb| {
        let unit = Unit::new(&vb.pp("a"))?;
        weight(vb.pp("b"))?;
        Ok(unit)
    });
    assert!(empty.contains("the unit 'a' has no parameter"), "{empty}");
    let root = refusal(|vb| Unit::new(&vb));
    assert!(root.contains("a unit needs a prefix"), "{root}");
    let mut late = None;
    build(&CPU, DType::F32, |vb| {
        late = Some(vb.pp("late"));
        weight(vb)
    })
    .unwrap();
    let late = Unit::new(&late.unwrap()).unwrap_err().to_string();
    assert!(
        late.contains("'late'") && late.contains("after the model was built"),
        "{late}"
    );
}

#[test]
fn a_parameter_belongs_to_a_unit_by_whole_components_of_its_name() {
    let model = build(&CPU, DType::F32, |vb| {
        for name in ["block.10", "block.1"] {
            Unit::new(&vb.pp(name))?;
            vb.pp(name).pp("deep").get(2, "weight")?;
        }
        vb.get(2, "block.1")?;
        vb.get(2, "block.100.weight")
    });
    let model = model.unwrap();
    assert_eq!(model.units(), ["block.10", "block.1"]);
    let units = model.params().iter().map(|param| param.unit);
    let expected = [Some(UnitId(0)), Some(UnitId(1)), None, None];
    assert_eq!(units.collect::<Vec<_>>(), expected);
}

#[test]
fn a_tied_parameter_of_a_unit_lives_in_the_root() {
    let model = build(&CPU, DType::F32, |vb| {
        let block = vb.pp("block");
        Unit::new(&block)?;
        block.get(2, "own")?;
        block.get(2, "shared")?;
        vb.get(2, "block.shared")
    });
    let model = model.unwrap();
    let homes = model.params().iter().map(|param| param.home());
    assert_eq!(homes.collect::<Vec<_>>(), [Some(UnitId(0)), None]);
}

#[test]
fn a_renamed_builder_and_one_of_another_model_are_told_apart() {
    let inner = build(&CPU, DType::F32, |vb| {
        let outer = vb.clone();
        build(&CPU, DType::F32, |vb| {
            Unit::new(&outer.pp("outer"))?;
            let renamed = vb.rename_f(|name| format!("renamed.{name}"));
            Unit::new(&renamed.pp("a"))?;
            renamed.pp("a").get(2, "weight")?;
            outer.pp("outer").get(2, "weight")
        })
    });
    let outer = inner.unwrap();
    assert_eq!(outer.units(), ["outer"]);
    assert_eq!((*outer).units(), ["renamed.a"]);
}

#[test]
fn a_unit_of_a_builder_of_candles_runs_what_it_is_given() {
    let map = VarMap::new();
    for vb in [
        VarBuilder::from_varmap(&map, DType::F32, &CPU),
        VarBuilder::zeros(DType::F32, &CPU),
    ] {
        let unit = Unit::new(&vb).unwrap();
        let x = Tensor::new(&[1f32, 2.0], &CPU).unwrap();
        assert_eq!(
            flat(&unit.run(&x, |x| x * 2.0).unwrap()).unwrap(),
            [2.0, 4.0]
        );
        assert_eq!(
            flat(&unit.checkpoint(&x, |x| x * 2.0).unwrap()).unwrap(),
            [2.0, 4.0]
        );
        assert_eq!(format!("{unit:?}"), "Unit(None)");
    }
}

#[test]
fn a_failing_unit_is_left_and_says_why() {
    let puppet = Puppet::new(build_with(3, DType::F32, Stack::new(false)).unwrap());
    let (unit, _) = &puppet.model.blocks[2];
    assert_eq!(format!("{unit:?}"), "Unit(Some(\"block.2\"))");
    let x = Tensor::ones((5, 6), DType::F32, &CPU).unwrap();
    let failed = unit.run(&x, |_| bail!("no luck")).unwrap_err();
    let text = failed.to_string(); // candle may have put a backtrace behind it
    assert!(text.starts_with("no luck"), "{text}");
    assert_eq!(
        puppet.state().edges,
        [(2, Edge::ForwardEnter), (2, Edge::ForwardLeave)]
    );
    // The parameters of another unit are not there.
    let foreign = |x: &Tensor| puppet.model.blocks[7].1.forward(x);
    let text = unit.run(&x, foreign).unwrap_err().to_string();
    for words in [
        "block.7.layer.weight",
        "only there inside its run",
        "matmul",
    ] {
        let named = words.starts_with("block") || text.contains(words);
        assert!(named, "{words} in {text}");
    }
    assert!(text.contains("have no memory now"), "{text}");
    puppet.step(Stack::loss); // and it goes on
    puppet.state().broken = Some("rank 1 is gone");
    let text = puppet.model.loss().unwrap_err().to_string();
    assert!(text.contains("rank 1 is gone"), "{text}");
}

#[test]
fn a_job_that_fails_in_backward_ends_the_backward_with_its_words() {
    for forgets in [false, true] {
        let puppet = Puppet::new(build_with(3, DType::F32, Stack::new(forgets)).unwrap());
        let loss = puppet.model.loss().unwrap();
        puppet.state().broken = Some("rank 1 is gone");
        let text = loss.backward().unwrap_err().to_string();
        assert!(text.contains("rank 1 is gone"), "{text}");
    }
}

#[test]
fn a_deferred_model_that_was_not_set_up_says_so_in_a_unit() {
    let model = deferred_with(3, DType::F32, Stack::new(false));
    let text = model.loss().unwrap_err().to_string();
    assert!(
        text.contains("build_deferred only after fabric.setup"),
        "{text}"
    );
    let text = refusal_of_deferred(|vb| vb.get((2, 2), "weight")?.sqr());
    assert!(text.contains("'weight' has no memory now"), "{text}");
}

fn refusal_of_deferred(f: impl FnOnce(VarBuilder<'static>) -> CandleResult<Tensor>) -> String {
    let built = build_deferred(&CPU, DType::F32, f);
    built.err().expect("refused").to_string()
}

#[test]
fn a_gpt_in_bf16_has_nearly_the_gradients_of_f32() {
    let grads = |dtype| {
        let model = build_with(3, dtype, gpt).unwrap();
        let loss = text_loss(0)(&model).unwrap();
        assert_eq!(loss.dtype(), DType::F32, "the loss is computed in f32");
        let store = loss.backward().unwrap();
        let grads = model.with_vars(|vars| {
            let grad = |(name, var): &(String, candle_core::Var)| {
                let grad = store.get(var).expect("a gradient");
                assert_eq!(grad.dtype(), dtype);
                Ok((name.clone(), flat(grad)?))
            };
            vars.iter().map(grad).collect::<CandleResult<Vec<_>>>()
        });
        (loss.to_scalar::<f32>().unwrap(), grads.unwrap())
    };
    let (loss, full) = grads(DType::F32);
    let (narrow_loss, narrow) = grads(DType::BF16);
    assert!((loss - narrow_loss).abs() < 0.02, "{loss} {narrow_loss}");
    for ((name, full), (_, narrow)) in full.iter().zip(&narrow) {
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
        let error = norm(&mut full.iter().zip(narrow).map(|(a, b)| a - b));
        let size = norm(&mut full.iter().copied());
        assert!(error < 0.05 * size, "{name}: {error} of {size}");
    }
}

/// The bits of all parameters, each unit gathered for it.
fn bits<M: Send + Sync + 'static>(model: &FabricModule<CandleModel<M>>) -> Result<Vec<u32>> {
    let mut bits = Vec::new();
    let units = (0..model.units().len()).map(|unit| Some(UnitId(unit)));
    for home in std::iter::once(None).chain(units) {
        if let Some(unit) = home {
            model.unit(unit, Edge::ForwardEnter)?;
        }
        for (index, meta) in model.params().iter().enumerate() {
            if meta.home() == home {
                let mut values = vec![0f32; meta.numel()];
                model.with(ParamId(index), &mut |buffer| {
                    buffer.read(0..values.len(), SpanMut::of(&mut values))
                })?;
                bits.extend(values.into_iter().map(f32::to_bits));
            }
        }
        if let Some(unit) = home {
            model.unit(unit, Edge::ForwardLeave)?;
        }
    }
    Ok(bits)
}

/// The losses of each rank in 20 steps on its share, and the parameters' bits at the end.
fn losses<M: Send + Sync + 'static>(
    strategy: &str,
    world: usize,
    make: impl Fn(VarBuilder<'static>) -> CandleResult<M> + Sync,
    loss: impl Fn(&M, usize) -> CandleResult<Tensor> + Sync,
) -> Vec<(Vec<f32>, Vec<u32>)> {
    let mut builder = Fabric::builder().devices(world).strategy(strategy);
    if strategy == "hsdp" {
        builder = builder.group(world.div_ceil(2));
    }
    let run = builder.build().unwrap().launch_threads(|fabric| {
        let model = deferred_with(3, DType::F32, &make);
        let (model, mut optimizer) = fabric.setup(model, AdamW::new(0.02))?;
        let mut losses = Vec::new();
        for step in 0..20 {
            let loss = loss(&model, 10 * step + fabric.global_rank())?;
            losses.push(loss.to_scalar::<f32>()?);
            fabric.backward(Loss(&loss))?;
            optimizer.step()?;
            optimizer.zero_grad();
        }
        Ok((losses, bits(&model)?))
    });
    run.unwrap()
}

#[test]
fn sharded_parameters_train_to_the_bits_of_whole_ones() {
    for world in [1, 2, 4] {
        let train = |strategy| losses(strategy, world, gpt, |model, step| text_loss(step)(model));
        let whole = train("ddp");
        for strategy in ["zero1", "zero2", "fsdp", "hsdp"] {
            assert_eq!(train(strategy), whole, "{strategy} on {world} ranks");
        }
        let stack = |strategy, forgets| {
            let loss = |model: &Stack, step| model.loss()? * (1.0 + step as f64);
            losses(strategy, world, Stack::new(forgets), loss)
        };
        let whole = stack("ddp", false);
        for (strategy, forgets) in [("ddp", true), ("fsdp", false), ("fsdp", true)] {
            let ran = stack(strategy, forgets);
            assert_eq!(ran, whole, "{strategy}, {world} ranks, {forgets}");
        }
    }
}
