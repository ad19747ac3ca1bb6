//! The factor by which an f16 loss is multiplied, so that small gradients do not become zero: it falls when a gradient
//! overflows, and rises again when none has for a while. Pure: who computes, and who finds infinities, is elsewhere.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// torch's dynamic loss scale: 65536 at first; halved when a step's gradients are not all finite, doubled after 2000 steps
/// in a row whose gradients are.
///
/// All factors are powers of two. Multiplying by one, and dividing by it again, changes no bit of a number that stays in
/// range, so that the scale's history leaves no trace in training.
///
/// ```
/// use fabric::precision::LossScaler;
///
/// let mut scaler = LossScaler::new().initial_scale(1024.0)?.growth_interval(2)?;
/// scaler.update(true)?; // an infinity: the step was skipped
/// assert_eq!(scaler.scale(), 512.0);
/// scaler.update(false)?;
/// scaler.update(false)?;
/// assert_eq!(scaler.scale(), 1024.0);
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LossScaler {
    state: LossScalerState,
    growth: f64,
    back_off: f64,
    interval: u32,
}

/// What a checkpoint holds of a [`LossScaler`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScalerState {
    /// The scale.
    pub scale: f64,
    /// Steps in a row, since the scale last changed, whose gradients were finite.
    pub finite_steps: u32,
}

/// The scale has fallen to [`LossScaler::LOWEST`], and gradients still are not finite.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error(
    "the loss is not finite whatever the scale: it was lowered to {scale:e}, and gradients still hold infinities or NaN. \
     Look at the loss itself and at the learning rate; an input may hold NaN; or train in bf16-mixed, which overflows \
     where f32 does"
)]
pub struct LossNotFinite {
    /// The scale that was too much.
    pub scale: f64,
}

impl LossScaler {
    /// The lowest scale, 2^-24. An f16 gradient that overflows even so is beyond 2^40 without a scale, and no fault of the
    /// scale's.
    pub const LOWEST: f64 = 1.0 / (1 << 24) as f64;

    /// The highest scale, 2^64. Were all gradients zero it would grow for ever; this far, it and its inverse are ordinary
    /// f32 numbers, and so is a loss times it.
    pub const HIGHEST: f64 = (1u128 << 64) as f64;

    /// With torch's numbers.
    pub fn new() -> Self {
        Self {
            state: LossScalerState {
                scale: 65536.0,
                finite_steps: 0,
            },
            growth: 2.0,
            back_off: 0.5,
            interval: 2000,
        }
    }

    /// Beginning with this scale.
    ///
    /// # Errors
    /// Unless it is a power of two from [`LossScaler::LOWEST`] to [`LossScaler::HIGHEST`].
    pub fn initial_scale(mut self, scale: f64) -> Result<Self> {
        check_scale(scale)?;
        self.state.scale = scale;
        Ok(self)
    }

    /// Rising by this factor.
    ///
    /// # Errors
    /// Unless it is a power of two above 1.
    pub fn growth_factor(mut self, factor: f64) -> Result<Self> {
        if !(is_power_of_two(factor) && factor > 1.0) {
            return Err(Error::argument(
                format!("a loss scale that grows by the factor {factor}"),
                "Give a power of two above 1: 2, or 4",
            ));
        }
        self.growth = factor;
        Ok(self)
    }

    /// Falling by this factor.
    ///
    /// # Errors
    /// Unless it is a power of two below 1.
    pub fn back_off_factor(mut self, factor: f64) -> Result<Self> {
        if !(is_power_of_two(factor) && factor < 1.0) {
            return Err(Error::argument(
                format!("a loss scale that falls by the factor {factor}"),
                "Give a power of two below 1: 0.5, or 0.25",
            ));
        }
        self.back_off = factor;
        Ok(self)
    }

    /// Rising after so many steps in a row with finite gradients.
    ///
    /// # Errors
    /// When it is zero.
    pub fn growth_interval(mut self, steps: u32) -> Result<Self> {
        if steps == 0 {
            return Err(Error::argument(
                "a loss scale that grows after 0 steps",
                "Give at least 1",
            ));
        }
        self.interval = steps;
        Ok(self)
    }

    /// What the loss is to be multiplied by now, and its gradients divided by.
    pub fn scale(&self) -> f64 {
        self.state.scale
    }

    /// After a step: whether its gradients held an infinity or NaN, in which case it was skipped. All ranks must say the
    /// same.
    ///
    /// # Errors
    /// [`LossNotFinite`], when they did and the scale cannot fall any further. It stays where it is.
    pub fn update(&mut self, found_inf: bool) -> Result<(), LossNotFinite> {
        let state = &mut self.state;
        if found_inf {
            if state.scale <= Self::LOWEST {
                return Err(LossNotFinite { scale: state.scale });
            }
            state.scale = (state.scale * self.back_off).max(Self::LOWEST);
            state.finite_steps = 0;
            return Ok(());
        }
        state.finite_steps += 1; // below the interval before, a u32
        if state.finite_steps >= self.interval {
            state.scale = (state.scale * self.growth).min(Self::HIGHEST);
            state.finite_steps = 0;
        }
        Ok(())
    }

    /// What to save.
    pub fn state(&self) -> LossScalerState {
        self.state
    }

    /// Go on from a saved state, with this scaler's own factors.
    ///
    /// # Errors
    /// When no scaler can have been in that state; nothing is changed then.
    pub fn load_state(&mut self, state: LossScalerState) -> Result<()> {
        check_scale(state.scale)?;
        self.state = LossScalerState {
            // A shorter interval than the saved scaler's is over at the next step.
            finite_steps: state.finite_steps.min(self.interval - 1),
            ..state
        };
        Ok(())
    }
}

