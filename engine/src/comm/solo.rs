//! A world of one: every collective is the identity or one multiplication, done at once on the caller's thread.

use std::sync::Arc;

use fabric_kernels::{self as kernels, Device, Dtype};

use super::{
    Aborter, Call, Communicator, Data, Op, Rank, ReduceOp, Spent, Work,
    host::check_shapes,
    trace::{Event, Trace},
};
use crate::{
    buffer::Slab,
    clock::Clock,
    error::{Error, Result},
    signal::Signal,
};

/// The communicator of a single rank.
pub struct Solo {
    signal: Signal,
    trace: Trace,
    spent: Spent,
    sequence: u64,
    device: Option<Arc<dyn Device>>,
}

impl Solo {
    /// A world of one.
    pub fn new(clock: Clock) -> Self {
        Self::on(None, clock)
    }

    /// A world of one whose memory is the device's.
    pub fn on(device: Option<Arc<dyn Device>>, clock: Clock) -> Self {
        Self {
            device,
            signal: Signal::new(),
            trace: Trace::new(clock),
            spent: Spent::default(),
            sequence: 0,
        }
    }
}

impl Communicator for Solo {
    fn rank(&self) -> Rank {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn alloc(&self, dtype: Dtype, numel: usize) -> Result<Slab> {
        let slab = Slab::zeroed_on(self.device.as_ref(), dtype, numel);
        slab.map_err(Error::kernel(0, "allocate memory"))
    }

    fn device(&self) -> Option<Arc<dyn Device>> {
        self.device.clone()
    }

    fn alloc_host(&self, dtype: Dtype, numel: usize) -> Result<Slab> {
        Ok(Slab::zeroed(dtype, numel))
    }

    fn submit(&mut self, call: Call, data: Data) -> Result<Work> {
        self.signal.check()?;
        let shape = check_shapes(0, 1, &call, &data)?;
        let sequence = self.sequence;
        self.sequence += 1;
        let bytes = shape.numel * shape.dtype.size();
        let op = call.op.code().0.name();
        self.trace.note(Event::Submitted {
            sequence,
            label: call.label,
            op,
            bytes,
        });
        let result = alone(&call, data);
        self.spent.collectives += 1;
        self.trace.note(Event::Completed { sequence });
        Ok(Work::done(result))
    }

    fn split(&mut self, _color: u32, _key: u32) -> Result<Box<dyn Communicator>> {
        Ok(Box::new(Self {
            signal: self.signal.clone(),
            trace: self.trace.clone(),
            spent: Spent::default(),
            sequence: 0,
            device: self.device.clone(),
        }))
    }

    fn aborter(&self) -> Aborter {
        Aborter {
            rank: 0,
            signal: self.signal.clone(),
            control: None,
        }
    }

    fn price(&self, _call: &Call, _dtype: Dtype, _numel: usize) -> Spent {
        Spent {
            collectives: 1,
            ..Spent::default()
        }
    }

    fn spent(&self) -> Spent {
        self.spent
    }

    fn trace(&self) -> Trace {
        self.trace.clone()
    }
}

/// Memory for as much as `slab` holds, where it lies.
fn beside(slab: &Slab) -> Result<Slab> {
    let fresh = Slab::zeroed_on(slab.device(), slab.dtype(), slab.numel());
    fresh.map_err(Error::kernel(0, "allocate memory"))
}

fn alone(call: &Call, data: Data) -> Result<Data> {
    let error = || Error::kernel(0, call.op.code().0.name());
    match (data, call.op.reduce()) {
        (Data::InPlace(slab), Some(ReduceOp::PreMulSum(factor))) => {
            let mut into = beside(&slab)?;
            let all = 0..slab.numel();
            kernels::cast_scaled(slab.part(all.clone()), into.part_mut(all), factor)
                .map_err(error())?;
            Ok(Data::InPlace(into))
        }
        (Data::Many(mut slabs), Some(ReduceOp::PreMulSum(factor))) => {
            for slab in &mut slabs {
                let all = 0..slab.numel();
                if slab.dtype().is_float() {
                    kernels::scale(slab.part_mut(all), factor).map_err(error())?;
                } else {
                    let from = slab.part(all.clone());
                    let mut into = beside(slab)?;
                    kernels::cast_scaled(from, into.part_mut(all), factor).map_err(error())?;
                    *slab = into;
                }
            }
            Ok(Data::Many(slabs))
        }
        (Data::Out { from, mut into }, reduce) if call.op != Op::Barrier => {
            let all = 0..into.numel();
            let (source, target) = (from.part(all.clone()), into.part_mut(all));
            match reduce {
                Some(ReduceOp::PreMulSum(factor)) => kernels::cast_scaled(source, target, factor),
                _ => kernels::cast(source, target),
            }
            .map_err(error())?;
            Ok(Data::Out { from, into })
        }
        (data, _) => Ok(data),
    }
}
