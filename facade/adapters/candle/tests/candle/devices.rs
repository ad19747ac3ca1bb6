//! Where models and tensors are. Method: what a build without CUDA, on a machine without a GPU, must refuse in words.

use std::sync::Arc;

#[cfg(not(feature = "cuda"))]
use candle_core::{CudaDevice, Device};
use candle_core::{DType, Result as CandleResult, Tensor};
use candle_nn::{Linear, VarBuilder, linear};
use fabric::{
    Fabric,
    engine::{Result as EngineResult, buffer::Buffer, kernels::Memory},
    model::{Events, Model, ParamId, ParamMeta},
    optim::AdamW,
};
#[cfg(not(feature = "cuda"))]
use fabric_candle::build_deferred;
use fabric_candle::{CandleFabric, CandleModel, build};

use crate::{CPU, text};

fn layer(vb: VarBuilder) -> CandleResult<Linear> {
    linear(2, 1, vb)
}

#[cfg(not(feature = "cuda"))] // its device is a name without anything behind it
#[test]
fn a_build_without_cuda_refuses_its_devices_and_says_how_to_get_them() {
    let device = Device::Cuda(CudaDevice);
    let refused = [
        build(&device, DType::F32, layer).err(),
        build_deferred(&device, DType::F32, layer).err(),
    ];
    for error in refused {
        let text = error.expect("no CUDA here").to_string();
        assert!(text.contains("built without CUDA"), "{text}");
        assert!(text.contains("--features cuda"), "{text}");
    }
    let error = Fabric::builder().accelerator("cuda").build().err();
    assert!(error.is_some(), "nor has the facade");
}

#[cfg(not(feature = "cuda"))] // its device is a name without anything behind it
#[test]
fn a_parameter_on_another_device_than_its_model_is_refused_by_name() {
    let away = |vb: VarBuilder<'static>| {
        layer(vb.pp("here"))?;
        layer(vb.pp("there").set_device(Device::Cuda(CudaDevice)))
    };
    let text = build(&CPU, DType::F32, away).err().unwrap().to_string();
    for part in ["'there.weight'", "Cuda", "Cpu", "one device"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn ranks_on_a_cpu_have_tensors_of_the_cpu_before_and_after_launch() {
    let fabric = Fabric::builder()
        .accelerator("cpu")
        .devices(2)
        .build()
        .unwrap();
    assert!(fabric.tensor_device().unwrap().is_cpu());
    let done = fabric.launch_threads(|fabric| {
        let model = fabric.init_module(layer)?;
        assert_eq!(model.memory(), Some(Memory::Host));
        assert!(fabric.init_tensor((2, 3))?.device().is_cpu());
        Ok(fabric.tensor_device()?.is_cpu())
    });
    assert_eq!(done.unwrap(), [true, true]);
}

/// A model that says it is on a GPU.
struct OnGpu(CandleModel<Linear>);

impl Model for OnGpu {
    fn params(&self) -> &[ParamMeta] {
        self.0.params()
    }
    fn with(
        &self,
        param: ParamId,
        f: &mut dyn FnMut(&mut dyn Buffer) -> EngineResult<()>,
    ) -> EngineResult<()> {
        self.0.with(param, f)
    }
    fn memory(&self) -> Option<Memory> {
        Some(Memory::Cuda(1))
    }
    fn attach(&self, events: Arc<dyn Events>) {
        self.0.attach(events);
    }
}

#[test]
fn a_model_on_another_device_than_the_ranks_is_refused_at_setup_and_both_are_named() {
    let fabric = Fabric::builder()
        .accelerator("cpu")
        .devices(1)
        .build()
        .unwrap();
    let error = fabric.launch_threads(|fabric| {
        let model = OnGpu(build(&CPU, DType::F32, layer)?);
        fabric.setup(model, AdamW::new(0.1)).map(drop)
    });
    let text = error.unwrap_err().to_string();
    assert!(text.contains("the model is on cuda:1"), "{text}");
    assert!(text.contains("computes on cpu"), "{text}");
    assert!(text.contains("init_module"), "{text}");
}

// What is left of a batch of a sharded data set may be nothing.
#[test]
fn a_collective_over_no_elements_keeps_its_shape() {
    let fabric = Fabric::builder()
        .accelerator("cpu")
        .devices(2)
        .build()
        .unwrap();
    let shapes = fabric.launch_threads(|fabric| {
        let nothing = Tensor::zeros((0, 3), DType::U32, &fabric.tensor_device()?)?;
        let all = fabric.all_gather_tensor(&nothing, fabric.global_rank() == 1)?;
        Ok((all.dims().to_vec(), all.dtype()))
    });
    assert_eq!(
        shapes.unwrap(),
        [(vec![2, 0, 3], DType::U32), (vec![2, 0, 3], DType::U32)]
    );
}

#[test]
fn a_program_that_is_carried_away_has_text_to_learn_from() {
    let (train, validation) = text::load(None, 128).unwrap();
    let windows = |of: &text::Windows| fabric::data::Dataset::len(of);
    assert!(windows(&train) > 500, "{}", windows(&train));
    assert!(windows(&validation) > 50, "{}", windows(&validation));
    let entropy = text::unigram_entropy(&train);
    assert!((2.0..4.0).contains(&entropy), "{entropy}");
    let here = text::repository().expect("tests run where they were built");
    assert!(windows(&text::load(Some(&here), 128).unwrap().0) > windows(&train));
}
