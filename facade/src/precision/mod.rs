//! Precision: Fabric's names for it, and what each means: a [`Policy`] of four types. Losses that need scaling are
//! [`LossScaler`]'s.

mod scaler;

use std::{fmt, str::FromStr};

use fabric_engine::kernels::Dtype;

use crate::error::{Error, Result};
pub use scaler::{LossNotFinite, LossScaler, LossScalerState};

/// The types in which a model is kept, computes, and is trained.
///
/// | name | param | main | reduce | output | loss scaled |
/// |---|---|---|---|---|---|
/// | `32-true`, `32` | f32 | f32 | f32 | f32 | |
/// | `64-true`, `64` | f64 | f64 | f64 | f64 | |
/// | `bf16-true` | bf16 | bf16 | f32 | bf16 | |
/// | `16-true` | f16 | f16 | f32 | f16 | |
/// | `bf16-mixed` | bf16 | f32 | f32 | f32 | |
/// | `16-mixed` | f16 | f32 | f32 | f32 | yes |
///
/// What the columns mean, [`Policy`] says. `bf16` and `16` alone are old spellings of `bf16-mixed` and `16-mixed`, which
/// Lightning discourages, because they read like `-true`.
///
/// ```
/// use fabric::{engine::kernels::Dtype, precision::Precision};
///
/// let precision: Precision = "BF16-mixed".parse()?;
/// assert_eq!(precision.policy().param, Dtype::BF16);
/// assert_eq!(precision.policy().main, Dtype::F32);
/// assert!(precision.scaler().is_none(), "bf16 has the range of f32");
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// `32-true`: everything in f32.
    F32,
    /// `64-true`: everything in f64.
    F64,
    /// `bf16-true`: everything in bf16, except that gradients are summed in f32.
    BF16,
    /// `16-true`: everything in f16, except that gradients are summed in f32.
    F16,
    /// `bf16-mixed`: computed in bf16, kept and updated in f32.
    BF16Mixed,
    /// `16-mixed`: computed in f16 on a scaled loss, kept and updated in f32.
    F16Mixed,
}

/// The type of each thing in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What the model computes with: its parameters and activations.
    pub param: Dtype,
    /// What the optimizer updates, and checkpoints hold. Where it is not `param`, the model computes with a cast copy.
    pub main: Dtype,
    /// What gradients are summed in, over micro-batches and ranks.
    pub reduce: Dtype,
    /// What the model's outputs are cast to, for losses and metrics.
    pub output: Dtype,
}

impl Policy {
    /// Whether the model computes with a copy in a smaller type.
    pub fn is_mixed(self) -> bool {
        self.param != self.main
    }
}

impl Precision {
    /// Every precision, in the order of the table.
    pub const ALL: [Self; 6] = [
        Self::F32,
        Self::F64,
        Self::BF16,
        Self::F16,
        Self::BF16Mixed,
        Self::F16Mixed,
    ];

