//! Which bytes of an arena are taken: best fit over the gaps, which are joined again when their neighbours come back.

use std::{collections::BTreeMap, ops::Range};

use crate::buffer::{SLAB_ALIGN, align_of_slab};

/// The free bytes of a range.
#[derive(Debug)]
pub(super) struct Space {
    gaps: BTreeMap<usize, usize>, // start to length, never neighbours, all below `fresh`
    fresh: usize,                 // from here on nothing was ever taken
    end: usize,
}

/// A piece that was taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) start: usize,
    pub(super) bytes: usize, // rounded up
    pub(super) used: bool,   // was taken before, so that it is not zero any more
}

impl Space {
    pub(super) fn new(start: usize, end: usize) -> Self {
        assert!(
            start.is_multiple_of(SLAB_ALIGN),
            "a space starts at a whole slab"
        );
        Self {
            gaps: BTreeMap::new(),
            fresh: start,
            end,
        }
    }

    /// At least `bytes` bytes, aligned as slabs are; `None` when there is no such piece.
    pub(super) fn take(&mut self, bytes: usize) -> Option<Taken> {
        let align = align_of_slab(bytes);
        let bytes = bytes.max(1).checked_next_multiple_of(align)?;
        let fits = |&(start, length): &(usize, usize)| {
            let skip = start.next_multiple_of(align) - start;
            length >= skip && length - skip >= bytes
        };
        let gaps = self.gaps.iter().map(|(start, length)| (*start, *length));
        if let Some((gap, length)) = gaps.filter(fits).min_by_key(|(_, length)| *length) {
            self.gaps.remove(&gap);
            let start = gap.next_multiple_of(align);
            self.leave(gap..start);
            self.leave(start + bytes..gap + length);
            return Some(Taken {
                start,
                bytes,
                used: true,
            });
        }
        let start = self.fresh.checked_next_multiple_of(align)?;
        let after = start
            .checked_add(bytes)
            .filter(|after| *after <= self.end)?;
        let skipped = std::mem::replace(&mut self.fresh, after)..start;
        if !skipped.is_empty() {
            self.give(skipped.start, skipped.len());
        }
        Some(Taken {
            start,
            bytes,
            used: false,
        })
    }

    /// What is left of a gap, whose neighbours are taken.
    fn leave(&mut self, rest: Range<usize>) {
        if !rest.is_empty() {
            self.gaps.insert(rest.start, rest.len());
        }
    }

    /// Give a piece back.
    pub(super) fn give(&mut self, mut start: usize, mut bytes: usize) {
        if let Some((&left, &length)) = self.gaps.range(..start).next_back() {
            assert!(left + length <= start, "a piece is given back once");
            if left + length == start {
                self.gaps.remove(&left);
                start = left;
                bytes += length;
            }
        }
        if let Some(length) = self.gaps.remove(&(start + bytes)) {
            bytes += length;
        }
        self.gaps.insert(start, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_best_gap_is_taken_and_neighbours_are_joined() {
        let mut space = Space::new(128, 128 + 10 * 128);
        let pieces = [256, 128, 512, 128].map(|bytes| space.take(bytes).unwrap());
        assert_eq!(pieces[3].start, 128 + 7 * 128);
        space.give(pieces[0].start, pieces[0].bytes);
        space.give(pieces[2].start, pieces[2].bytes);
        assert_eq!(space.take(200).unwrap().start, pieces[0].start);
        space.give(pieces[0].start, pieces[0].bytes);
        space.give(pieces[1].start, pieces[1].bytes);
        assert_eq!(space.gaps, BTreeMap::from([(128, 7 * 128)]));
        assert_eq!(space.take(3 * 128 + 1).unwrap().start, 128);
        assert_eq!(space.take(4 * 128), None);
        assert_eq!(space.take(usize::MAX), None);
    }

    proptest! {
        /// Goal: no byte is taken twice, and all come back. Method: random takes and gives against a list.
        #[test]
        fn pieces_never_overlap(moves in prop::collection::vec((any::<bool>(), prop_oneof![0usize..2000, 0usize..50_000], any::<prop::sample::Index>()), 1..200)) {
            let end = 512 << 10;
            let mut space = Space::new(0, end);
            let mut held: Vec<Taken> = Vec::new();
            for (take, bytes, index) in moves {
                if take || held.is_empty() {
                    if let Some(piece) = space.take(bytes) {
                        prop_assert!(piece.bytes >= bytes && piece.start + piece.bytes <= end);
                        prop_assert!(piece.start.is_multiple_of(align_of_slab(bytes)));
                        for other in &held {
                            prop_assert!(piece.start + piece.bytes <= other.start || other.start + other.bytes <= piece.start);
                        }
                        held.push(piece);
                    }
                } else {
                    let piece = held.swap_remove(index.index(held.len()));
                    space.give(piece.start, piece.bytes);
                }
            }
            for piece in held {
                space.give(piece.start, piece.bytes);
            }
            prop_assert!(space.gaps.len() <= 1);
        }
    }
}
