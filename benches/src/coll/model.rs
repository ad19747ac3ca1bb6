//! What an operation should take: messages, bytes and folded bytes by the price of its schedule, times what each of them takes
//! here (Hockney's α and β, and γ for folding), measured before.

use fabric_engine::{
    Result,
    comm::{
        Communicator,
        host::{Host, tuning},
    },
    kernels::{self, Dtype, Fold, Span, SpanMut},
    schedule::{
        Algorithm, Kind,
        choose::{Tuning, WireKind},
    },
};

use super::{
    args::Args,
    bench,
    case::{Case, Memory},
    collective::{Collective, Place},
    measure::Spread,
    redop::Redop,
    stage::Stage,
};

const LARGE_BYTES: usize = 4 << 20; // whose time is that of its bytes
const FOLD_BYTES: usize = 32 << 10; // two of them stay in a core's own caches

/// What a message, a byte sent and a byte folded take.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Constants {
    /// Seconds a message; in shared memory, a meeting.
    pub alpha: f64,
    /// Bytes a second.
    pub beta: f64,
    /// Bytes a second that a core folds, of floats in its caches.
    pub gamma: f64,
}

impl Constants {
    /// Measure: an all_reduce of one float, an all_gather, and folds on all ranks at once; the slowest rank's. `None` for one
    /// rank, which sends nothing. All ranks call this together.
    ///
    /// # Errors
    /// When a rank is gone.
    pub fn measure(stage: &Stage, host: &mut Host, args: &Args) -> Result<Option<Self>> {
        if stage.ranks() == 1 {
            return Ok(None);
        }
        let args = probing(args);
        let small = case(Collective::AllReduce, 4, stage);
        let messages = |case: &Case, host: &Host| {
            let spent = host.price(&case.call(), case.dtype, case.full_elems());
            (spent.messages.max(1) as f64, spent.bytes.max(1) as f64)
        };
        let alpha = timed(stage, host, &args, &small)? / messages(&small, host).0;
        let large = case(Collective::AllGather, LARGE_BYTES, stage);
        let (starts, bytes) = messages(&large, host);
        let took = timed(stage, host, &args, &large)?;
        let byte = (took - alpha * starts).max(took / 10.0) / bytes;
        let slowest = stage.largest(&[alpha, byte, fold_seconds() / FOLD_BYTES as f64])?;
        Ok(Some(Self {
            alpha: slowest[0],
            beta: 1.0 / slowest[1],
            gamma: 1.0 / slowest[2],
        }))
    }
}

/// The model of one communicator.
pub struct Model {
    /// What a message, a byte sent and a byte folded take.
    pub constants: Constants,
    tuning: Tuning,
}

impl Model {
    /// Measure the constants; `None` for one rank. All ranks call this together.
    ///
    /// # Errors
    /// When a rank is gone.
    pub fn measure(stage: &Stage, host: &mut Host, args: &Args) -> Result<Option<Self>> {
        let constants = Constants::measure(stage, host, args)?;
        let tuning = tuning()?; // as the communicator's
        Ok(constants.map(|constants| Self { constants, tuning }))
    }

    /// What `case` should take on this rank.
    pub fn seconds(&self, host: &Host, case: &Case) -> f64 {
        let Constants { alpha, beta, gamma } = self.constants;
        let (call, elems) = (case.call(), case.full_elems());
        let spent = host.price(&call, case.dtype, elems);
        let (ranks, bytes) = (case.place.ranks, elems * case.dtype.size());
        let folded = match (case.collective.kind(), WireKind::from_name(host.wire())) {
            (Some(kind), Some(wire)) => {
                let algorithm = self.tuning.choose(&kind, ranks, bytes, wire);
                folded_bytes(kind, algorithm, ranks, bytes)
            }
            _ => 0.0,
        };
        spent.messages as f64 * alpha + spent.bytes as f64 / beta + folded / gamma
    }
}

/// Bytes that the busiest rank folds one after the other.
fn folded_bytes(kind: Kind, algorithm: Algorithm, ranks: usize, bytes: usize) -> f64 {
    let (n, bytes) = (ranks as f64, bytes as f64);
    let slices = (n - 1.0) / n * bytes;
    match (kind, algorithm) {
        (Kind::ReduceScatter, _) => slices,
        (Kind::AllReduce | Kind::Reduce { .. }, Algorithm::Doubling | Algorithm::Tree) => {
            n.log2().ceil() * bytes
        }
        (Kind::AllReduce, Algorithm::Post) => (n - 1.0) * bytes,
        (Kind::Reduce { .. }, Algorithm::Post | Algorithm::Direct) => (n - 1.0) * bytes,
        (Kind::AllReduce | Kind::Reduce { .. }, _) => slices,
        _ => 0.0,
    }
}

/// The flags with which single operations are timed: some milliseconds a case, isolated, on new inputs.
pub(super) fn probing(args: &Args) -> Args {
    Args {
        dirty: true,
        rotate: false,
        report_cputime: 0,
        budget: Some(args.budget.unwrap_or(0.004)),
        agg_iters: 1,
        warmup_iters: args.warmup_iters.max(2),
        per_iter_timing: false,
        ..args.clone()
    }
}

/// A float case of `bytes`, in place where there is such a form.
pub(super) fn case(collective: Collective, bytes: usize, stage: &Stage) -> Case {
    let place = Place {
        rank: stage.rank(),
        ranks: stage.ranks(),
        root: 0,
        is_uneven: false,
    };
    let case = Case {
        collective,
        op: collective.reduces().then_some(Redop::Sum),
        dtype: Dtype::F32,
        count: collective.count(bytes, 4, place.ranks),
        place,
        is_in_place: true,
    };
    Case {
        is_in_place: case.exists(),
        ..case
    }
}

/// Seconds that `case` takes, the slowest rank's.
pub(super) fn timed(stage: &Stage, host: &mut Host, args: &Args, case: &Case) -> Result<f64> {
    let mut sets = [case.buffers(host, Memory::default())?];
    sets[0].fill(case, 0);
    let bytes = case.collective.elements(case.count, case.place) * case.dtype.size();
    Ok(bench(stage, host, args).times(case, &mut sets, bytes)?.time)
}

/// The median time of folding [`FOLD_BYTES`] of floats.
fn fold_seconds() -> f64 {
    const TURNS: usize = 64;
    let clock = fabric_engine::clock::Clock::machine();
    let (mut into, with) = (vec![0f32; FOLD_BYTES / 4], vec![1f32; FOLD_BYTES / 4]);
    let laps = (0..21).map(|_| {
        let start = clock.now();
        for _ in 0..TURNS {
            let with = std::hint::black_box(&with);
            kernels::fold(Fold::Sum, SpanMut::of(&mut into), Span::of(with))
                .expect("floats of one length are added");
        }
        (clock.now() - start).as_secs_f64() / TURNS as f64
    });
    Spread::of(laps.collect()).p50
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_folded_once_and_whole_vectors_in_every_round() {
        let folded = |kind, algorithm| folded_bytes(kind, algorithm, 4, 1000);
        assert_eq!(folded(Kind::AllReduce, Algorithm::Halving), 750.0);
        assert_eq!(folded(Kind::AllReduce, Algorithm::Doubling), 2000.0);
        assert_eq!(folded(Kind::AllReduce, Algorithm::Post), 3000.0);
        assert_eq!(folded(Kind::ReduceScatter, Algorithm::Post), 750.0);
        assert_eq!(folded(Kind::AllGather, Algorithm::Ring), 0.0);
    }
}
