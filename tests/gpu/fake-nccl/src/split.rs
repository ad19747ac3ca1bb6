//! Communicators of a part of the ranks. They meet at an id of their own, so that the end of one leaves the other be.

use std::{ffi::c_void, sync::Arc};

use fabric_engine::{Error, comm::Collectives};

use crate::{
    code::{Code, Result},
    comm::Comm,
    cuda, group,
    init::{Id, beside, is_blocking, meet},
    log,
    settings::since,
};

/// What each rank tells the others: its color, its key, and where those of its color might meet.
struct Row {
    color: i32,
    key: i32,
    id: Id,
}

impl Row {
    fn to_bytes(&self) -> Vec<u8> {
        [
            &self.color.to_le_bytes()[..],
            &self.key.to_le_bytes(),
            &self.id.0,
        ]
        .concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            color: i32::from_le_bytes(bytes.get(..4)?.try_into().ok()?),
            key: i32::from_le_bytes(bytes.get(4..8)?.try_into().ok()?),
            id: Id(bytes.get(8..136)?.try_into().ok()?),
        })
    }
}

/// Those of one color, by key, then by rank: the number of this rank among them, how many, and the first one's id.
fn place(rows: &[Row], rank: usize) -> Option<(usize, usize, Id)> {
    let color = rows.get(rank)?.color;
    let mut group: Vec<_> = (0..rows.len())
        .filter(|peer| rows[*peer].color == color)
        .collect();
    group.sort_by_key(|peer| (rows[*peer].key, *peer));
    let own = group.iter().position(|peer| *peer == rank)?;
    Some((own, group.len(), rows[group[0]].id))
}

/// The ranks tell one another where they go, and those of one color meet.
fn go(parent: &Comm, comm: Option<&Comm>, row: &Row) -> fabric_engine::Result<()> {
    let rows = {
        let mut link = parent.link();
        let gone = || Error::argument("the communicator has ended", "Split before that");
        let link = link.as_mut().ok_or_else(gone)?;
        link.communicator.all_gather_bytes(&row.to_bytes())?
    };
    let rows: Option<Vec<_>> = rows.iter().map(|bytes| Row::from_bytes(bytes)).collect();
    let found = rows.and_then(|rows| place(&rows, parent.rank()));
    let wrong = || Error::argument("a rank told no place to meet", "Split on all ranks");
    let (rank, size, id) = found.ok_or_else(wrong)?;
    if let Some(comm) = comm {
        comm.settle(rank, size);
        meet(comm, &id, id.port().map_err(|_| wrong())?);
    }
    Ok(())
}

fn split(
    parent: &Arc<Comm>,
    color: i32,
    key: i32,
    into: *mut *mut c_void,
    config: *const u8,
) -> Result {
    since(21_800)?;
    if color < -1 || into.is_null() {
        return Err(Code::ARGUMENT.because(format!("invalid color {color}")));
    }
    parent.ready()?;
    let is_blocking = match config.is_null() {
        true => parent.is_blocking,
        false => is_blocking(config)?,
    };
    let (number, rank) = (parent.number, parent.rank());
    log::note(format!(
        "ncclCommSplit comm={number} rank={rank} color={color} key={key}"
    ));
    let row = Row {
        color,
        key,
        id: Id::new()?,
    };
    let comm = match color {
        -1 => None,
        _ => Some(Comm::new(parent.context, is_blocking, cuda::event()?)),
    };
    let handle = comm.as_ref().map_or(std::ptr::null_mut(), Comm::publish);
    // SAFETY: not null, and the interface demands a place.
    unsafe { into.write(handle) };
    parent.state().splits += 1;
    let (own, new) = (parent.clone(), comm.clone());
    beside(move || {
        let result = own
            .until_idle()
            .map_err(|_| Error::argument("an operation failed", "Abort it"));
        let result = result.and_then(|()| go(&own, new.as_deref(), &row));
        if let Err(error) = &result {
            for comm in [Some(&own), new.as_ref()].into_iter().flatten() {
                comm.fail(Code::of(error), error.to_string());
            }
        }
        own.state().splits -= 1;
        own.changed.notify_all();
    })?;
    if comm.as_ref().is_some_and(group::adopt) {
        return Ok(());
    }
    let begun = [parent.begun(), comm.map_or(Ok(()), |comm| comm.begun())];
    begun.into_iter().find(Result::is_err).unwrap_or(Ok(()))
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommSplit(
    comm: *mut c_void,
    color: i32,
    key: i32,
    new: *mut *mut c_void,
    config: *const u8,
) -> i32 {
    group::member("ncclCommSplit", || {
        split(&Comm::get(comm)?, color, key, new, config)
    })
}
