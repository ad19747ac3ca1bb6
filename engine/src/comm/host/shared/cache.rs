//! How much the processor keeps near: what fits is stored in the ordinary way, what does not goes past the caches.

const USUAL_BYTES: usize = 16 << 20; // where the system does not say

/// Bytes of the largest cache that the first core has.
pub(super) fn bytes() -> usize {
    (0..8).filter_map(level).max().unwrap_or(USUAL_BYTES)
}

fn level(index: usize) -> Option<usize> {
    let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
    parse(std::fs::read_to_string(path).ok()?.trim())
}

/// "32768K" and the like.
fn parse(text: &str) -> Option<usize> {
    let (number, unit) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    number.parse::<usize>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse("32768K"), Some(32 << 20));
        assert_eq!(parse("512"), Some(512));
        assert_eq!(parse("64M"), Some(64 << 20));
        assert_eq!((parse(""), parse("K"), parse("many")), (None, None, None));
        assert!(bytes() >= 1 << 10);
    }
}
