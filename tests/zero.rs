//! A sharded update does what a replicated one does, to the bit, with a share of the state on each rank. Method: the same
//! training under `ddp` and `zero1`, compared by bits; costs by counters; checkpoints across strategies and worlds.

use std::path::Path;

use fabric::{
    Clip, Fabric, FabricModule, FabricOptimizer, Result, State,
    engine::shard::plan::Options,
    model::ParamId,
    optim::{AdamW, Optimizer, Sgd},
    vec::VecModel,
};

/// Five parameters of awkward sizes, so that shards cut through them.
const SIZES: [usize; 5] = [7, 64, 1, 33, 100];

fn fabric(strategy: &str, world: usize, bucket_bytes: usize) -> Fabric {
    let buckets = Options {
        bucket_bytes,
        first_bucket_bytes: bucket_bytes / 2,
        ..Options::default()
    };
    Fabric::builder()
        .devices(world)
        .strategy(strategy)
        .buckets(buckets)
        .build()
        .unwrap()
}

fn model() -> VecModel {
    let values = |size: usize| {
        (0..size)
            .map(|index| index as f32 / 17.0 - 0.5)
            .collect::<Vec<_>>()
    };
    VecModel::new(
        SIZES
            .iter()
            .enumerate()
            .map(|(index, size)| (format!("p{index}"), values(*size))),
    )
}

/// Gradients that depend on parameter, rank, step and element; parameter 2 has none in odd steps on rank 0, parameter 4
/// never has any.
fn gradients(fabric: &Fabric, step: usize) -> Vec<Option<Vec<f32>>> {
    let rank = fabric.global_rank();
    let grad = |param: usize, size: usize| {
        let element = |index: usize| {
            (((index * 7 + param * 13 + rank * 29 + step * 31) % 101) as f32 - 50.0) / 3.0
        };
        (0..size).map(element).collect::<Vec<_>>()
    };
    let used = |param: usize| param != 4 && !(param == 2 && rank == 0 && step % 2 == 1);
    SIZES
        .iter()
        .enumerate()
        .map(|(param, size)| used(param).then(|| grad(param, *size)))
        .collect()
}

fn bits(model: &VecModel) -> Vec<u32> {
    (0..SIZES.len())
        .flat_map(|param| model.read(&format!("p{param}")))
        .map(f32::to_bits)
        .collect()
}

fn steps<O: Optimizer>(
    fabric: &Fabric,
    model: &FabricModule<VecModel>,
    optimizer: &mut FabricOptimizer<O>,
    range: std::ops::Range<usize>,
    clip: Option<Clip>,
) -> Result<()> {
    for step in range {
        fabric.no_backward_sync(model, step % 3 == 0, || {
            fabric.backward(model.gradients(gradients(fabric, step)))
        })?;
        if step % 3 == 0 {
            continue; // accumulated: the next step sums them
        }
        if let Some(clip) = clip {
            fabric.clip_gradients(model, clip)?;
        }
        optimizer.step()?;
        optimizer.zero_grad();
    }
    Ok(())
}

/// The parameters' bits after 12 micro-batches; all ranks must have the same.
fn train<O: Optimizer>(
    fabric: Fabric,
    optimizer: impl Fn() -> O + Sync,
    clip: Option<Clip>,
) -> Vec<u32> {
    let ranks = fabric
        .launch_threads(|fabric| {
            let (model, mut optimizer) = fabric.setup(model(), optimizer())?;
            steps(fabric, &model, &mut optimizer, 0..12, clip)?;
            Ok(bits(&model))
        })
        .unwrap();
    assert!(
        ranks.iter().all(|rank| *rank == ranks[0]),
        "all ranks hold the same parameters"
    );
    ranks.into_iter().next().unwrap()
}

#[test]
fn zero1_ends_with_the_bits_of_ddp() {
    for world in [1, 2, 3, 4] {
        for bucket_bytes in [200, 1 << 20] {
            for clip in [
                None,
                Some(Clip::norm(5.0)),
                Some(Clip::Norm {
                    max: 2.0,
                    order: f64::INFINITY,
                }),
            ] {
                let adamw = || AdamW::new(0.05).weight_decay(0.1);
                let momentum = || Sgd::new(0.05).momentum(0.9).nesterov(true);
                let run = |strategy| {
                    let fabric = || fabric(strategy, world, bucket_bytes);
                    (
                        train(fabric(), adamw, clip),
                        train(fabric(), momentum, clip),
                    )
                };
                assert_eq!(
                    run("zero1"),
                    run("ddp"),
                    "{world} ranks, buckets of {bucket_bytes} bytes, {clip:?}"
                );
            }
        }
    }
}

