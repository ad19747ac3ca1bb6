//! The start of a model: all ranks prove that they hold the same plan, then take rank 0's parameters, or their slices of
//! them.

use fabric_kernels::Dtype;

use super::{ParamId, ParamMeta, Parameters, SharedComm, mains::Mains, plan::Plan};
use crate::{
    buffer::Slab,
    comm::{Call, Collectives, Data, Label, Op},
    error::{Error, Result},
};

const PARCEL_BYTES: usize = 4 << 20; // of a parameter, sent in one broadcast

/// Compare the plans of all ranks.
///
/// # Errors
/// When another rank's plan differs from rank 0's: says where.
pub fn agree(plan: &Plan, comm: &SharedComm) -> Result<()> {
    let mut comm = comm.lock();
    let rank = comm.rank();
    let mut hash = vec![plan.hash()];
    let hashes = comm.all_gather(&hash.as_mut_slice())?;
    if hashes
        .as_slice::<u64>()
        .iter()
        .all(|other| *other == hash[0])
    {
        return Ok(());
    }
    let facts = comm.all_gather_bytes(plan.facts().join("\n").as_bytes())?;
    let facts = facts
        .iter()
        .map(|text| String::from_utf8_lossy(text))
        .collect::<Vec<_>>();
    let other = (1..facts.len())
        .find(|other| facts[*other] != facts[0])
        .unwrap_or(rank);
    let mut pairs = lines(&facts[0]).zip(lines(&facts[other]));
    let (ours, theirs) = pairs
        .find(|(ours, theirs)| ours != theirs)
        .unwrap_or(("the same", "the same"));
    Err(Error::model(
        rank,
        format!(
            "rank 0 and rank {other} set up different models: rank 0 has {ours}, rank {other} has {theirs}"
        ),
        "Build the same model with the same options on all ranks",
    ))
}

/// The lines of a text, then "nothing more" for ever.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    let count = text.lines().count();
    text.lines().chain(std::iter::repeat_n(
        "nothing more",
        100_000 - count.min(100_000),
    ))
}

/// Give every rank rank 0's parameters, frozen ones too: whole, or its slice of them, which it keeps in `mains`. Where
/// initialisation was deferred, no rank ever holds more of the model than that, and one parameter.
///
/// # Errors
/// When a rank is gone, or a parameter refuses to be read or written.
pub fn distribute(
    plan: &Plan,
    comm: &SharedComm,
    mains: &Mains,
    params: &dyn Parameters,
) -> Result<()> {
    let largest = plan
        .params()
        .iter()
        .map(|param| param.numel() * param.dtype.size());
    let mut parcel = Parcel::new(comm, largest.max().unwrap_or(0))?;
    for (index, meta) in plan.params().iter().enumerate() {
        let param = ParamId(index);
        match comm.rank() {
            0 => params.initialize(param)?,
            _ => params.acquire(param)?,
        }
        if comm.size() > 1 {
            parcel.broadcast(param, meta, params)?;
        }
        let Some((bucket, entry)) = plan.place(param) else {
            continue;
        };
        if let Some(piece) = plan.part(bucket, entry, comm.rank()) {
            mains.load(plan, &piece, params)?;
        }
        if plan.buckets()[bucket].axis.shards_param() {
            params.release(param)?;
        }
    }
    Ok(())
}

/// Memory in which parameters travel from rank 0, a piece at a time.
struct Parcel<'a> {
    comm: &'a SharedComm,
    slab: Option<Slab>, // bytes; away while they travel
}

impl<'a> Parcel<'a> {
    fn new(comm: &'a SharedComm, largest_bytes: usize) -> Result<Self> {
        let bytes = match comm.size() {
            1 => 0,
            _ => largest_bytes.min(PARCEL_BYTES),
        };
        Ok(Self {
            comm,
            slab: Some(comm.lock().alloc(Dtype::U8, bytes)?),
        })
    }

    fn broadcast(
        &mut self,
        param: ParamId,
        meta: &ParamMeta,
        params: &dyn Parameters,
    ) -> Result<()> {
        let chunk = (PARCEL_BYTES / meta.dtype.size()).max(1);
        for start in (0..meta.numel()).step_by(chunk) {
            let range = start..meta.numel().min(start + chunk);
            let block = self.slab.take().expect("the parcel is here between calls");
            let (slab, rest) = block.split_at(range.len() * meta.dtype.size());
            let mut slab = slab.recast(meta.dtype);
            let all = 0..range.len();
            if self.comm.rank() == 0 {
                params.with(param, &mut |buffer| {
                    buffer.read(range.clone(), slab.part_mut(all.clone()))
                })?;
            }
            let call = Call::new(Op::Broadcast { root: 0 })
                .label(Label::Params(param.0 as u32))
                .blocking();
            let work = self.comm.lock().submit(call, Data::InPlace(slab))?;
            let slab = work.wait()?.into_output();
            if self.comm.rank() != 0 {
                params.with(param, &mut |buffer| {
                    buffer.write(range.clone(), slab.part(all.clone()))
                })?;
            }
            let block = Slab::join(slab.recast(Dtype::U8), rest);
            self.slab = Some(block.expect("both parts are of one block"));
        }
        Ok(())
    }
}
