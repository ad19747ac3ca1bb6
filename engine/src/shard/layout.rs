//! How several tensors lie in one flat slab.

use std::ops::Range;

use super::ParamId;

/// Parameters and their element ranges in a slab, in the order in which they lie there. What is between them, and behind
/// the last, is padding.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    entries: Vec<(ParamId, Range<usize>)>,
    numel: usize, // up to the end of the last
}

impl Layout {
    /// Put `numel` elements of `param` behind everything else.
    pub fn push(&mut self, param: ParamId, numel: usize) {
        self.push_at(param, self.numel, numel);
    }

    /// Put `numel` elements of `param` at `start`, behind everything else.
    ///
    /// # Panics
    /// When something lies there.
    pub fn push_at(&mut self, param: ParamId, start: usize, numel: usize) {
        assert!(start >= self.numel, "{start} is taken");
        self.entries.push((param, start..start + numel));
        self.numel = start + numel;
    }

    /// Elements up to the end of the last parameter.
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// The parameters and where they lie.
    pub fn entries(&self) -> &[(ParamId, Range<usize>)] {
        &self.entries
    }

    /// Elements of parameters within `range`.
    pub fn filled(&self, range: &Range<usize>) -> usize {
        let within = |(_, entry): &(ParamId, Range<usize>)| {
            let (start, end) = (entry.start.max(range.start), entry.end.min(range.end));
            end.saturating_sub(start)
        };
        self.entries.iter().map(within).sum()
    }

    /// The padding, in a slab of `padded` elements.
    pub fn gaps(&self, padded: usize) -> impl Iterator<Item = Range<usize>> {
        let starts = self.entries.iter().map(|(_, range)| range.start);
        let ends = self.entries.iter().map(|(_, range)| range.end);
        let gaps = std::iter::once(0).chain(ends).zip(starts.chain([padded]));
        gaps.filter(|(end, start)| end < start)
            .map(|(end, start)| end..start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_parameter_is_a_gap() {
        let mut layout = Layout::default();
        layout.push(ParamId(2), 3);
        layout.push_at(ParamId(0), 5, 2);
        layout.push(ParamId(1), 0);
        assert_eq!(layout.gaps(10).collect::<Vec<_>>(), [3..5, 7..10]);
        assert_eq!(layout.gaps(7).next(), Some(3..5));
        assert_eq!(layout.gaps(7).count(), 1);
        assert_eq!((layout.numel(), layout.filled(&(1..6))), (7, 3));
    }
}
