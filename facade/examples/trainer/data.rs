//! Handwritten digits, 8 by 8 pixels: 1,797 of them, in a file that is a part of the program.

use fabric::{Error, Result};
use rand::seq::SliceRandom;

pub const PIXELS: usize = 64;
pub const CLASSES: usize = 10;

/// The file: a gzipped table, one row a digit.
pub const ARCHIVE: &[u8] = include_bytes!("../data/digits.csv.gz");

/// An image, each pixel from 0 to 1, and its digit.
#[derive(Clone, Debug)]
pub struct Digit {
    pub pixels: Vec<f32>,
    pub class: usize,
}

/// All that `archive` holds, in an order that hides who wrote them: the last 357 are for testing.
pub fn read(archive: &[u8]) -> Result<(Vec<Digit>, Vec<Digit>)> {
    let mut rows = csv::ReaderBuilder::new();
    let mut rows = rows
        .has_headers(false)
        .from_reader(flate2::read::GzDecoder::new(archive));
    let mut digits = Vec::new();
    for row in rows.deserialize() {
        let row: Vec<u8> = row?;
        let [pixels @ .., class] = &row[..] else {
            return Err(Error::new("an empty row of digits"));
        };
        digits.push(Digit {
            pixels: pixels
                .iter()
                .map(|pixel| f32::from(*pixel) / 16.0)
                .collect(),
            class: usize::from(*class),
        });
    }
    digits.shuffle(&mut fabric::seed::rng(1798));
    let test = digits.split_off(digits.len() - 357);
    Ok((digits, test))
}
