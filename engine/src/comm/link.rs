//! What a wire is like: what a message costs, and a byte.

use super::{Call, Collectives, Communicator, Data, Op, ReduceOp, Spent};
use crate::{
    buffer::Slab,
    clock::Clock,
    error::{Error, Result},
};
use fabric_kernels::Dtype;

/// The simplest model of a wire: latency and bandwidth (Hockney 1994).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Seconds a message.
    pub alpha_s: f64,
    /// Bytes a second.
    pub bytes_per_s: f64,
}

impl Link {
    /// How long what is sent takes.
    pub fn seconds(&self, spent: Spent) -> f64 {
        spent.messages as f64 * self.alpha_s + spent.bytes as f64 / self.bytes_per_s
    }

    /// Measure: small all-reduces, then large ones; the slowest rank's numbers, the same on all ranks. `None` for a group
    /// of one, which has no wire. All ranks call this together.
    ///
    /// # Errors
    /// When a rank is gone.
    pub fn measure(comm: &mut dyn Communicator, clock: &Clock) -> Result<Option<Self>> {
        const SMALL: usize = 64; // repetitions
        const LARGE: usize = 4;
        const LARGE_ELEMS: usize = 2 << 20;
        if comm.size() == 1 {
            return Ok(None);
        }
        // The median: on a busy machine single ones take as long as the system likes.
        let mut timed = |elems: usize, count: usize| {
            let mut slab = comm.alloc(Dtype::F32, elems)?;
            let call = Call::new(Op::AllReduce(ReduceOp::Max)).blocking();
            let once = |comm: &mut dyn Communicator, slab: Slab| {
                let work = comm.submit(call.clone(), Data::InPlace(slab))?;
                work.block()?; // a device's queue would wait instead
                Ok::<_, Error>(work.wait()?.into_output())
            };
            slab = once(comm, slab)?; // the first of a size sets things up
            let (before, mut took) = (comm.spent(), Vec::with_capacity(count));
            for _ in 0..count {
                let begun = clock.now();
                slab = once(comm, slab)?;
                took.push((clock.now() - begun).as_secs_f64());
            }
            took.sort_by(f64::total_cmp);
            let (median, sent) = (took[count / 2], comm.spent() - before);
            let of_one = |all: u64| all.max(1) as f64 / count as f64;
            Ok::<_, Error>((median, of_one(sent.messages), of_one(sent.bytes)))
        };
        let (latency_s, messages, _) = timed(1, SMALL)?;
        let alpha_s = latency_s / messages;
        let (large_s, messages, bytes) = timed(LARGE_ELEMS, LARGE)?;
        let in_bytes = (large_s - alpha_s * messages).max(large_s / 10.0);
        let mut slowest = vec![alpha_s, in_bytes / bytes];
        comm.all_reduce(&mut slowest, ReduceOp::Max)?;
        Ok(Some(Self {
            alpha_s: slowest[0],
            bytes_per_s: 1.0 / slowest[1],
        }))
    }
}
