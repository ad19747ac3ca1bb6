//! A pole on a cart, to be kept upright by pushing the cart (Barto, Sutton, Anderson 1983), with the numbers of Gym's
//! `CartPole-v1`.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

const GRAVITY: f64 = 9.8;
const CART_MASS: f64 = 1.0;
const POLE_MASS: f64 = 0.1;
const MASS: f64 = CART_MASS + POLE_MASS;
const HALF_LENGTH: f64 = 0.5; // of the pole
const FORCE: f64 = 10.0;
const SECONDS: f64 = 0.02; // a step
const FARTHEST: f64 = 2.4;
const STEEPEST: f64 = 12.0 * 2.0 * std::f64::consts::PI / 360.0;

/// An episode that lasts so long ends by itself: 500 is the best return.
pub const MOST_STEPS: u32 = 500;

/// What can be seen: the cart's place and speed, the pole's angle and angular speed.
pub type Sight = [f64; 4];

/// One cart.
pub struct CartPole {
    state: Sight,
    steps: u32,
    rng: ChaCha8Rng,
}

/// Why an episode is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The pole fell, or the cart left: there is nothing to come.
    Fell,
    /// It was stopped; it could have gone on.
    Stopped,
}

impl CartPole {
    pub fn new(rng: ChaCha8Rng) -> Self {
        let mut cart = Self {
            state: Sight::default(),
            steps: 0,
            rng,
        };
        cart.reset();
        cart
    }

    /// Begin an episode.
    pub fn reset(&mut self) {
        self.state = std::array::from_fn(|_| self.rng.random_range(-0.05..0.05));
        self.steps = 0;
    }

    pub fn sight(&self) -> Sight {
        self.state
    }

    /// Steps of this episode: its return, since each is worth 1.
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// Push the cart to the right, or to the left.
    pub fn step(&mut self, right: bool) -> Option<End> {
        self.state = next(self.state, right);
        self.steps += 1;
        let [place, _, angle, _] = self.state;
        if place.abs() > FARTHEST || angle.abs() > STEEPEST {
            return Some(End::Fell);
        }
        (self.steps >= MOST_STEPS).then_some(End::Stopped)
    }
}

/// A step of Euler's method.
fn next([place, speed, angle, turn]: Sight, right: bool) -> Sight {
    let force = if right { FORCE } else { -FORCE };
    let (sine, cosine) = angle.sin_cos();
    let thrust = (force + POLE_MASS * HALF_LENGTH * turn * turn * sine) / MASS;
    let turning = (GRAVITY * sine - cosine * thrust)
        / (HALF_LENGTH * (4.0 / 3.0 - POLE_MASS * cosine * cosine / MASS));
    let moving = thrust - POLE_MASS * HALF_LENGTH * turning * cosine / MASS;
    [
        place + SECONDS * speed,
        speed + SECONDS * moving,
        angle + SECONDS * turn,
        turn + SECONDS * turning,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    // EX-06. By hand: thrust 10 / 1.1; turning -9.0909 / (0.5 * 1.242424) = -14.634; moving 9.0909 + 0.05 * 14.634 / 1.1 = 9.756.
    #[test]
    fn a_push_from_rest_is_gyms() {
        let [place, speed, angle, turn] = next([0.0; 4], true);
        assert_eq!((place, angle), (0.0, 0.0));
        assert!((speed - 0.195_121_95).abs() < 1e-8, "{speed}");
        assert!((turn + 0.292_682_92).abs() < 1e-7, "{turn}");
        let left = next([0.0; 4], false);
        assert_eq!([left[1], left[3]], [-speed, -turn]);
    }

    #[test]
    fn a_pole_that_is_always_pushed_one_way_falls_within_a_dozen_steps() {
        let mut cart = CartPole::new(fabric::seed::rng(1));
        let end = (0..12).find_map(|_| cart.step(true));
        assert_eq!(end, Some(End::Fell));
        assert!((7..=12).contains(&cart.steps()), "{}", cart.steps());
    }

    #[test]
    fn a_pole_that_is_pushed_to_where_it_falls_stands_and_is_stopped() {
        let mut cart = CartPole::new(fabric::seed::rng(1));
        let end = (0..MOST_STEPS).find_map(|_| {
            let [place, speed, angle, turn] = cart.sight();
            cart.step(0.1 * place + 0.3 * speed + 3.0 * angle + turn > 0.0)
        });
        assert_eq!((end, cart.steps()), (Some(End::Stopped), MOST_STEPS));
        cart.reset();
        assert_eq!(cart.steps(), 0);
    }
}
