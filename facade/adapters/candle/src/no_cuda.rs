//! What stands where CUDA's memory would be in a build without it: there is none, and to ask for some is an error.

use std::{
    convert::Infallible,
    marker::PhantomData,
    ops::{Deref, Range},
    sync::Arc,
};

use candle_core::{CudaDevice, CudaStorage, Device, Error, Result, Storage};
use fabric_engine::{
    buffer::Buffer,
    kernels::{Device as Kernels, Dtype, Span, SpanMut},
};

pub(crate) fn mark(_: &CudaDevice) -> Result<CudaStorage> {
    Err(Error::NotCompiledWithCudaSupport)
}

pub(crate) fn queue(_: &CudaDevice) -> Result<Arc<dyn Kernels>> {
    Err(Error::NotCompiledWithCudaSupport)
}

pub(crate) fn tensor_device(_: usize) -> Result<Device> {
    Err(Error::NotCompiledWithCudaSupport)
}

pub(crate) struct Lent<S>(Infallible, PhantomData<S>);

impl<S: Deref<Target = Storage>> Lent<S> {
    pub(crate) fn new(_: S, _: Range<usize>, _: Dtype) -> Result<Self> {
        Err(Error::NotCompiledWithCudaSupport)
    }

    pub(crate) fn span(&self) -> Span<'_> {
        match self.0 {}
    }
}

pub(crate) struct Open<'a>(Infallible, PhantomData<&'a mut CudaStorage>);

impl<'a> Open<'a> {
    pub(crate) fn new(_: &'a mut CudaStorage, _: Range<usize>, _: Dtype) -> Result<Self> {
        Err(Error::NotCompiledWithCudaSupport)
    }
}

impl Buffer for Open<'_> {
    fn dtype(&self) -> Dtype {
        match self.0 {}
    }
    fn numel(&self) -> usize {
        match self.0 {}
    }
    fn span(&self) -> Option<Span<'_>> {
        match self.0 {}
    }
    fn span_mut(&mut self) -> Option<SpanMut<'_>> {
        match self.0 {}
    }
}
