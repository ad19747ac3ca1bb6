//! Which of two numbers is better: for callbacks that watch a metric.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Whether small or large numbers are good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Mode {
    /// Small ones: a loss.
    #[default]
    Min,
    /// Large ones: an accuracy.
    Max,
}

impl Mode {
    /// Read "min" or "max".
    ///
    /// # Errors
    /// When the text is neither.
    pub fn parse(text: &str) -> Result<Self> {
        match text.trim().to_ascii_lowercase().as_str() {
            "min" => Ok(Self::Min),
            "max" => Ok(Self::Max),
            _ => Err(Error::argument(
                format!("mode '{text}' is not known"),
                "Choose min, where small numbers are good, or max",
            )),
        }
    }

    /// Whether `value` is better than `than` by more than `by`; nothing is better than NaN's being worse than all.
    pub fn is_better(self, value: f64, than: f64, by: f64) -> bool {
        match self {
            _ if value.is_nan() => false,
            _ if than.is_nan() => true,
            Self::Min => value < than - by,
            Self::Max => value > than + by,
        }
    }
}

/// A callback's state as JSON.
pub(super) fn to_state(state: &impl Serialize) -> Result<serde_json::Value> {
    Ok(serde_json::to_value(state)?)
}

/// A callback's state from JSON.
pub(super) fn from_state<T: for<'de> Deserialize<'de>>(
    name: &str,
    state: &serde_json::Value,
) -> Result<T> {
    T::deserialize(state).map_err(|error| {
        Error::argument(
            format!("the saved state of '{name}' does not fit: {error}"),
            "Load the state that the same callback has saved",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn better_is_less_or_more_and_never_nan() {
        assert!(Mode::Min.is_better(0.5, 1.0, 0.25));
        assert!(!Mode::Min.is_better(0.75, 1.0, 0.25), "by more than that");
        assert!(Mode::Max.is_better(2.0, 1.0, 0.5));
        assert!(!Mode::Max.is_better(f64::NAN, 1.0, 0.0));
        assert!(Mode::Min.is_better(9.0, f64::NAN, 0.0));
        assert!(!Mode::Min.is_better(f64::NAN, f64::NAN, 0.0));
        assert_eq!(Mode::parse(" MAX ").unwrap(), Mode::Max);
        assert!(Mode::parse("best").is_err());
    }
}
