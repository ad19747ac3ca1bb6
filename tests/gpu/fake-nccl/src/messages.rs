//! The sends and receives of one group. They do not wait for each other: in step d a rank sends to the one d further
//! on and receives from the one d before, both at once, so that every message meets its receiver in the same step.

use std::collections::VecDeque;

use fabric_engine::{
    Error,
    buffer::Slab,
    comm::{Call, Data, Op},
    kernels::Dtype,
};

use crate::{
    comm::{Comm, Link, Phase},
    task::{Kind, Task},
};

/// Both ends of one step.
struct Step<'a> {
    send: Option<(usize, &'a Task)>,
    recv: Option<(usize, &'a Task)>,
}

/// All messages of a group.
pub fn exchange(comm: &Comm, link: &mut Link, tasks: &[&Task]) -> Result<(), Error> {
    let of = |wanted: Kind| -> VecDeque<&Task> {
        tasks
            .iter()
            .copied()
            .filter(|task| task.kind == wanted)
            .collect()
    };
    for distance in 0..comm.size() {
        let to = (comm.rank() + distance) % comm.size();
        let from = (comm.rank() + comm.size() - distance) % comm.size();
        let (mut sends, mut recvs) = (of(Kind::Send(to)), of(Kind::Recv(from)));
        while !sends.is_empty() || !recvs.is_empty() {
            let step = Step {
                send: sends.pop_front().map(|task| (to, task)),
                recv: recvs.pop_front().map(|task| (from, task)),
            };
            match distance {
                0 => step.within(comm)?,
                _ => step.between(comm, link)?,
            }
        }
    }
    Ok(())
}

impl Step<'_> {
    /// From this rank to itself.
    fn within(&self, comm: &Comm) -> Result<(), Error> {
        match (self.send, self.recv) {
            (Some((_, send)), Some((_, recv))) => {
                agree(comm, head(send).as_slice(), recv, comm.rank())?;
                recv.write(&send.read(send.numel));
                Ok(())
            }
            _ => Err(Error::argument(
                format!(
                    "rank {} sends to itself without receiving, or the reverse",
                    comm.rank()
                ),
                "Call both in one group",
            )),
        }
    }

    /// First what the message is, then the message.
    fn between(&self, comm: &Comm, link: &mut Link) -> Result<(), Error> {
        let announced = self.pass(link, head, |_| Ok(Slab::zeroed(Dtype::U64, 2)))?;
        if let (Some(announced), Some((peer, task))) = (announced, self.recv) {
            agree(comm, announced.as_slice(), task, peer)?;
        }
        let message = self.pass(
            link,
            |task| bytes(task.read(task.numel)),
            |task| Ok(Slab::zeroed(Dtype::U8, task.numel * task.dtype.size())),
        )?;
        if let (Some(message), Some((_, task))) = (message, self.recv)
            && comm.state().phase != Phase::Aborted
        {
            task.write(&message);
        }
        Ok(())
    }

    fn pass(
        &self,
        link: &mut Link,
        out: impl Fn(&Task) -> Slab,
        room: impl Fn(&Task) -> Result<Slab, Error>,
    ) -> Result<Option<Slab>, Error> {
        let (op, data) = match (self.send, self.recv) {
            (Some((to, send)), Some((from, recv))) => {
                let data = Data::Out {
                    from: out(send),
                    into: room(recv)?,
                };
                (Op::SendRecv { to, from }, data)
            }
            (Some((to, send)), None) => (Op::Send { to }, Data::InPlace(out(send))),
            (None, Some((from, recv))) => (Op::Recv { from }, Data::InPlace(room(recv)?)),
            (None, None) => return Ok(None),
        };
        let slab = link
            .communicator
            .submit(Call::new(op).blocking(), data)?
            .wait()?
            .into_output();
        Ok(self.recv.map(|_| slab))
    }
}

/// What a message is: its dtype's code and its elements.
fn head(task: &Task) -> Slab {
    Slab::from_slice(&[u64::from(task.dtype.code()), task.numel as u64])
}

fn bytes(slab: Slab) -> Slab {
    slab.recast(Dtype::U8)
}

fn agree(comm: &Comm, theirs: &[u64], task: &Task, peer: usize) -> Result<(), Error> {
    let head = head(task);
    let ours: &[u64] = head.as_slice();
    if ours == theirs {
        return Ok(());
    }
    let words = |head: &[u64]| {
        let dtype = u8::try_from(head[0]).ok().and_then(Dtype::from_code);
        format!("{} x {}", head[1], dtype.map_or("?", Dtype::name))
    };
    Err(Error::Diverged {
        rank: comm.rank(),
        peer,
        ours: format!("ncclRecv of {}", words(ours)),
        theirs: format!("ncclSend of {}", words(theirs)),
    })
}
