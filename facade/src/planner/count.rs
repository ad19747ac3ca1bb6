//! Numbers as people write them on a command line.

use crate::error::{Error, Result};

/// Read "70b", "1.3B", "350m", "124k", "1t", "1_000_000" or "80".
///
/// # Errors
/// When it is no positive number.
pub fn parse_count(text: &str) -> Result<usize> {
    let plain = text.trim().replace('_', "").to_ascii_lowercase();
    let (digits, factor) = match plain.chars().last() {
        Some('k') => (&plain[..plain.len() - 1], 1e3),
        Some('m') => (&plain[..plain.len() - 1], 1e6),
        Some('b' | 'g') => (&plain[..plain.len() - 1], 1e9),
        Some('t') => (&plain[..plain.len() - 1], 1e12),
        _ => (&plain[..], 1.0),
    };
    let number = digits.parse::<f64>().ok().map(|number| number * factor);
    let whole = number.filter(|number| *number >= 1.0 && *number < 1e18);
    whole.map(|number| number.round() as usize).ok_or_else(|| {
        Error::argument(
            format!("'{text}' is no number"),
            "Write it like 70b, 1.3b, 350m, 124k or 80",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_as_people_write_them() {
        for (text, count) in [
            ("70b", 70_000_000_000),
            ("1.3B", 1_300_000_000),
            (" 350m ", 350_000_000),
            ("1_000", 1000),
            ("1T", 1_000_000_000_000),
            ("80", 80),
        ] {
            assert_eq!(parse_count(text).unwrap(), count);
        }
        for text in ["", "b", "-3", "0", "many", "1e30", "nan"] {
            let error = parse_count(text).unwrap_err().to_string();
            assert!(error.contains("Write it like 70b"), "{error}");
        }
    }
}
