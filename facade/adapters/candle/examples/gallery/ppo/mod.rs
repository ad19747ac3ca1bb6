//! Reinforcement learning: a policy keeps a pole upright on a cart (PPO). Either every process plays and learns, or one plays
//! and the others learn from what it did.

pub mod cartpole;
mod learn;
mod play;
mod policy;

use std::{collections::VecDeque, time::Instant};

use candle_core::{Result as CandleResult, Tensor};
use fabric::{
    Error, Fabric, Result,
    logger::{CsvLogger, RunFolder, TensorBoardLogger},
};
use fabric_candle::{CandleFabric, CandleModel};
use learn::{Learner, Lesson, Pace};
use play::{Player, Rollout};
use policy::Policy;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::job::{Job, report, tell};

const FIRST: usize = 20; // episodes that show what a beginner can
const LATEST: usize = 50; // episodes that are judged by
const SHARDED: [&str; 2] = ["fsdp", "hsdp"];

/// Balance a pole on a cart: every process plays and learns, or with --decoupled one plays and the others learn
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: Job,
    /// Process 0 plays, the others learn in a group of their own
    #[arg(long)]
    decoupled: bool,
    /// Rounds of playing and learning, at most
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Carts for each process that learns
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
    carts: u64,
    /// Moves of each cart in a round
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u64).range(2..))]
    moves: u64,
    /// The largest learning rate
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// The mean return of the last 50 episodes with which the pole is balanced; 500 is the best
    #[arg(long, default_value_t = 475.0)]
    goal: f64,
}

pub fn main(args: &Args) -> Result<()> {
    let out = args.job.out("ppo");
    let name = out.file_name().map(|name| name.to_string_lossy());
    let run = RunFolder::new(out.parent().unwrap_or(&out), &name.unwrap_or("ppo".into()));
    let fabric = args
        .job
        .builder()
        .logger(CsvLogger::within(&run))
        .logger(TensorBoardLogger::within(&run))
        .build()?;
    if args.decoupled && fabric.ranks() < 2 {
        return Err(Error::argument(
            "--decoupled with one process, which would play and have nobody to learn from it",
            "Ask for --devices 2, or more",
        ));
    }
    if args.decoupled && SHARDED.contains(&fabric.strategy()) {
        return Err(Error::argument(
            format!(
                "--decoupled with strategy {}: the player needs whole parameters",
                fabric.strategy()
            ),
            "Choose ddp, zero1 or zero2",
        ));
    }
    let body = |fabric: &Fabric| {
        if args.decoupled {
            decoupled(fabric, args)
        } else {
            coupled(fabric, args)
        }
    };
    fabric.launch(body).map(drop)
}

impl Args {
    /// The pace of round `round`: everything calms down towards the last.
    fn pace(&self, round: u64) -> Pace {
        let left = 1.0 - round as f64 / self.rounds as f64;
        Pace {
            lr: self.lr * left,
            clip: 0.2 * left,
            entropy: 0.005 * left,
        }
    }
}

/// Every rank plays with carts of its own and learns from them, and gradients are averaged.
fn coupled(fabric: &Fabric, args: &Args) -> Result<()> {
    let seed = Fabric::seed_everything(Some(args.job.seed))?;
    let rank = fabric.global_rank() as u64;
    let mut player = Player::new(args.carts as usize, fabric::seed::derive(seed, &[rank]));
    let policy = fabric.init_module(Policy::new)?;
    let mut learner = Learner::new(fabric, policy, seed)?;
    let mut record = Record::new();
    for round in 0..args.rounds {
        let (rollout, ended) = player.play(&learner.policy, args.moves as usize)?;
        let pace = args.pace(round);
        let lesson = learner.learn(&rollout, pace)?;
        // Of all ranks, so that all of them find that the pole is balanced in the same round.
        record.add(&fabric.all_gather_object(&ended)?.concat());
        record.log(fabric, round + 1, lesson, pace)?;
        if record.is_solved(args.goal) {
            break;
        }
    }
    record.report(fabric, args)
}

/// What the player sends to a trainer: moves, and at which pace to learn from them; nothing at the end.
#[derive(Serialize, Deserialize)]
struct Homework {
    rollout: Rollout,
    round: u64,
}

/// Rank 0 plays. The others are a group, in which models are set up and gradients averaged as in any world; its first rank
/// sends the player the new parameters.
fn decoupled(fabric: &Fabric, args: &Args) -> Result<()> {
    Fabric::seed_everything(Some(args.job.seed))?;
    let trainers: Vec<usize> = (1..fabric.world_size()).collect();
    match fabric.new_group(&trainers)? {
        None => play_for(fabric, &trainers, args),
        Some(group) => train_in(fabric, &group, args),
    }
}