impl Default for LossScaler {
    fn default() -> Self {
        Self::new()
    }
}

fn check_scale(scale: f64) -> Result<()> {
    let range = LossScaler::LOWEST..=LossScaler::HIGHEST;
    if is_power_of_two(scale) && range.contains(&scale) {
        return Ok(());
    }
    Err(Error::argument(
        format!("a loss scale of {scale}"),
        "Give a power of two from 2^-24 to 2^64, like 65536",
    ))
}

/// Positive, normal, and without a bit of fraction.
fn is_power_of_two(value: f64) -> bool {
    const FRACTION: u64 = (1 << 52) - 1;
    value.is_normal() && value > 0.0 && value.to_bits() & FRACTION == 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn line_38_the_scale_is_torchs() {
        let mut scaler = LossScaler::default();
        assert_eq!(scaler.scale(), 65536.0);
        for _ in 0..1999 {
            scaler.update(false).unwrap();
        }
        assert_eq!(scaler.scale(), 65536.0);
        scaler.update(false).unwrap();
        assert_eq!(scaler.scale(), 131_072.0);
        for _ in 0..1999 {
            scaler.update(false).unwrap();
        }
        scaler.update(true).unwrap(); // begins to count anew
        assert_eq!(scaler.scale(), 65536.0);
        scaler.update(false).unwrap();
        assert_eq!(scaler.state().finite_steps, 1);
        assert_eq!(scaler.scale(), 65536.0);
    }

    #[test]
    fn a_loss_that_is_never_finite_ends_in_an_error() {
        let mut scaler = LossScaler::new().initial_scale(1.0).unwrap();
        for _ in 0..24 {
            scaler.update(true).unwrap();
        }
        assert_eq!(scaler.scale(), LossScaler::LOWEST);
        scaler.update(false).unwrap(); // the floor itself is a scale like any other
        for _ in 0..2 {
            let error = scaler.update(true).unwrap_err();
            assert_eq!(error.scale, LossScaler::LOWEST);
            assert!(error.to_string().contains("not finite whatever the scale"));
            assert!(error.to_string().contains("bf16-mixed"));
        }
        let taken_in: Error = scaler.update(true).unwrap_err().into();
        assert!(taken_in.downcast_ref::<LossNotFinite>().is_some());
    }

    #[test]
    fn nonsense_is_refused() {
        let new = LossScaler::new;
        for scale in [
            0.0,
            -2.0,
            3.0,
            f64::NAN,
            f64::INFINITY,
            1e-300,
            2f64.powi(65),
            2f64.powi(-25),
        ] {
            let text = new().initial_scale(scale).unwrap_err().to_string();
            assert!(text.contains("a power of two from 2^-24 to 2^64"), "{text}");
            let state = LossScalerState {
                scale,
                finite_steps: 3,
            };
            let mut scaler = new();
            assert!(scaler.load_state(state).is_err());
            assert_eq!(scaler, new());
        }
        for factor in [1.0, 0.5, 1.5, f64::INFINITY, f64::NAN] {
            assert!(new().growth_factor(factor).is_err(), "{factor}");
        }
        for factor in [1.0, 2.0, 0.0, -0.5, 0.3, f64::NAN] {
            assert!(new().back_off_factor(factor).is_err(), "{factor}");
        }
        assert!(new().growth_interval(0).is_err());
    }

    #[test]
    fn a_state_goes_through_a_checkpoint() {
        let mut scaler = LossScaler::new().growth_interval(10).unwrap();
        for found in [true, false, false] {
            scaler.update(found).unwrap();
        }
        let text = serde_json::to_string(&scaler.state()).unwrap();
        let mut other = LossScaler::new().growth_interval(2).unwrap();
        other
            .load_state(serde_json::from_str(&text).unwrap())
            .unwrap();
        assert_eq!(other.scale(), 32768.0);
        other.update(false).unwrap();
        assert_eq!(other.scale(), 65536.0, "two finite steps and more");
        let worst = LossScalerState {
            scale: 1.0,
            finite_steps: u32::MAX,
        };
        other.load_state(worst).unwrap();
        other.update(false).unwrap();
        assert_eq!(other.scale(), 2.0);
    }

    proptest! {
        #[test]
        fn the_scale_stays_a_power_of_two_times_what_it_was_within_its_bounds(
            initial in -24i32..=64,
            growth in 1i32..10,
            back_off in -10i32..0,
            interval in 1u32..5,
            found in prop::collection::vec(prop::bool::weighted(0.4), 0..400),
        ) {
            let initial = 2f64.powi(initial);
            let mut scaler = LossScaler::new()
                .initial_scale(initial).unwrap()
                .growth_factor(2f64.powi(growth)).unwrap()
                .back_off_factor(2f64.powi(back_off)).unwrap()
                .growth_interval(interval).unwrap();
            for found in found {
                let before = scaler.clone();
                match scaler.update(found) {
                    Ok(()) if found => prop_assert!(scaler.scale() < before.scale()),
                    Ok(()) => prop_assert!(scaler.scale() >= before.scale()),
                    Err(LossNotFinite { scale }) => {
                        prop_assert!(found && scale == LossScaler::LOWEST);
                        prop_assert_eq!(&scaler, &before);
                    }
                }
                let scale = scaler.scale();
                prop_assert!((LossScaler::LOWEST..=LossScaler::HIGHEST).contains(&scale));
                prop_assert_eq!((scale / initial).log2().fract(), 0.0);
                prop_assert!(((scale as f32).is_normal()) && (1.0 / scale as f32).is_normal());
                let mut copy = LossScaler { state: LossScaler::new().state(), ..scaler.clone() };
                copy.load_state(scaler.state()).unwrap();
                prop_assert_eq!(copy, scaler.clone());
            }
        }
    }
}
