//! Playing: carts that are pushed as a policy says, and what is to be learnt from it.

use candle_core::Result;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{
    cartpole::{CartPole, End, Sight},
    policy::Policy,
};

const DISCOUNT: f32 = 0.98;
const LAMBDA: f32 = 0.8; // of generalised advantage estimation (Schulman et al. 2016)

/// Moves that were made: `sights` are f32[moves, 4].
#[derive(Default, Serialize, Deserialize)]
pub struct Rollout {
    pub sights: Vec<f32>,
    pub actions: Vec<u32>,
    /// The logarithm of the odds that an action had.
    pub odds: Vec<f32>,
    /// How much better it went than the critic thought.
    pub advantages: Vec<f32>,
    /// What the critic should have said.
    pub returns: Vec<f32>,
}

impl Rollout {
    pub fn len(&self) -> usize {
        self.actions.len()
    }

    /// Part `part` of `parts` of the moves.
    pub fn part(&self, part: usize, parts: usize) -> Self {
        let range = self.len() * part / parts..self.len() * (part + 1) / parts;
        Self {
            sights: self.sights[4 * range.start..4 * range.end].to_vec(),
            actions: self.actions[range.clone()].to_vec(),
            odds: self.odds[range.clone()].to_vec(),
            advantages: self.advantages[range.clone()].to_vec(),
            returns: self.returns[range].to_vec(),
        }
    }
}

/// Some carts, and who plays them.
pub struct Player {
    carts: Vec<CartPole>,
    rng: ChaCha8Rng,
}

/// One move of one cart.
struct Move {
    sight: Sight,
    action: usize,
    odds: f32,
    value: f32,
    end: Option<(End, Sight)>, // and what was seen then
}

impl Player {
    /// Players with different seeds play differently.
    pub fn new(carts: usize, seed: u64) -> Self {
        let stream = |number| fabric::seed::rng(fabric::seed::derive(seed, &[number as u64]));
        Self {
            carts: (0..carts)
                .map(|cart| CartPole::new(stream(cart + 1)))
                .collect(),
            rng: stream(0),
        }
    }

    /// `moves` moves of every cart, and the returns of the episodes that ended. The policy is asked `moves + 1` times, on every
    /// rank, whatever happens: a policy in shards is run by all.
    pub fn play(&mut self, policy: &Policy, moves: usize) -> Result<(Rollout, Vec<f64>)> {
        let (mut games, mut ended) = (Vec::new(), Vec::new());
        games.resize_with(self.carts.len(), Vec::new);
        for _ in 0..moves {
            let sights: Vec<Sight> = self.carts.iter().map(CartPole::sight).collect();
            let (odds, values) = policy.look(&sights)?;
            for (number, cart) in self.carts.iter_mut().enumerate() {
                let action = usize::from(self.rng.random::<f32>() < odds[number][1].exp());
                let end = cart.step(action == 1).map(|end| (end, cart.sight()));
                if end.is_some() {
                    ended.push(f64::from(cart.steps()));
                    cart.reset();
                }
                games[number].push(Move {
                    sight: sights[number],
                    action,
                    odds: odds[number][action],
                    value: values[number],
                    end,
                });
            }
        }
        // What is still to be expected: of games that go on, and of those that were only stopped.
        let stopped = games
            .iter()
            .flatten()
            .filter_map(|step: &Move| match step.end {
                Some((End::Stopped, sight)) => Some(sight),
                _ => None,
            });
        let last = self.carts.iter().map(CartPole::sight).chain(stopped);
        let (_, last) = policy.look(&last.collect::<Vec<_>>())?;
        let (going_on, stopped) = last.split_at(self.carts.len());
        let mut stopped = stopped.iter().copied();
        let mut rollout = Rollout::default();
        for (game, value) in games.iter().zip(going_on) {
            let of_ends: Vec<f32> = game
                .iter()
                .map(|step| match step.end {
                    Some((End::Stopped, _)) => stopped.next().unwrap_or(0.0),
                    _ => 0.0,
                })
                .collect();
            rollout.add(game, &of_ends, *value);
        }
        Ok((rollout, ended))
    }
}

impl Rollout {
    /// Add a game: `of_ends` says for each move what was to be expected when its episode ended there, `after` what is to be
    /// expected after the last.
    fn add(&mut self, game: &[Move], of_ends: &[f32], after: f32) {
        let (mut next, mut advantage) = (after, 0.0);
        let mut advantages = vec![0.0; game.len()];
        for (number, step) in game.iter().enumerate().rev() {
            if step.end.is_some() {
                (next, advantage) = (of_ends[number], 0.0);
            }
            let surprise = 1.0 + DISCOUNT * next - step.value;
            advantage = surprise + DISCOUNT * LAMBDA * advantage;
            advantages[number] = advantage;
            next = step.value;
        }
        for (step, advantage) in game.iter().zip(advantages) {
            self.sights.extend(step.sight.map(|seen| seen as f32));
            self.actions.push(step.action as u32);
            self.odds.push(step.odds);
            self.advantages.push(advantage);
            self.returns.push(advantage + step.value);
        }
    }
}
