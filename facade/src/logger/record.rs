//! TFRecord, the frame around each event: its length, a checksum of that, the bytes, and a checksum of those.

use crate::{Error, Result};

const HEAD: usize = 12; // bytes: length, checksum

/// TFRecord's checksum: CRC-32C, rotated and moved, because data that holds its own checksums would defeat the plain one.
pub fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// `bytes` as a record.
pub(super) fn framed(bytes: &[u8]) -> Vec<u8> {
    let len = (bytes.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(HEAD + bytes.len() + 4);
    record.extend(len);
    record.extend(checksum(&len).to_le_bytes());
    record.extend(bytes);
    record.extend(checksum(bytes).to_le_bytes());
    record
}

/// The records in a file's bytes, every checksum checked.
///
/// # Errors
/// At the first that is damaged or cut off: says where.
pub fn read_records(bytes: &[u8]) -> Result<Vec<&[u8]>> {
    let mut records = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let at = bytes.len() - rest.len();
        let record = one(rest).ok_or_else(|| {
            Error::argument(
                format!("the record at byte {at} is damaged or cut off"),
                "What comes before it can be read: its writer was killed, or its disk is full",
            )
        })?;
        records.push(record);
        rest = &rest[HEAD + record.len() + 4..];
    }
    Ok(records)
}

fn one(bytes: &[u8]) -> Option<&[u8]> {
    let (len, rest) = bytes.split_first_chunk::<8>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    if checksum(len) != u32::from_le_bytes(*sum) {
        return None;
    }
    let (record, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
    let (sum, _) = rest.split_first_chunk::<4>()?;
    (checksum(record) == u32::from_le_bytes(*sum)).then_some(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_damaged_bit_is_seen() {
        let file = [framed(b"first"), framed(b""), framed(b"third")].concat();
        assert_eq!(read_records(&file).unwrap(), [&b"first"[..], b"", b"third"]);
        for bit in 0..file.len() * 8 {
            let mut damaged = file.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(read_records(&damaged).is_err(), "bit {bit}");
        }
        let cut = read_records(&file[..file.len() - 1]).unwrap_err();
        assert!(cut.to_string().contains("at byte 37"), "{cut}");
    }

    #[test]
    fn the_checksum_is_that_of_other_writers() {
        // The head of every file that torch's SummaryWriter begins: 24 bytes follow.
        let len = 24u64.to_le_bytes();
        assert_eq!(checksum(&len).to_le_bytes(), [0xa3, 0x7f, 0x4b, 0x22]);
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283); // RFC 3720
    }
}
