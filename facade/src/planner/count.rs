//! Numbers as people write them on a command line.

use crate::error::{Error, Result};

/// Read a count, "70b", "1.3B", "350m", "124k", "1t", "1_000_000" or "80".
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

/// Read an amount of memory: "80g", "80 GB" and "80e9" are powers of 1000, "80gib" of 1024.
///
/// ```
/// use fabric::planner::parse_bytes;
/// assert_eq!(parse_bytes("80gb")?, 80_000_000_000);
/// assert_eq!(parse_bytes("80GiB")?, 80 << 30);
/// # Ok::<(), fabric::Error>(())
/// ```
///
/// # Errors
/// When it is no positive number of bytes.
pub fn parse_bytes(text: &str) -> Result<usize> {
    let plain = text.replace(['_', ' '], "").to_ascii_lowercase();
    let binary = plain.strip_suffix("ib");
    let scaled = binary.or_else(|| plain.strip_suffix('b')).unwrap_or(&plain);
    let base: f64 = if binary.is_some() { 1024.0 } else { 1000.0 };
    let power = scaled.chars().last().and_then(|last| "kmgtp".find(last));
    let digits = &scaled[..scaled.len() - usize::from(power.is_some())];
    let factor = base.powi(power.map_or(0, |power| power as i32 + 1));
    let number = digits.parse::<f64>().ok().map(|number| number * factor);
    let whole = number.filter(|number| *number >= 1.0 && *number < 1e18);
    whole.map(|number| number.round() as usize).ok_or_else(|| {
        Error::argument(
            format!("'{text}' is no amount of memory"),
            "Write it like 80g, 80gb, 80gib or 512m",
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
    #[test]
    fn bytes_are_read_in_powers_of_1000_and_of_1024() {
        for (text, bytes) in [
            ("80g", 80_000_000_000),
            ("80 GB", 80_000_000_000),
            ("80GiB", 80 << 30),
            ("512m", 512_000_000),
            ("1.5tb", 1_500_000_000_000),
            ("1 KiB", 1024),
            ("7", 7),
        ] {
            assert_eq!(parse_bytes(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "b", "ib", "g", "-3g", "0", "lots", "1e30", "3ib g"] {
            let error = parse_bytes(text).unwrap_err().to_string();
            assert!(error.contains("80gib"), "{error}");
        }
    }
}
