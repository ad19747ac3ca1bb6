//! The circle of sharded parameters on the engine itself, over wires that the test chooses. Method: units of vectors behind
//! the engine's own trait; what arrives in a unit is compared with what was there at first, what every part of a step sent
//! with the forecast.

use std::sync::{Arc, Mutex};

use fabric_engine::{
    Error, Result,
    buffer::Buffer,
    comm::{
        Spent,
        host::{Host, Options as HostOptions},
    },
    kernels::Dtype,
    shard::{
        Edge, ParamId, ParamMeta, Parameters, SharedComm, UnitId,
        groups::Groups,
        placement::{FSDP, HSDP, Row, ZERO1, ZERO2},
        plan::{Options, Plan, Reshard},
        replicate::{agree, distribute},
        sequencer::Sequencer,
    },
};

use crate::ranks::join;

const SIZES: [usize; 6] = [7, 30, 64, 1, 33, 100]; // two in each unit
const UNITS: usize = 3;

/// Vectors that come and go.
struct Vectors(Vec<Mutex<Option<Vec<f32>>>>);

fn first(param: usize) -> Vec<f32> {
    (0..SIZES[param])
        .map(|at| (param * 1000 + at) as f32)
        .collect()
}

impl Vectors {
    fn new() -> Self {
        Self((0..SIZES.len()).map(|_| Mutex::new(None)).collect())
    }

    fn values(&self, param: usize) -> Option<Vec<f32>> {
        self.0[param].lock().unwrap().clone()
    }
}

impl Parameters for Vectors {
    fn with(&self, param: ParamId, f: &mut dyn FnMut(&mut dyn Buffer) -> Result<()>) -> Result<()> {
        match &mut *self.0[param.0].lock().unwrap() {
            Some(values) => f(values),
            None => Err(Error::argument("no values", "Enter the unit")),
        }
    }
    fn initialize(&self, param: ParamId) -> Result<()> {
        *self.0[param.0].lock().unwrap() = Some(first(param.0));
        Ok(())
    }
    fn acquire(&self, param: ParamId) -> Result<()> {
        let mut slot = self.0[param.0].lock().unwrap();
        slot.get_or_insert_with(|| vec![f32::NAN; SIZES[param.0]]);
        Ok(())
    }
    fn release(&self, param: ParamId) -> Result<()> {
        *self.0[param.0].lock().unwrap() = None;
        Ok(())
    }
}

fn plan(row: Row, world: usize, reshard_after_forward: Reshard) -> Plan {
    let params = SIZES.iter().enumerate().map(|(index, numel)| {
        let meta = ParamMeta::new(format!("p{index}"), &[*numel], Dtype::F32);
        meta.in_unit(UnitId(index / 2))
    });
    let options = Options {
        bucket_bytes: 300,
        first_bucket_bytes: 100,
        group: (row == HSDP).then_some(2),
        reshard_after_forward,
        ..Options::default()
    };
    let units = (0..UNITS).map(|unit| format!("u{unit}"));
    Plan::with_units(row, world, params.collect(), units.collect(), &options).unwrap()
}

/// One rank's life of two steps; its parameters change by hand in between.
fn live(comm: SharedComm, plan: Plan) -> Result<()> {
    let world = comm.size();
    agree(&plan, &comm)?;
    let groups = Groups::connect(comm.clone(), &plan)?;
    let forecast = plan.forecast(&groups);
    let vectors = Arc::new(Vectors::new());
    let mut sequencer = Sequencer::for_model(plan, groups, vectors.clone())?;
    distribute(sequencer.plan(), &comm, &sequencer.mains(), &*vectors)?;
    let sharded = sequencer.plan().row().shard.shards_param();
    let mut moved = 0.0;
    for _ in 0..2 {
        let mut last = Spent::default();
        let mut since = |sequencer: &Sequencer| {
            let mut now = comm.lock().spent();
            now += sequencer.groups().spent();
            let spent = now - last;
            last = now;
            spent
        };
        since(&sequencer);
        for unit in 0..UNITS {
            sequencer.unit(UnitId(unit), Edge::ForwardEnter)?;
            for param in [2 * unit, 2 * unit + 1] {
                let expected = first(param).into_iter().map(|x| x + moved);
                assert_eq!(vectors.values(param), Some(expected.collect()), "p{param}");
            }
            sequencer.unit(UnitId(unit), Edge::ForwardLeave)?;
            let kept = vectors.values(2 * unit).is_some();
            let keeps = sequencer.plan().options().reshard_after_forward == Reshard::No;
            assert_eq!(kept, !sharded || keeps || unit + 1 == UNITS, "u{unit}");
        }
        assert_eq!(since(&sequencer), forecast.forward);
        sequencer.begin(true)?;
        for param in (0..SIZES.len()).rev() {
            if param % 2 == 1 {
                sequencer.unit(UnitId(param / 2), Edge::BackwardEnter)?;
                assert!(vectors.values(param).is_some());
            }
            let grad = vec![(comm.rank() + 1) as f32; SIZES[param]];
            sequencer.ready(ParamId(param), &grad)?;
        }
        sequencer.finish()?;
        assert_eq!(since(&sequencer), forecast.last_backward);
        let mean = (1..=world).sum::<usize>() as f32 / world as f32;
        let pieces = sequencer.plan().pieces(comm.rank());
        for piece in &pieces {
            let grad = sequencer.piece(piece).expect("a gradient");
            let mut values = vec![0f32; grad.len()];
            let into = fabric_engine::kernels::SpanMut::of(&mut values);
            fabric_engine::kernels::cast(grad, into).unwrap();
            assert!(values.iter().all(|value| *value == mean), "{values:?}");
            // The update: everything grows by one.
            let add = |values: &mut dyn Buffer, range: std::ops::Range<usize>| {
                let mut copy = vec![0f32; range.len()];
                let into = fabric_engine::kernels::SpanMut::of(&mut copy);
                values.read(range.clone(), into)?;
                copy.iter_mut().for_each(|value| *value += 1.0);
                values.write(range, fabric_engine::kernels::Span::of(&copy))
            };
            let own = sequencer.plan().own(piece.bucket, comm.rank()).start;
            match sequencer.mains().lock(piece.bucket) {
                Some(mut main) => add(&mut *main, piece.place.start - own..piece.place.end - own)?,
                None => {
                    vectors.with(piece.param, &mut |values| add(values, piece.range.clone()))?
                }
            }
        }
        sequencer.step()?;
        sequencer.zero_grad();
        assert_eq!(since(&sequencer), forecast.step);
        moved += 1.0;
    }
    Ok(())
}

#[test]
fn units_arrive_whole_and_cost_what_was_forecast_on_either_wire() {
    for shm in [true, false] {
        for (row, world, reshard) in [
            (ZERO1, 3, Reshard::Yes),
            (ZERO2, 2, Reshard::Yes),
            (FSDP, 3, Reshard::Yes),
            (FSDP, 2, Reshard::No),
            (FSDP, 4, Reshard::Within(2)),
            (HSDP, 4, Reshard::Yes),
        ] {
            join(world, |member| {
                let options = HostOptions::default();
                let host = match shm {
                    true => Host::shm(&member, options)
                        .unwrap()
                        .expect("memory to share"),
                    false => Host::tcp(&member, options).unwrap(),
                };
                live(SharedComm::new(Box::new(host)), plan(row, world, reshard)).unwrap();
            });
        }
    }
}
