//! Ranks as threads: the stage on which the other tests play.

use std::{
    net::{Ipv4Addr, TcpListener},
    sync::{Arc, Mutex},
};

use fabric_engine::{
    Result,
    comm::{
        Communicator,
        host::{Host, Options as HostOptions},
    },
    rendezvous::{Member, Options, Secret},
};

/// Run `body` on `world` threads that have joined one job; returns what they return, by rank.
pub(crate) fn join<T: Send>(world: usize, body: impl Fn(Arc<Member>) -> T + Sync) -> Vec<T> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let listener = Mutex::new(Some(listener));
    let secret = Secret::from_bytes(b"the tests' own");
    std::thread::scope(|scope| {
        let threads = (0..world).map(|rank| {
            let options = Options::new(rank, world, address, secret.clone());
            let (listener, body) = (&listener, &body);
            scope.spawn(move || {
                let member = match rank {
                    0 => Member::host(options, listener.lock().unwrap().take().unwrap()),
                    _ => Member::join(options),
                };
                body(Arc::new(member.unwrap()))
            })
        });
        let threads = threads.collect::<Vec<_>>();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// Run `body` on `world` threads with a communicator each, over TCP.
pub(crate) fn tcp<T: Send>(
    world: usize,
    options: HostOptions,
    body: impl Fn(Box<dyn Communicator>) -> T + Sync,
) -> Vec<T> {
    join(world, |member| {
        body(Box::new(Host::tcp(&member, options.clone()).unwrap()))
    })
}

/// The text of an error that must be there.
pub(crate) fn refusal<T>(result: Result<T>) -> String {
    result.err().expect("an error").to_string()
}