fn play_for(fabric: &Fabric, trainers: &[usize], args: &Args) -> Result<()> {
    // Never set up: it has no gradients, and no part in anybody's averages.
    let policy = fabric.init_module(Policy::new)?;
    let mut player = Player::new(args.carts as usize * trainers.len(), args.job.seed);
    let mut record = Record::new();
    for round in 0..args.rounds {
        set_parameters(&policy, fabric.recv_object(trainers[0])?)?;
        let (rollout, ended) = player.play(&policy, args.moves as usize)?;
        for (part, trainer) in trainers.iter().enumerate() {
            let rollout = rollout.part(part, trainers.len());
            fabric.send_object(&Some(Homework { rollout, round }), *trainer)?;
        }
        let lesson = fabric.recv_object(trainers[0])?;
        record.add(&ended);
        record.log(fabric, round + 1, lesson, args.pace(round))?;
        if record.is_solved(args.goal) {
            break;
        }
    }
    let _: Vec<Vec<f32>> = fabric.recv_object(trainers[0])?; // of a round that will not be
    for trainer in trainers {
        fabric.send_object(&None::<Homework>, *trainer)?;
    }
    record.report(fabric, args)
}

fn train_in(fabric: &Fabric, group: &Fabric, args: &Args) -> Result<()> {
    let policy = group.init_module(Policy::new)?;
    let mut learner = Learner::new(group, policy, args.job.seed)?;
    loop {
        if group.is_global_zero() {
            fabric.send_object(&parameters(&learner.policy)?, 0)?;
        }
        let Some(Homework { rollout, round }) = fabric.recv_object(0)? else {
            return Ok(());
        };
        let lesson = learner.learn(&rollout, args.pace(round))?;
        if group.is_global_zero() {
            fabric.send_object(&lesson, 0)?;
        }
    }
}

/// All parameters of a policy, each as a list of numbers.
fn parameters(policy: &CandleModel<Policy>) -> CandleResult<Vec<Vec<f32>>> {
    policy.with_vars(|vars| {
        let values = |(_, var): &(String, _)| -> CandleResult<Vec<f32>> {
            let var: &candle_core::Var = var;
            var.flatten_all()?
                .to_dtype(candle_core::DType::F32)?
                .to_vec1()
        };
        vars.iter().map(values).collect()
    })
}

fn set_parameters(policy: &CandleModel<Policy>, values: Vec<Vec<f32>>) -> CandleResult<()> {
    policy.with_vars(|vars| {
        vars.iter().zip(values).try_for_each(|((_, var), values)| {
            let values = Tensor::from_vec(values, var.dims(), var.device())?;
            var.set(&values.to_dtype(var.dtype())?)
        })
    })
}

/// How the episodes went.
struct Record {
    started: Instant,
    first: Vec<f64>, // returns
    latest: VecDeque<f64>,
    best: f64, // mean of `LATEST` episodes
    episodes: usize,
    moves: f64,
    rounds: u64,
}

impl Record {
    fn new() -> Self {
        Self {
            started: Instant::now(),
            first: Vec::new(),
            latest: VecDeque::new(),
            best: 0.0,
            episodes: 0,
            moves: 0.0,
            rounds: 0,
        }
    }

    /// Episodes ended with these returns.
    fn add(&mut self, returns: &[f64]) {
        for own in returns {
            if self.first.len() < FIRST {
                self.first.push(*own);
            }
            self.latest.push_back(*own);
            if self.latest.len() > LATEST {
                self.latest.pop_front();
            }
            self.episodes += 1;
            self.moves += own;
            if self.latest.len() == LATEST {
                self.best = self.best.max(self.latest());
            }
        }
    }

    fn latest(&self) -> f64 {
        mean(self.latest.iter())
    }

    fn is_solved(&self, goal: f64) -> bool {
        self.latest.len() == LATEST && self.latest() >= goal
    }

    fn log(&mut self, fabric: &Fabric, round: u64, lesson: Lesson, pace: Pace) -> Result<()> {
        self.rounds = round;
        let metrics = [
            ("return", self.latest()),
            ("policy_loss", lesson.policy_loss),
            ("value_loss", lesson.value_loss),
            ("entropy", lesson.entropy),
            ("gradient_norm", lesson.norm),
            ("lr", pace.lr),
        ];
        fabric.log_dict(&metrics, round)?;
        if round.is_multiple_of(20) {
            let (episodes, latest) = (self.episodes, self.latest());
            tell(
                fabric,
                format!(
                    "round {round}: {episodes} episodes, the last {LATEST} of {latest:.1} moves"
                ),
            );
        }
        Ok(())
    }

    fn report(&self, fabric: &Fabric, args: &Args) -> Result<()> {
        let results = json!({
            "decoupled": args.decoupled,
            "rounds": self.rounds,
            "episodes": self.episodes,
            "moves": self.moves,
            "first_return": mean(self.first.iter()),
            "return": self.latest(),
            "best_return": self.best,
            "solved": self.is_solved(args.goal),
        });
        report(fabric, self.started, results)
    }
}

fn mean<'a>(values: impl ExactSizeIterator<Item = &'a f64>) -> f64 {
    let count = values.len().max(1) as f64;
    values.sum::<f64>() / count
}
