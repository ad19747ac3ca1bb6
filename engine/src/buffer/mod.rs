//! Memory as the engine meets it: [`Buffer`], all that a tensor must be able to do. What the engine owns itself, and moves
//! into a collective, is a [`Slab`].

mod slab;

use std::{any::Any, ops::Range};

use fabric_kernels::{self as kernels, Dtype, Element, Memory, Span, SpanMut};

use crate::error::{Error, Result};
pub(crate) use slab::align_of_slab;
pub use slab::{Piece, SLAB_ALIGN, Slab, carve};

/// All that a tensor must be able to do. An implementation either lends its memory ([`Buffer::span`]), which is enough,
/// or copies on demand ([`Buffer::read`], [`Buffer::write`]).
pub trait Buffer {
    /// The type of one element.
    fn dtype(&self) -> Dtype;

    /// How many elements.
    fn numel(&self) -> usize;

    /// Where the elements are.
    fn memory(&self) -> Memory {
        self.span().map_or(Memory::Host, |span| span.memory())
    }

    /// Copy elements `range` to `into` (same length), casting on the way.
    ///
    /// # Errors
    /// When the range or the cast is impossible, or the library refuses.
    fn read(&self, range: Range<usize>, into: SpanMut<'_>) -> Result<()> {
        let span = self.span().ok_or_else(|| neither("read"))?;
        within(&range, span.len())?;
        kernels::cast(span.slice(range), into)
            .map_err(|error| Error::library("read a buffer", error))
    }

    /// Copy `from` to elements `range` (same length), casting on the way.
    ///
    /// # Errors
    /// When the range or the cast is impossible, or the library refuses.
    fn write(&mut self, range: Range<usize>, from: Span<'_>) -> Result<()> {
        let mut span = self.span_mut().ok_or_else(|| neither("write"))?;
        within(&range, span.len())?;
        kernels::cast(from, span.slice(range))
            .map_err(|error| Error::library("write a buffer", error))
    }

    /// What keeps the memory of [`Buffer::span`], unchanged, beyond this borrow, where the library shares it: work of a
    /// device over it may then be put off.
    fn hold(&self) -> Option<Box<dyn Any + Send>> {
        None
    }

    /// The elements themselves, when they lie in one contiguous piece.
    fn span(&self) -> Option<Span<'_>> {
        None
    }

    /// The elements themselves, to change, when they lie in one contiguous piece.
    fn span_mut(&mut self) -> Option<SpanMut<'_>> {
        None
    }
}

fn neither(verb: &str) -> Error {
    Error::argument(
        format!("this buffer neither lends its memory nor implements `{verb}`"),
        "Implement Buffer::span and Buffer::span_mut, or Buffer::read and Buffer::write",
    )
}

fn within(range: &Range<usize>, numel: usize) -> Result<()> {
    if range.start <= range.end && range.end <= numel {
        return Ok(());
    }
    Err(Error::argument(
        format!(
            "elements {}..{} are asked of a buffer of {numel}",
            range.start, range.end
        ),
        "Ask for a range inside the buffer",
    ))
}

impl<T: Element> Buffer for Vec<T> {
    fn dtype(&self) -> Dtype {
        T::DTYPE
    }
    fn numel(&self) -> usize {
        self.len()
    }
    fn span(&self) -> Option<Span<'_>> {
        Some(Span::of(self.as_slice()))
    }
    fn span_mut(&mut self) -> Option<SpanMut<'_>> {
        Some(SpanMut::of(self.as_mut_slice()))
    }
}

impl<T: Element> Buffer for &mut [T] {
    fn dtype(&self) -> Dtype {
        T::DTYPE
    }
    fn numel(&self) -> usize {
        self.len()
    }
    fn span(&self) -> Option<Span<'_>> {
        Some(Span::of(self))
    }
    fn span_mut(&mut self) -> Option<SpanMut<'_>> {
        Some(SpanMut::of(self))
    }
}

impl Buffer for Slab {
    fn dtype(&self) -> Dtype {
        Slab::dtype(self)
    }
    fn numel(&self) -> usize {
        Slab::numel(self)
    }
    fn memory(&self) -> Memory {
        Slab::memory(self)
    }
    fn span(&self) -> Option<Span<'_>> {
        Some(self.whole())
    }
    fn span_mut(&mut self) -> Option<SpanMut<'_>> {
        let all = 0..Slab::numel(self);
        Some(self.part_mut(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_casts_and_refuses_a_range_outside() {
        let values = vec![1.5f32, 2.5];
        let mut into = vec![0f64; 1];
        values.read(1..2, SpanMut::of(&mut into)).unwrap();
        assert_eq!(into, [2.5]);
        assert!(
            values
                .read(1..3, SpanMut::of(&mut into))
                .unwrap_err()
                .to_string()
                .contains("buffer of 2")
        );
    }
}
