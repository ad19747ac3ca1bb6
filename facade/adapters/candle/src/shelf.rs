//! The parameters of one model: which there are, where their memory is, and where their gradients are reported.

use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use candle_core::{
    DType, Device, DeviceLocation, Error as CandleError, Result, Storage, Tensor, Var, bail,
};
use candle_nn::Init;
use fabric::model::{Events, ParamId, ParamMeta, UnitId};
use fabric_engine::{
    Error, Result as EngineResult,
    buffer::Buffer,
    kernels::{Device as Kernels, Memory},
};

use crate::{
    away, cuda,
    hook::{Outlet, hooked},
    init::First,
    pool::Pool,
    storage::{Visit, check_device, on_cpu, open, put, span_of, take},
};

pub(crate) struct Shelf {
    device: Device,
    _queue: Option<Arc<dyn Kernels>>, // over the device's stream: it stays the same one
    params: Mutex<Vec<Param>>,
    units: Mutex<Vec<String>>, // names, in the order in which they were declared
    pool: Mutex<Pool>,
    pub(crate) outlet: Outlet,
    closed: AtomicBool, // the model is built: no further parameter
    lent: AtomicBool,   // the variables have the memory
    away: AtomicUsize,  // parameters without memory
    came_and_went: AtomicBool,
    last_unit: AtomicUsize, // whose forward began last
}

/// One parameter: the shell that candle's optimizers know, and the hooked tensor that has the memory.
#[derive(Clone)]
pub(crate) struct Param {
    pub(crate) meta: ParamMeta,
    pub(crate) var: Var,
    pub(crate) tensor: Tensor,
    pub(crate) tied: bool, // its name was asked for again
    is_there: bool,        // it has memory
    first: Option<First>,  // the values that it never had yet
}

impl Shelf {
    /// For parameters on `device`.
    pub(crate) fn new(device: &Device) -> Result<Self> {
        check_device(device)?;
        let queue = match device {
            Device::Cuda(device) => Some(cuda::queue(device)?),
            _ => None,
        };
        Ok(Self {
            device: device.clone(),
            _queue: queue,
            params: Mutex::default(),
            units: Mutex::default(),
            pool: Mutex::default(),
            outlet: Outlet::default(),
            closed: AtomicBool::default(),
            lent: AtomicBool::default(),
            away: AtomicUsize::default(),
            came_and_went: AtomicBool::default(),
            last_unit: AtomicUsize::default(),
        })
    }

    /// The device of all parameters.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Where their memory is.
    pub(crate) fn memory(&self) -> Memory {
        match self.device.location() {
            DeviceLocation::Cuda { gpu_id } => Memory::Cuda(gpu_id as u32),
            _ => Memory::Host,
        }
    }

    pub(crate) fn params(&self) -> MutexGuard<'_, Vec<Param>> {
        lock(&self.params)
    }

    pub(crate) fn units(&self) -> MutexGuard<'_, Vec<String>> {
        lock(&self.units)
    }

    /// No further parameter, and no further unit.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// What the model reports to, once it is set up.
    pub(crate) fn events(&self) -> Option<&Arc<dyn Events>> {
        self.outlet.get()
    }

    /// Whether parameters come and go. Once they did they are expected to, also in a pass in which all are there.
    pub(crate) fn comes_and_goes(&self) -> bool {
        if self.away.load(Ordering::Acquire) > 0 {
            self.came_and_went.store(true, Ordering::Release);
        }
        self.came_and_went.load(Ordering::Acquire)
    }

    /// The forward of a unit begins, and with the first of them a pass.
    pub(crate) fn begin(&self, unit: UnitId) {
        let last = self.last_unit.swap(unit.0, Ordering::AcqRel);
        if unit.0 <= last {
            lock(&self.pool).begin_pass();
        }
    }

    /// The error, explained if it comes from a parameter without memory.
    pub(crate) fn explain(&self, error: CandleError) -> CandleError {
        match self.absent() {
            Some(absent) => away::explain(error, || format!("{absent}. {}", away::HINT)),
            None => error,
        }
    }

    /// Which parameters have no memory, in words; `None` when all have.
    fn absent(&self) -> Option<String> {
        let params = self.params();
        let mut away = params.iter().filter(|param| !param.is_there);
        let first = &away.next()?.meta.name;
        Some(match away.count() {
            0 => format!("'{first}' has no memory now"),
            more => format!("'{first}' and {more} more parameters have no memory now"),
        })
    }

    /// Refuse what needs the memory of all parameters.
    pub(crate) fn need_all(&self) -> EngineResult<()> {
        match self.absent() {
            None => Ok(()),
            Some(absent) => Err(Error::argument(
                absent,
                "Variables of candle's need whole parameters: make the model by fabric_candle::build, and use a strategy that \
                 keeps parameters whole, or fabric::optim's optimizers and fabric.save",
            )),
        }
    }
}

/// Memory that comes and goes.
impl Shelf {
    /// Call `f` with a parameter's memory.
    pub(crate) fn with(&self, id: ParamId, f: &mut Visit<'_>) -> EngineResult<()> {
        let tensor = {
            let param = &self.unlent(id)?[id.0];
            if !param.is_there {
                let name = &param.meta.name;
                return Err(match param.first {
                    Some(_) => Error::argument(
                        format!("'{name}' has no values yet: its initialisation was deferred"),
                        "Call fabric.setup first",
                    ),
                    None => Error::argument(
                        format!("'{name}' gave up its memory: its values are in shards"),
                        "Acquire it and write them into it first",
                    ),
                });
            }
            param.tensor.clone()
        };
        open(&tensor, f)
    }