    /// Other spellings, and whether Lightning discourages them.
    const ALIASES: [(&'static str, Self, bool); 4] = [
        ("32", Self::F32, false),
        ("64", Self::F64, false),
        ("bf16", Self::BF16Mixed, true),
        ("16", Self::F16Mixed, true),
    ];

    /// Read Fabric's name of a precision, in any case.
    ///
    /// # Errors
    /// When it is unknown: lists the known.
    pub fn parse(text: &str) -> Result<Self> {
        let asked = text.trim();
        let aliases = Self::ALIASES.map(|(name, precision, _)| (name, precision));
        let names = Self::ALL.map(|precision| (precision.name(), precision));
        let mut known = names.into_iter().chain(aliases);
        let found = known.find(|(name, _)| name.eq_ignore_ascii_case(asked));
        found.map(|(_, precision)| precision).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::argument(
                format!("precision '{text}' is not known"),
                format!("Choose one of {names}"),
            )
        })
    }

    /// Whether a name that [`Precision::parse`] takes is better written out.
    pub fn is_discouraged(text: &str) -> bool {
        let mut aliases = Self::ALIASES.into_iter();
        aliases.any(|(name, _, discouraged)| discouraged && name.eq_ignore_ascii_case(text.trim()))
    }

    /// Fabric's name of it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "32-true",
            Self::F64 => "64-true",
            Self::BF16 => "bf16-true",
            Self::F16 => "16-true",
            Self::BF16Mixed => "bf16-mixed",
            Self::F16Mixed => "16-mixed",
        }
    }

    /// What it means.
    pub const fn policy(self) -> Policy {
        let (param, main) = match self {
            Self::F32 => (Dtype::F32, Dtype::F32),
            Self::F64 => (Dtype::F64, Dtype::F64),
            Self::BF16 => (Dtype::BF16, Dtype::BF16),
            Self::F16 => (Dtype::F16, Dtype::F16),
            Self::BF16Mixed => (Dtype::BF16, Dtype::F32),
            Self::F16Mixed => (Dtype::F16, Dtype::F32),
        };
        Policy {
            param,
            main,
            // A sum over many ranks in eight bits of fraction loses the small ones.
            reduce: main.accumulator(),
            output: main,
        }
    }

    /// The type of parameters and activations: [`Policy::param`].
    pub const fn dtype(self) -> Dtype {
        self.policy().param
    }

    /// The scaler that its loss needs, if it needs one: `16-mixed` does. The small gradients of an f16 loss would be zero;
    /// `16-true` keeps its parameters in f16 too, and is for inference, or whoever knows why not.
    pub fn scaler(self) -> Option<LossScaler> {
        (self == Self::F16Mixed).then(LossScaler::new)
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Precision {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_any_case_and_lead_back() {
        for precision in Precision::ALL {
            assert_eq!(Precision::parse(precision.name()).unwrap(), precision);
            let loud = format!(" {} ", precision.name().to_uppercase());
            assert_eq!(Precision::parse(&loud).unwrap(), precision);
            assert_eq!(precision.to_string(), precision.name());
        }
    }

    #[test]
    fn short_names_mean_what_lightning_says() {
        let read = |text| Precision::parse(text).unwrap();
        assert_eq!((read("32"), read("64")), (Precision::F32, Precision::F64));
        assert_eq!(read("16"), Precision::F16Mixed);
        assert_eq!(read("BF16"), Precision::BF16Mixed);
        assert!(Precision::is_discouraged("16") && Precision::is_discouraged("Bf16"));
        assert!(!Precision::is_discouraged("32") && !Precision::is_discouraged("16-mixed"));
    }

    #[test]
    fn an_unknown_name_is_told_the_known() {
        for text in ["", "8", "16-tru", "transformer-engine"] {
            let said = Precision::parse(text).unwrap_err().to_string();
            let known = "32-true, 64-true, bf16-true, 16-true, bf16-mixed, 16-mixed";
            assert!(said.contains(known), "{said}");
            assert!(said.contains(&format!("'{text}'")), "{said}");
        }
    }

    #[test]
    fn line_39_policies_are_those_of_the_table() {
        let text = |precision: Precision| {
            let Policy {
                param,
                main,
                reduce,
                output,
            } = precision.policy();
            let scaled = if precision.scaler().is_some() {
                "yes |"
            } else {
                "|"
            };
            format!("| {param} | {main} | {reduce} | {output} | {scaled}")
        };
        let source = include_str!("mod.rs");
        for precision in Precision::ALL {
            let row = format!("/// | `{}`", precision.name());
            let row = source.lines().find(|line| line.starts_with(&row)).unwrap();
            assert!(
                row.ends_with(&text(precision)),
                "{row} for {}",
                text(precision)
            );
            assert_eq!(
                precision.policy().is_mixed(),
                precision.name().ends_with("mixed")
            );
        }
    }
}