#[test]
fn what_a_backward_and_a_step_cost_is_what_the_plan_says() {
    for world in [2, 3, 4] {
        fabric("zero1", world, 300)
            .launch_threads(|fabric| {
                let (model, mut optimizer) = fabric.setup(model(), Sgd::new(0.1))?;
                for step in 0..3 {
                    let before = fabric.spent()?;
                    fabric.backward(model.gradients(gradients(fabric, step)))?;
                    let between = fabric.spent()?;
                    assert_eq!(between - before, model.prediction());
                    optimizer.step()?;
                    assert_eq!(fabric.spent()? - between, model.step_prediction());
                    assert!(model.step_prediction().bytes > 0);
                    optimizer.zero_grad();
                }
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn each_rank_updates_its_share_and_all_together_everything_once() {
    let world = 3;
    let pieces = fabric("zero1", world, 300)
        .launch_threads(|fabric| {
            let model = fabric.setup_module(model())?;
            let plan = model.plan();
            let pieces = plan.pieces(fabric.global_rank());
            let own = pieces.iter().map(|piece| piece.range.len()).sum::<usize>();
            let most = plan
                .buckets()
                .iter()
                .map(|bucket| bucket.padded / world)
                .sum::<usize>();
            assert!(own <= most, "{own} elements of at most {most}");
            assert_eq!(
                model.grad(ParamId(0)),
                None,
                "no rank holds a whole gradient"
            );
            Ok(pieces)
        })
        .unwrap();
    let mut seen = SIZES.map(|size| vec![0; size]);
    for piece in pieces.into_iter().flatten() {
        seen[piece.param.0][piece.range]
            .iter_mut()
            .for_each(|count| *count += 1);
    }
    assert!(seen.iter().flatten().all(|count| *count == 1), "{seen:?}");
}

/// Train the first half, save; and go on, or not.
fn first_half(strategy: &str, world: usize, path: &Path) -> Vec<Vec<u32>> {
    fabric(strategy, world, 300)
        .launch_threads(|fabric| {
            let (model, mut optimizer) = fabric.setup(model(), AdamW::new(0.05))?;
            steps(fabric, &model, &mut optimizer, 0..6, None)?;
            fabric.save(
                path,
                State::new()
                    .model("model", &model)
                    .optimizer("optimizer", &mut optimizer),
            )?;
            steps(fabric, &model, &mut optimizer, 6..12, None)?;
            Ok(bits(&model))
        })
        .unwrap()
}

fn second_half(strategy: &str, world: usize, path: &Path) -> Vec<Vec<u32>> {
    fabric(strategy, world, 200)
        .launch_threads(|fabric| {
            let (model, mut optimizer) = fabric.setup(model(), AdamW::new(0.05))?;
            fabric.load(
                path,
                State::new()
                    .model("model", &model)
                    .optimizer("optimizer", &mut optimizer),
            )?;
            steps(fabric, &model, &mut optimizer, 6..12, None)?;
            Ok(bits(&model))
        })
        .unwrap()
}

#[test]
fn a_checkpoint_knows_nothing_of_shards() {
    let folder = tempfile::tempdir().unwrap();
    let (sharded, whole) = (folder.path().join("zero1"), folder.path().join("ddp"));
    let uninterrupted = first_half("zero1", 3, &sharded);
    assert_eq!(first_half("ddp", 3, &whole), uninterrupted);
    let tensors = |path: &Path| {
        let bytes = std::fs::read(path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors: Vec<_> = file
            .iter()
            .map(|(name, view)| (name.to_string(), view.data().to_vec()))
            .collect();
        tensors.sort();
        tensors
    };
    assert_eq!(
        tensors(&sharded),
        tensors(&whole),
        "both files hold the same tensors"
    );
    assert_eq!(second_half("zero1", 3, &sharded), uninterrupted);
    assert_eq!(second_half("ddp", 3, &sharded), uninterrupted);
    assert_eq!(second_half("zero1", 3, &whole), uninterrupted);
    assert!(
        second_half("zero1", 2, &sharded)
            .iter()
            .all(|rank| rank.len() == uninterrupted[0].len())
    );
}

#[test]
fn a_parameter_whose_name_ends_like_anothers_keeps_its_own_state() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("twins");
    let twins = || VecModel::new([("w", vec![1f32; 5]), ("a.w", vec![2f32; 8])]);
    let step = |fabric: &Fabric, steps: std::ops::Range<usize>, save: bool| {
        let (model, mut optimizer) = fabric.setup(twins(), AdamW::new(0.05))?;
        if !save {
            let state = State::new().model("model", &model);
            fabric.load(&path, state.optimizer("optimizer", &mut optimizer))?;
        }
        for step in steps {
            let grad = |numel: usize| (0..numel).map(|at| (at + step) as f32 / 7.0).collect();
            fabric.backward(model.gradients(vec![Some(grad(5)), Some(grad(8))]))?;
            optimizer.step()?;
            optimizer.zero_grad();
            if save && step == 1 {
                let state = State::new().model("model", &model);
                fabric.save(&path, state.optimizer("optimizer", &mut optimizer))?;
            }
        }
        Ok([model.read("w"), model.read("a.w")])
    };
    let zero1 = || fabric("zero1", 2, 1 << 20);
    let whole = zero1().launch_threads(|fabric| step(fabric, 0..4, true));
    let rest = zero1().launch_threads(|fabric| step(fabric, 2..4, false));
    assert_eq!(rest.unwrap(), whole.unwrap());
}

#[test]
fn names_of_stage_1_are_understood() {
    assert_eq!(fabric("DeepSpeed_Stage_1", 2, 300).strategy(), "zero1");
}
