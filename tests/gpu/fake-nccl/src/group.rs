//! Groups: what a thread calls between a start and its end is started together at the outermost end.

use std::{cell::RefCell, sync::Arc};

use crate::{
    code::{Code, Result},
    comm::Comm,
    log,
    settings::call,
    task::Task,
    work,
};

thread_local! {
    static GROUP: RefCell<Group> = const { RefCell::new(Group { depth: 0, parts: Vec::new(), begun: Vec::new(), wrong: None }) };
}

struct Group {
    depth: usize,
    parts: Vec<(Arc<Comm>, Vec<Task>)>,
    begun: Vec<Arc<Comm>>, // whose init, split or end was called in it
    wrong: Option<Code>,
}

/// Start an operation, or keep it for the group's end.
pub fn enqueue(comm: Arc<Comm>, task: Task) -> Result {
    let alone = GROUP.with_borrow_mut(|group| {
        if group.depth == 0 {
            return Some((comm, task));
        }
        match group
            .parts
            .iter_mut()
            .find(|(other, _)| Arc::ptr_eq(other, &comm))
        {
            Some((_, tasks)) => tasks.push(task),
            None => group.parts.push((comm, vec![task])),
        }
        None
    });
    alone.map_or(Ok(()), |(comm, task)| work::start(&comm, vec![task]))
}

/// Whether there is a group for something that was begun: its end waits for that.
pub fn adopt(comm: &Arc<Comm>) -> bool {
    GROUP.with_borrow_mut(|group| {
        if group.depth > 0 {
            group.begun.push(comm.clone());
        }
        group.depth > 0
    })
}

/// A call that fails makes its group fail.
pub fn member(name: &str, body: impl FnOnce() -> Result) -> i32 {
    let code = call(name, body);
    GROUP.with_borrow_mut(|group| {
        if group.depth > 0 && code != Code::SUCCESS && code != Code::IN_PROGRESS.0 {
            group.wrong.get_or_insert(Code(code));
        }
    });
    code
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupStart() -> i32 {
    call("ncclGroupStart", || {
        log::note("ncclGroupStart".into());
        GROUP.with_borrow_mut(|group| group.depth += 1);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupEnd() -> i32 {
    call("ncclGroupEnd", || {
        log::note("ncclGroupEnd".into());
        let ended = GROUP.with_borrow_mut(|group| {
            if group.depth == 0 {
                return Err(Code::USAGE.because("ncclGroupEnd: not in a group call."));
            }
            group.depth -= 1;
            if group.depth > 0 {
                return Ok(None);
            }
            let parts = (
                std::mem::take(&mut group.parts),
                std::mem::take(&mut group.begun),
            );
            Ok(Some((parts, group.wrong.take())))
        })?;
        let Some(((parts, begun), wrong)) = ended else {
            return Ok(());
        };
        if let Some(code) = wrong {
            return Err(code); // nothing of it is started
        }
        let mut result = Ok(());
        let mut later = |one: Result| {
            if let (Err(code), Ok(()) | Err(Code::IN_PROGRESS)) = (one, result) {
                result = Err(code);
            }
        };
        begun.iter().for_each(|comm| later(comm.begun()));
        parts
            .into_iter()
            .for_each(|(comm, tasks)| later(work::start(&comm, tasks)));
        result
    })
}
