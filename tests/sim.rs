//! Collectives on a simulated network: many seeds, virtual time, and ranks that die at any moment. Method: what a seed
//! does once it does again, nothing hangs, and whoever survives says who did not.

use std::time::Duration;

use fabric_engine::{
    Error, Result,
    comm::{
        Collectives, Communicator, ReduceOp,
        host::{Host, Options},
    },
    schedule::choose::WireKind,
    wire::sim::{Net, Sim},
};

/// Run `body` on every rank of a simulated network.
fn simulate<T: Send>(size: usize, net: Net, body: impl Fn(&mut Host) -> T + Sync) -> Vec<T> {
    let ends = Sim::network(size, net);
    std::thread::scope(|scope| {
        let threads = ends.into_iter().map(|end| {
            let body = &body;
            scope.spawn(move || {
                let vigil = end.vigil();
                let options = Options {
                    clock: vigil.clock.clone(),
                    ..Options::default()
                };
                let mut host =
                    Host::over_wire(Box::new(end), WireKind::Sim, vigil, options).unwrap();
                body(&mut host)
            })
        });
        let threads = threads.collect::<Vec<_>>();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// A little training: reductions of several sizes, with what each rank sees and when.
fn story(comm: &mut Host, clock: impl Fn(&Host) -> Duration) -> Result<(Vec<u32>, Duration)> {
    let mut seen = Vec::new();
    for step in 0..6usize {
        let numel = [1, 100, 5000][step % 3];
        let mut mine = (0..numel)
            .map(|i| ((i * 7 + comm.rank() * 13 + step) % 101) as f32 / 3.0)
            .collect::<Vec<_>>();
        comm.all_reduce(&mut mine, ReduceOp::Avg)?;
        seen.extend(mine.iter().map(|value| value.to_bits()));
        comm.barrier()?;
    }
    let now = clock(comm);
    Ok((seen, now))
}

fn now(comm: &Host) -> Duration {
    comm.clock().now()
}

#[test]
fn every_seed_gives_the_same_bits_and_a_seed_repeats_itself_to_the_nanosecond() {
    let mut bits = None;
    for seed in 0..30 {
        let run = || simulate(5, Net::new(seed), |comm| story(comm, now).unwrap());
        let (first, second) = (run(), run());
        assert_eq!(first, second, "seed {seed} repeats itself");
        let mine = first.into_iter().map(|(bits, _)| bits).collect::<Vec<_>>();
        assert_eq!(
            bits.get_or_insert_with(|| mine.clone()),
            &mine,
            "seed {seed} gives the bits of seed 0"
        );
    }
}

#[test]
fn whenever_a_rank_dies_the_others_end_and_say_so() {
    let mut noticed = 0;
    for seed in 0..40 {
        let kills = vec![(2, Duration::from_micros(seed * 37))];
        let net = Net {
            kills,
            ..Net::new(seed)
        };
        let ends = simulate(4, net, |comm| story(comm, now).err());
        let survivors = || [0, 1, 3].map(|rank| &ends[rank]).into_iter().flatten();
        if survivors().next().is_none() {
            continue; // its last messages were out before it died: nobody needs it any more
        }
        let killed = ends[2]
            .as_ref()
            .expect("a rank that others miss did not finish")
            .to_string();
        assert!(
            killed.contains("the simulation killed this rank"),
            "{killed}"
        );
        let lost =
            survivors().any(|error| matches!(error, Error::PeerLost(lost) if lost.peer == 2));
        assert!(
            lost,
            "seed {seed}: nobody says that rank 2 is gone: {ends:?}"
        );
        noticed += 1;
    }
    assert!(noticed > 20, "rank 2 was missed in {noticed} of 40 stories");
}

#[test]
fn ranks_that_disagree_end_with_both_sides_of_the_story() {
    let texts = simulate(3, Net::new(1), |comm| match comm.rank() {
        0 => comm
            .all_reduce(&mut vec![0f32; 4], ReduceOp::Sum)
            .unwrap_err()
            .to_string(),
        _ => comm.barrier().unwrap_err().to_string(),
    });
    let story = texts.iter().find(|text| text.contains("diverged")).unwrap();
    assert!(
        story.contains("barrier") && story.contains("all_reduce(sum, 4 x f32)"),
        "{story}"
    );
}