    /// Give a parameter that never had values memory and its first ones; nothing for any other.
    pub(crate) fn initialize(&self, id: ParamId) -> EngineResult<()> {
        self.fill(&mut self.unlent(id)?[id.0])
    }

    /// Give a parameter memory, whose values are undefined; nothing when it has some.
    pub(crate) fn acquire(&self, id: ParamId) -> EngineResult<()> {
        let mut params = self.unlent(id)?;
        let param = &mut params[id.0];
        self.arrive(param)
            .map_err(|error| refused("find memory for", &param.meta, error))
    }

    /// Keep a parameter's memory for another; nothing when it has none.
    pub(crate) fn release(&self, id: ParamId) -> EngineResult<()> {
        let mut params = self.unlent(id)?;
        let param = &mut params[id.0];
        if !param.is_there {
            return Ok(());
        }
        let memory = take(&param.tensor)
            .map_err(|error| refused("take the memory of", &param.meta, error))?;
        (param.is_there, param.first) = (false, None);
        self.away.fetch_add(1, Ordering::AcqRel);
        lock(&self.pool).give(memory, param.meta.numel());
        Ok(())
    }

    /// A new parameter, which has its first values, unless they are deferred: what the model computes with.
    pub(crate) fn add(
        &self,
        meta: ParamMeta,
        dtype: DType,
        init: Init,
        deferred: bool,
    ) -> EngineResult<Tensor> {
        let mut params = self.params();
        let id = ParamId(params.len());
        let (var, tensor) = hooked(&self.device, &meta.shape, dtype, id, self.outlet.clone())
            .map_err(|error| refused("make", &meta, error))?;
        let mut param = Param {
            meta,
            var,
            tensor: tensor.clone(),
            tied: false,
            is_there: false,
            first: Some(First::new(init)),
        };
        self.away.fetch_add(1, Ordering::AcqRel);
        if !deferred {
            self.fill(&mut param)?;
        }
        params.push(param);
        Ok(tensor)
    }

    fn fill(&self, param: &mut Param) -> EngineResult<()> {
        let Some(first) = param.first else {
            return Ok(());
        };
        self.arrive(param)
            .and_then(|()| draw(first, param))
            .map_err(|error| refused("initialise", &param.meta, error))?;
        param.first = None;
        Ok(())
    }

    fn arrive(&self, param: &mut Param) -> Result<()> {
        if param.is_there {
            return Ok(());
        }
        let (dtype, len) = (param.tensor.dtype(), param.meta.numel());
        let memory = lock(&self.pool).take(&self.device, dtype, len)?;
        put(&param.tensor, memory)?;
        param.is_there = true;
        self.away.fetch_sub(1, Ordering::AcqRel);
        Ok(())
    }

    /// The parameters, unless their variables have the memory.
    fn unlent(&self, id: ParamId) -> EngineResult<MutexGuard<'_, Vec<Param>>> {
        let params = self.params();
        if self.lent.load(Ordering::Acquire) {
            let name = &params[id.0].meta.name;
            return Err(Error::argument(
                format!("'{name}' is wanted while its variable has its memory"),
                "Save, load, clip and step outside with_vars",
            ));
        }
        Ok(params)
    }

    /// Run `f` while the variables hold their memory.
    pub(crate) fn with_vars<T>(&self, f: impl FnOnce(&[Param]) -> Result<T>) -> Result<T> {
        self.need_all().map_err(crate::away::wrapped)?;
        if self.lent.swap(true, Ordering::AcqRel) {
            bail!(
                "the variables have their memory already: with_vars, or a step of candle's optimizer, ran inside with_vars"
            );
        }
        let params = self.params().clone();
        let mut lent = Lending {
            shelf: self,
            params: &params,
            moved: 0,
        };
        for param in &params {
            put(&param.var, take(&param.tensor)?)?;
            lent.moved += 1;
        }
        let result = f(&params);
        drop(lent);
        result
    }
}

/// Write the first values of a parameter into its memory. They are drawn by the processor, so that they are the same bits
/// on every device.
fn draw(first: First, param: &Param) -> Result<()> {
    let (name, shape) = (&param.meta.name, param.tensor.shape());
    if !param.tensor.device().is_cpu() {
        let mut drawn = on_cpu(param.tensor.dtype(), shape.elem_count())?;
        first.fill(&mut drawn, name, shape)?;
        let all = 0..shape.elem_count();
        let Some(values) = span_of(&drawn, all.clone()) else {
            bail!("values of type {:?}", param.tensor.dtype());
        };
        let write = &mut |buffer: &mut dyn Buffer| buffer.write(all.clone(), values);
        return open(&param.tensor, write).map_err(away::wrapped);
    }
    let mut memory = take(&param.tensor)?;
    let filled = match &mut memory {
        Storage::Cpu(memory) => first.fill(memory, name, shape),
        _ => bail!("'{name}' has memory of another device"),
    };
    put(&param.tensor, memory)?;
    filled
}

/// Gives the memory back to the hooked tensors, also when `f` panics.
struct Lending<'a> {
    shelf: &'a Shelf,
    params: &'a [Param],
    moved: usize,
}

impl Drop for Lending<'_> {
    fn drop(&mut self) {
        for param in &self.params[..self.moved] {
            let back = take(&param.var).and_then(|memory| put(&param.tensor, memory));
            back.expect("memory that was moved out of a tensor moves back into it");
        }
        self.shelf.lent.store(false, Ordering::Release);
    }
}

fn refused(doing: &str, meta: &ParamMeta, error: CandleError) -> Error {
    Error::library(format!("{doing} '{}'", meta.name), error)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is made after what can fail.
    mutex.lock().unwrap_or_else(|held| held.into_inner())
}
