//! The start of a model: all ranks prove that they hold the same plan, then take rank 0's parameters, or their slices of
//! them.

use fabric_kernels::Dtype;

use super::{ParamId, Parameters, SharedComm, layout::Layout, mains::Mains, plan::Plan};
use crate::{
    comm::{Call, Collectives, Data, Label, Op},
    error::{Error, Result},
};

const GROUP_BYTES: usize = 25 << 20; // parameters sent in one broadcast

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
/// initialisation was deferred, no rank holds more of the model than that, and the parameters of one broadcast.
///
/// # Errors
/// When a rank is gone, or a parameter refuses to be read or written.
pub fn distribute(
    plan: &Plan,
    comm: &SharedComm,
    mains: &Mains,
    params: &dyn Parameters,
) -> Result<()> {
    for (index, (dtype, layout)) in groups(plan).into_iter().enumerate() {
        let members = || layout.entries().iter().map(|(param, _)| *param);
        if comm.rank() == 0 {
            members().try_for_each(|param| params.initialize(param))?;
        } else {
            members().try_for_each(|param| params.acquire(param))?;
        }
        if comm.size() > 1 {
            broadcast(index as u32, dtype, &layout, comm, params)?;
        }
        for param in members() {
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
    }
    Ok(())
}

fn broadcast(
    index: u32,
    dtype: Dtype,
    layout: &Layout,
    comm: &SharedComm,
    params: &dyn Parameters,
) -> Result<()> {
    let mut comm = comm.lock();
    let mut slab = comm.alloc(dtype, layout.numel())?;
    if comm.rank() == 0 {
        for (param, range) in layout.entries() {
            params.with(*param, &mut |buffer| {
                buffer.read(0..range.len(), slab.part_mut(range.clone()))
            })?;
        }
    }
    let call = Call::new(Op::Broadcast { root: 0 })
        .label(Label::Params(index))
        .blocking();
    let slab = comm
        .submit(call, Data::InPlace(slab))?
        .wait()?
        .into_output();
    if comm.rank() != 0 {
        for (param, range) in layout.entries() {
            params.with(*param, &mut |buffer| {
                buffer.write(0..range.len(), slab.part(range.clone()))
            })?;
        }
    }
    Ok(())
}

/// Parameters of one dtype, about [`GROUP_BYTES`] at a time.
fn groups(plan: &Plan) -> Vec<(Dtype, Layout)> {
    let mut groups: Vec<(Dtype, Layout)> = Vec::new();
    for (index, param) in plan.params().iter().enumerate() {
        let open = groups.iter_mut().rfind(|(dtype, _)| *dtype == param.dtype);
        let full = |layout: &Layout| layout.numel() * param.dtype.size() >= GROUP_BYTES;
        match open {
            Some((_, layout)) if !full(layout) => layout.push(ParamId(index), param.numel()),
            _ => {
                let mut layout = Layout::default();
                layout.push(ParamId(index), param.numel());
                groups.push((param.dtype, layout));
            }
        }
    }
    groups
}
