//! Events: marks in a stream, which others wait for.

use std::{
    sync::{Arc, Condvar, Mutex},
    time::Instant,
};

use crate::{
    code::{Code, Result},
    driver::within,
    outside::Out,
    registry::{Handle, Registry, lock},
};

const DISABLE_TIMING: u32 = 2;

static EVENTS: Registry<Event> = Registry::new();

/// An event.
struct Event {
    device: i32,
    has_time: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    recorded: u64, // how often
    reached: u64,  // the last of them
    at: Option<Instant>,
}

impl Event {
    fn reach(&self, turn: u64) {
        let mut state = lock(&self.state);
        if state.reached < turn {
            state.reached = turn;
            state.at = Some(Instant::now());
        }
        self.changed.notify_all();
    }

    fn wait(&self, turn: u64) {
        let state = lock(&self.state);
        let state = self.changed.wait_while(state, |state| state.reached < turn);
        drop(state.unwrap_or_else(|held| held.into_inner()));
    }

    fn time(&self) -> Result<Instant> {
        let state = lock(&self.state);
        match state.at {
            _ if !self.has_time || state.recorded == 0 => Err(Code::INVALID_HANDLE),
            Some(at) if state.reached == state.recorded => Ok(at),
            _ => Err(Code::NOT_READY),
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(event: Out<Handle>, flags: u32) -> i32 {
    within("cuEventCreate", |context| {
        if flags & !7 != 0 {
            return Err(Code::INVALID_VALUE);
        }
        event.give(EVENTS.add(Arc::new(Event {
            device: context.device,
            has_time: flags & DISABLE_TIMING == 0,
            state: Mutex::default(),
            changed: Condvar::new(),
        })))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: Handle) -> i32 {
    within("cuEventDestroy_v2", |_| EVENTS.remove(event).map(drop))
}

fn record(name: &str, event: Handle, stream: Handle) -> i32 {
    within(name, |context| {
        let (event, stream) = (EVENTS.get(event)?, context.stream(stream)?);
        if event.device != stream.device {
            return Err(Code::INVALID_HANDLE);
        }
        let mut state = lock(&event.state);
        state.recorded += 1;
        let turn = state.recorded;
        drop(state);
        context.mark(&stream, move || event.reach(turn));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> i32 {
    record("cuEventRecord", event, stream)
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecordWithFlags(event: Handle, stream: Handle, _flags: u32) -> i32 {
    record("cuEventRecordWithFlags", event, stream)
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: u32) -> i32 {
    within("cuStreamWaitEvent", |context| {
        let (event, stream) = (EVENTS.get(event)?, context.stream(stream)?);
        let turn = lock(&event.state).recorded; // what is recorded later is not waited for
        context.mark(&stream, move || event.wait(turn));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: Handle) -> i32 {
    within("cuEventSynchronize", |context| {
        let event = EVENTS.get(event)?;
        let turn = lock(&event.state).recorded;
        event.wait(turn);
        context.check()
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: Handle) -> i32 {
    within("cuEventQuery", |_| {
        let event = EVENTS.get(event)?;
        let state = lock(&event.state);
        match state.reached == state.recorded {
            true => Ok(()),
            false => Err(Code::NOT_READY),
        }
    })
}

fn elapsed(name: &str, ms: &Out<f32>, start: Handle, end: Handle) -> i32 {
    within(name, |_| {
        let (start, end) = (EVENTS.get(start)?.time()?, EVENTS.get(end)?.time()?);
        let forward = end.saturating_duration_since(start).as_secs_f32();
        let backward = start.saturating_duration_since(end).as_secs_f32();
        ms.give((forward - backward) * 1e3)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime(ms: Out<f32>, start: Handle, end: Handle) -> i32 {
    elapsed("cuEventElapsedTime", &ms, start, end)
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime_v2(ms: Out<f32>, start: Handle, end: Handle) -> i32 {
    elapsed("cuEventElapsedTime_v2", &ms, start, end)
}
