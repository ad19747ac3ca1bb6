//! One error type for a whole training program: it takes in any error by `?`, and says itself in plain words.

use std::{error::Error as StdError, fmt};

/// The result of everything in this crate, and of the function given to `fabric.launch`.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any error that ends a training program. `?` turns every error into it; `main() -> fabric::Result<()>` prints it as a
/// sentence, because its `Debug` form is its message.
pub struct Error(Box<dyn StdError + Send + Sync>);

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Message(String);

impl Error {
    /// An error in the program's own words.
    pub fn new(message: impl Into<String>) -> Self {
        Self(Box::new(Message(message.into())))
    }

    /// A mistake in what the program asked for: what is wrong, and what to do instead.
    pub fn argument(what: impl Into<String>, hint: impl Into<String>) -> Self {
        fabric_engine::Error::argument(what, hint).into()
    }

    /// The engine's error, when this is one.
    pub fn engine(&self) -> Option<&fabric_engine::Error> {
        self.0.downcast_ref()
    }

    /// The error as a given type, when it is one.
    pub fn downcast_ref<E: StdError + 'static>(&self) -> Option<&E> {
        self.0.downcast_ref()
    }
}

impl<E: StdError + Send + Sync + 'static> From<E> for Error {
    fn from(error: E) -> Self {
        Self(Box::new(error))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.0.to_string();
        let mut shown = text.clone();
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let next = error.to_string();
            if !shown.contains(&next) {
                text += &format!(": {next}");
                shown = next;
            }
            cause = error.source();
        }
        f.write_str(&text) // in one piece, so that ranks which share a terminal do not cut each other's sentences
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Return early with an [`Error`] in the program's own words: `bail!("no file at {path}")`.
#[macro_export]
macro_rules! bail {
    ($($message:tt)*) => {
        return Err($crate::Error::new(format!($($message)*)))
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_error_comes_in_by_the_question_mark() {
        fn parse() -> Result<u32> {
            Ok("x".parse::<u32>()?)
        }
        let error = parse().unwrap_err();
        assert_eq!(format!("{error:?}"), "invalid digit found in string");
        assert!(error.downcast_ref::<std::num::ParseIntError>().is_some());
    }

    #[test]
    fn the_engines_errors_stay_what_they_are() {
        let error = Error::argument("0 devices", "Ask for at least one");
        assert!(matches!(
            error.engine(),
            Some(fabric_engine::Error::Argument { .. })
        ));
    }
}
