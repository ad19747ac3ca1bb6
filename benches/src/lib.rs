//! What the benchmarks share: ranks as threads that have joined one job, models without anybody behind them, other programs
//! run beside, and the program `coll`.

pub mod beside;
pub mod coll;

use std::{
    net::{Ipv4Addr, TcpListener},
    sync::{Arc, Mutex},
};

use fabric::model::{Edge, Events, Keep, ParamId, UnitId};
use fabric_engine::{
    Result,
    buffer::Buffer,
    rendezvous::{Member, Options, Secret},
};

/// Run `body` on `world` threads, each a member of one job; returns rank 0's value.
///
/// # Errors
/// The first rank's that failed.
pub fn ranks<T: Send>(
    world: usize,
    body: impl Fn(&Arc<Member>) -> Result<T> + Sync,
) -> fabric::Result<T> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (address, listener) = (listener.local_addr()?, Mutex::new(Some(listener)));
    let secret = Secret::from_bytes(Secret::random_text()?.as_bytes());
    let mut values =
        fabric::launch::threads::run(world, fabric::launch::threads::STACK_BYTES, |rank| {
            let options = Options::new(rank, world, address, secret.clone());
            let held = listener
                .lock()
                .unwrap_or_else(|held| held.into_inner())
                .take_if(|_| rank == 0);
            let member = match held {
                Some(listener) => Member::host(options, listener)?,
                None => Member::join(options)?,
            };
            Ok(body(&Arc::new(member))?)
        })?;
    Ok(values.swap_remove(0))
}

/// Somebody who takes gradients and does nothing with them.
pub struct Nobody;

impl Events for Nobody {
    fn ready(&self, _: ParamId, _: &dyn Buffer) -> Result<Keep> {
        Ok(Keep::Drop)
    }

    fn unit(&self, _: UnitId, _: Edge) -> Result<()> {
        Ok(())
    }
}
