//! Values that Lightning Fabric was seen to give, as far as no other test has them.

use fabric::{Fabric, ReduceOp, State, model::ParamId, optim::Sgd, vec::VecModel};

use crate::puppet::ddp;

// Gradients stay each rank's own (1, 1 and 2, 2), then their sums are averaged.
#[test]
fn r_06_two_batches_without_synchronisation_and_one_with() {
    let run = ddp(2).launch_threads(|fabric| {
        let (model, _optimizer) =
            fabric.setup(VecModel::new([("w", vec![0f32; 2])]), Sgd::new(1.0))?;
        let own = fabric.global_rank() as f32 + 1.0;
        let backward = || fabric.backward(model.gradients(vec![Some(vec![own / 2.0; 2])]));
        for _ in 0..2 {
            fabric.no_backward_sync(&model, true, backward)?;
        }
        assert_eq!(model.grad(ParamId(0)), Some(vec![own; 2]));
        fabric.backward(model.gradients(vec![Some(vec![own; 2])]))?;
        assert_eq!(model.grad(ParamId(0)), Some(vec![3.0; 2]));
        Ok(())
    });
    run.unwrap();
}

#[test]
fn r_09_rank_zero_alone_writes_and_names_have_no_prefix_of_a_strategy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one");
    let run = ddp(3).launch_threads(|fabric| {
        let (model, _) =
            fabric.setup(VecModel::new([("layer.w", vec![0f32; 2])]), Sgd::new(1.0))?;
        fabric.save(&path, State::new().model("model", &model))
    });
    run.unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.names(), ["model.layer.w"]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn r_13_a_launch_inside_a_launch_runs_in_place() {
    let run = ddp(2).launch_threads(|fabric| {
        let inner = fabric.launch(|fabric| Ok(fabric.world_size()))?;
        Ok(inner)
    });
    assert_eq!(run.unwrap(), [Some(2); 2]);
}

// R-14, API-37: Lightning's all_reduce runs a whole barrier first, and takes twice as long for it.
#[test]
fn r_14_an_all_reduce_is_one_collective() {
    let run = ddp(2).launch_threads(|fabric| {
        let before = fabric.spent()?;
        let mut buffer = vec![1f32; 1000];
        fabric.all_reduce(&mut buffer, ReduceOp::Avg)?;
        fabric.all_reduce_value(1.0, ReduceOp::Sum)?;
        Ok(fabric.spent()?.collectives - before.collectives)
    });
    assert_eq!(run.unwrap(), [2, 2]);
}

#[test]
fn api_15_to_17_one_device_is_a_world_of_one() {
    let fabric = Fabric::builder().devices(1).build().unwrap();
    assert_eq!((fabric.world_size(), fabric.global_rank()), (1, 0));
    let ran = fabric.launch(|fabric| {
        assert_eq!((fabric.world_size(), fabric.ranks()), (1, 1));
        assert_eq!((fabric.local_rank(), fabric.node_rank()), (0, 0));
        assert!(fabric.is_global_zero());
        assert_eq!(fabric.all_reduce_value(2.5, ReduceOp::Avg)?, 2.5);
        assert_eq!(fabric.broadcast("text".to_string(), 0)?, "text");
        assert_eq!(fabric.all_gather_object(&7)?, [7]);
        fabric.barrier()?;
        Ok(3)
    });
    assert_eq!(ran.unwrap(), Some(3));
}
