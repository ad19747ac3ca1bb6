//! The start of a replicated model: all ranks prove that they hold the same plan, then take rank 0's parameters.

use fabric_kernels::Dtype;

use super::{ParamId, SharedComm, layout::Layout, plan::Plan};
use crate::{
    buffer::{Buffer, Slab},
    comm::{Call, Collectives, Data, Label, Op},
    error::{Error, Result},
};

const GROUP_BYTES: usize = 25 << 20; // parameters sent in one broadcast

/// How a parameter is reached: calls back with its buffer.
pub type WithParam<'a> =
    dyn FnMut(ParamId, &mut dyn FnMut(&mut dyn Buffer) -> Result<()>) -> Result<()> + 'a;

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

/// Give every rank rank 0's parameters, frozen ones too.
///
/// # Errors
/// When a rank is gone, or a parameter refuses to be read or written.
pub fn broadcast(plan: &Plan, comm: &SharedComm, with: &mut WithParam<'_>) -> Result<()> {
    let mut comm = comm.lock();
    for (index, (dtype, layout)) in groups(plan).into_iter().enumerate() {
        let mut slab = comm.alloc(dtype, layout.numel())?;
        if comm.rank() == 0 {
            each(&layout, &mut slab, with, &mut |buffer, slab, range| {
                buffer.read(0..range.len(), slab.part_mut(range))
            })?;
        }
        let call = Call::new(Op::Broadcast { root: 0 })
            .label(Label::Params(index as u32))
            .blocking();
        let mut slab = comm
            .submit(call, Data::InPlace(slab))?
            .wait()?
            .into_output();
        if comm.rank() != 0 {
            each(&layout, &mut slab, with, &mut |buffer, slab, range| {
                buffer.write(0..range.len(), slab.part(range))
            })?;
        }
    }
    Ok(())
}

type Visit<'a> = dyn FnMut(&mut dyn Buffer, &mut Slab, std::ops::Range<usize>) -> Result<()> + 'a;

fn each(
    layout: &Layout,
    slab: &mut Slab,
    with: &mut WithParam<'_>,
    visit: &mut Visit<'_>,
) -> Result<()> {
    for (param, range) in layout.entries() {
        with(*param, &mut |buffer| visit(buffer, slab, range.clone()))?;
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
