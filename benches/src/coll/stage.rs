//! Where ranks come from: processes that our supervisor starts, ranks of another launcher, or threads; and the wire between
//! them. What the ranks tell each other about their measurements goes over the job's control line, not over collectives.

use std::sync::Arc;

use fabric_engine::{
    Error, Result,
    comm::host::{Host, Options, tuning},
    rendezvous::{self, Member},
    schedule::choose::Tuning,
};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::args::Args;

/// Run `body` once for every number of ranks that `args` asks for, on each of its ranks.
///
/// # Errors
/// The first failure among the ranks.
pub fn run(args: &Args, body: impl Fn(&Stage) -> fabric::Result<()> + Sync) -> fabric::Result<()> {
    if let Some(place) = fabric::environment::Place::detect(&|name| std::env::var(name).ok())? {
        let result = as_rank(&place, &body);
        if let Err(error) = &result {
            let is_echo = error.engine().is_some_and(Error::is_from_peer);
            fabric::launch::report_failure(&error.to_string(), is_echo);
        }
        return result;
    }
    // What is wrong with two ranks does not hide what is wrong with three.
    let mut first = Ok(());
    for ranks in args.ranks.iter() {
        let outcome = match args.threads {
            true => as_threads(*ranks, &body),
            false => fabric::launch::supervise(*ranks),
        };
        first = first.and(outcome);
    }
    first
}

fn as_threads(
    ranks: usize,
    body: impl Fn(&Stage) -> fabric::Result<()> + Sync,
) -> fabric::Result<()> {
    crate::ranks(ranks, |member| {
        Ok(body(&Stage::new(member)).map_err(|error| error.to_string()))
    })?
    .map_err(fabric::Error::new)
}

fn as_rank(
    place: &fabric::environment::Place,
    body: impl Fn(&Stage) -> fabric::Result<()>,
) -> fabric::Result<()> {
    if let Some(pid) = fabric::environment::supervisor(&|name| std::env::var(name).ok())? {
        fabric::launch::die_with_supervisor(pid)?;
    }
    let options =
        rendezvous::Options::new(place.rank, place.world, place.address, place.secret.clone());
    let member = match fabric::launch::inherited_listener() {
        Some(listener) => Member::host(options, listener)?,
        None => Member::join(options)?,
    };
    body(&Stage::new(&Arc::new(member)))
}

/// One rank's view of the others.
pub struct Stage {
    member: Arc<Member>,
    cores: Option<CpuSet>, // those allowed at first
}

impl Stage {
    fn new(member: &Arc<Member>) -> Self {
        Self {
            member: member.clone(),
            cores: sched_getaffinity(None).ok(),
        }
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.member.rank()
    }

    /// Ranks.
    pub fn ranks(&self) -> usize {
        self.member.world()
    }

    /// Whether this rank prints and writes.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// A communicator over the wire of that name, with this machine's table of algorithms.
    ///
    /// # Errors
    /// When there is no such wire, or it does not reach everybody.
    pub fn connect(&self, wire: &str, args: &Args) -> Result<Host> {
        self.connect_with(wire, args, tuning()?)
    }

    /// A communicator with a table of its own.
    ///
    /// # Errors
    /// As [`Stage::connect`].
    pub fn connect_with(&self, wire: &str, args: &Args, tuning: Tuning) -> Result<Host> {
        let mut options = Options {
            tuning,
            security: args.security,
            ..Options::default()
        };
        if let Some(seconds) = args.timeout {
            options.deadline = std::time::Duration::try_from_secs_f64(seconds).map_err(|_| {
                Error::argument(format!("--timeout {seconds}"), "Give seconds, like 10")
            })?;
        }
        // An engine that saw one core would not spin, so that a rank is pinned after it has connected.
        if let (true, Some(cores)) = (args.pin, &self.cores) {
            sched_setaffinity(None, cores).map_err(|why| Error::io(self.rank(), "unpin", why))?;
        }
        let host = match wire {
            "best" => Host::best(&self.member, options),
            "tcp" => Host::tcp(&self.member, options),
            "shm" => Host::shm(&self.member, options)?.map_err(|why| {
                Error::argument(
                    format!("--wire shm, but these ranks cannot share memory: {why}"),
                    "Start all ranks on one machine, as one user, in one container; or take --wire tcp",
                )
            }),
            "unix" => Host::unix(&self.member, options)?.map_err(|why| {
                Error::argument(
                    format!("--wire unix, but these ranks cannot reach each other's Unix sockets: {why}"),
                    "Start all ranks on one machine, as one user, in one container; or take --wire tcp",
                )
            }),
            _ => Err(Error::argument(
                format!("--wire {wire}: this engine has no such wire"),
                "Choose among shm, unix, tcp and best",
            )),
        }?;
        if args.pin {
            pin(self.rank()).map_err(|why| Error::io(self.rank(), "choose a core", why))?;
        }
        Ok(host)
    }

    /// What every rank says, by rank: all say equally many numbers.
    ///
    /// # Errors
    /// When a rank is gone.
    pub fn all(&self, numbers: &[f64]) -> Result<Vec<Vec<f64>>> {
        let rows = self.member.swap("coll", bytemuck::cast_slice(numbers))?;
        let row = |bytes: &Vec<u8>| bytes.chunks(8).map(bytemuck::pod_read_unaligned).collect();
        Ok(rows.iter().map(row).collect())
    }

    /// The largest of the ranks' numbers, place by place.
    ///
    /// # Errors
    /// When a rank is gone.
    pub fn largest(&self, numbers: &[f64]) -> Result<Vec<f64>> {
        let rows = self.all(numbers)?;
        let largest = |at: usize| rows.iter().map(|row| row[at]).fold(f64::MIN, f64::max);
        Ok((0..numbers.len()).map(largest).collect())
    }

    /// The sum of the ranks' numbers, place by place.
    ///
    /// # Errors
    /// When a rank is gone.
    pub fn sum(&self, numbers: &[f64]) -> Result<Vec<f64>> {
        let rows = self.all(numbers)?;
        let sum = |at: usize| rows.iter().map(|row| row[at]).sum();
        Ok((0..numbers.len()).map(sum).collect())
    }
}

/// Keep this thread, and those that it starts, on the core that is number `rank` among those allowed.
fn pin(rank: usize) -> rustix::io::Result<()> {
    let allowed = sched_getaffinity(None)?;
    let cores = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
    let cores = cores.collect::<Vec<_>>();
    let mut own = CpuSet::new();
    own.set(cores[rank % cores.len()]);
    sched_setaffinity(None, &own)
}
