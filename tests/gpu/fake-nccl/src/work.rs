//! What is put into streams, and what happens when its turn comes.

use std::sync::{Arc, atomic::Ordering};

use fabric_engine::comm::{Call, Data, Op};

use crate::{
    code::{Code, Result},
    comm::{Comm, Link, Phase},
    cuda, messages,
    settings::hangs,
    task::{Kind, Task},
};

/// Start the operations of one group on one communicator: now, or when it was asked for often enough.
pub fn start(comm: &Arc<Comm>, tasks: Vec<Task>) -> Result {
    if comm.is_blocking {
        return launch(comm, tasks);
    }
    comm.state().deferred = Some(tasks);
    comm.begun()
}

/// Put them into their streams.
pub fn launch(comm: &Arc<Comm>, tasks: Vec<Task>) -> Result {
    let mut streams = Vec::new();
    for task in &tasks {
        if !streams.contains(&task.stream) {
            streams.push(task.stream);
        }
    }
    let mut state = comm.state();
    let is_first = state.launched == 0;
    state.launched += 1;
    state.in_flight += 1;
    drop(state);
    let own = comm.clone();
    let body = Box::new(move || {
        let _turn = Turn(&own);
        run(&own, &tasks);
    });
    let launched = cuda::within(comm.context, || {
        cuda::launch(&streams, comm.done, !is_first, body)
    });
    if launched.is_err() {
        comm.state().in_flight -= 1;
    }
    launched
}

/// The end of a turn.
struct Turn<'a>(&'a Comm);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.state().in_flight -= 1;
        self.0.changed.notify_all();
    }
}

/// On the stream's thread. What fails stays in the stream until the communicator is aborted, as a kernel that waits for
/// a peer does.
fn run(comm: &Comm, tasks: &[Task]) {
    for _ in tasks {
        let number = comm.started.fetch_add(1, Ordering::AcqRel) + 1;
        if hangs(comm.rank(), number) {
            return comm.until_aborted();
        }
    }
    if comm.state().phase == Phase::Aborted {
        return;
    }
    let mut link = comm.link();
    let Some(link) = &mut *link else {
        return;
    };
    let is_message = |task: &&Task| matches!(task.kind, Kind::Send(_) | Kind::Recv(_));
    let (sent, collective): (Vec<&Task>, Vec<&Task>) = tasks.iter().partition(is_message);
    let result = (collective
        .into_iter()
        .try_for_each(|task| exchange(comm, link, task)))
    .and_then(|()| messages::exchange(comm, link, &sent));
    if let Err(error) = result {
        comm.fail(Code::of(&error), error.to_string());
        comm.until_aborted();
    }
}

/// A collective.
fn exchange(comm: &Comm, link: &mut Link, task: &Task) -> fabric_engine::Result<()> {
    let (rank, size) = (comm.rank(), comm.size());
    let (from, into) = task.sizes(rank, size);
    let op = match task.kind {
        Kind::AllReduce(op) => Op::AllReduce(op),
        Kind::ReduceScatter(op) => Op::ReduceScatter(op),
        Kind::AllGather => Op::AllGather,
        Kind::Broadcast(root) => Op::Broadcast { root },
        Kind::Reduce(op, root) => Op::Reduce { op, root },
        Kind::AllToAll => Op::AllToAll,
        Kind::Send(_) | Kind::Recv(_) => return Ok(()),
    };
    let data = match task.kind {
        Kind::AllReduce(_) | Kind::Reduce(..) => Data::InPlace(task.read(from)),
        Kind::Broadcast(root) if root == rank => Data::InPlace(task.read(from)),
        Kind::Broadcast(_) => Data::InPlace(link.communicator.alloc(task.dtype, into)?),
        _ => Data::Out {
            from: task.read(from),
            into: link.communicator.alloc(task.dtype, into)?,
        },
    };
    let output = link
        .communicator
        .submit(Call::new(op).blocking(), data)?
        .wait()?
        .into_output();
    if into > 0 && comm.state().phase != Phase::Aborted {
        task.write(&output);
    }
    Ok(())
}
