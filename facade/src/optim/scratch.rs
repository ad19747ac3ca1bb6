//! Room for buffers that cannot lend their memory: they are copied in, updated and copied back. It is kept between steps,
//! so that a training loop which runs evenly allocates nothing.

use fabric_engine::{
    Result,
    buffer::{Buffer, Slab},
    kernels::{Dtype, SpanMut},
};

/// Room for one parameter, and for the copy that a model computes with.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    param: Room,
    copy: Room,
}

impl Scratch {
    /// Call `f` with the memory of `param`, and of `copy`, which it writes entirely: where they lie, or on the way.
    pub(super) fn lend(
        &mut self,
        param: &mut dyn Buffer,
        copy: Option<&mut dyn Buffer>,
        f: impl FnOnce(SpanMut<'_>, Option<SpanMut<'_>>) -> Result<()>,
    ) -> Result<()> {
        let Self {
            param: param_room,
            copy: copy_room,
        } = self;
        param_room.lend(param, Before::Matters, |param| match copy {
            None => f(param, None),
            Some(copy) => copy_room.lend(copy, Before::IsOverwritten, |copy| f(param, Some(copy))),
        })
    }
}

/// What a buffer holds before it is lent.
enum Before {
    Matters,
    IsOverwritten,
}

/// Memory that grows to the largest buffer it was needed for.
#[derive(Debug, Default)]
struct Room(Option<Slab>);

impl Room {
    fn lend(
        &mut self,
        buffer: &mut dyn Buffer,
        before: Before,
        f: impl FnOnce(SpanMut<'_>) -> Result<()>,
    ) -> Result<()> {
        if let Some(span) = buffer.span_mut() {
            return f(span);
        }
        let all = 0..buffer.numel();
        let slab = self.of(buffer.dtype(), all.end);
        if let Before::Matters = before {
            buffer.read(all.clone(), slab.part_mut(all.clone()))?;
        }
        f(slab.part_mut(all.clone()))?;
        buffer.write(all.clone(), slab.part(all))
    }

    /// At least `numel` elements of `dtype`, whatever they hold.
    fn of(&mut self, dtype: Dtype, numel: usize) -> &mut Slab {
        let bytes = numel * dtype.size();
        let kept = self.0.take().filter(|slab| slab.bytes() >= bytes);
        // Whole words, so that the next buffer may be of any type.
        let words = || Slab::zeroed(Dtype::U64, bytes.div_ceil(Dtype::U64.size()));
        self.0.insert(kept.unwrap_or_else(words).recast(dtype))
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use fabric_engine::kernels::{self, Span};

    use super::*;

    /// A buffer that copies and does not lend.
    struct Shy(Vec<f32>);

    impl Buffer for Shy {
        fn dtype(&self) -> Dtype {
            Dtype::F32
        }
        fn numel(&self) -> usize {
            self.0.len()
        }
        fn read(&self, range: Range<usize>, into: SpanMut<'_>) -> Result<()> {
            self.0.read(range, into)
        }
        fn write(&mut self, range: Range<usize>, from: Span<'_>) -> Result<()> {
            self.0.write(range, from)
        }
    }

    #[test]
    fn what_cannot_be_lent_is_copied_there_and_back_through_memory_that_stays() {
        let mut scratch = Scratch::default();
        let mut places = Vec::new();
        for numel in [5, 3, 5] {
            let (mut param, mut copy) = (Shy(vec![1.0; numel]), Shy(vec![0.0; numel]));
            let result = scratch.lend(&mut param, Some(&mut copy), |mut param, copy| {
                places.push((param.as_ptr(), copy.as_ref().unwrap().as_ptr()));
                kernels::fill(param.reborrow(), 2.0).unwrap();
                kernels::cast(param.as_span(), copy.unwrap()).unwrap();
                Ok(())
            });
            result.unwrap();
            assert_eq!((param.0, copy.0), (vec![2.0; numel], vec![2.0; numel]));
        }
        assert!(places.iter().all(|place| *place == places[0]));
    }

    #[test]
    fn room_serves_every_type_in_turn() {
        let mut room = Room::default();
        for (dtype, numel) in [
            (Dtype::U8, 3),
            (Dtype::F64, 4),
            (Dtype::BF16, 7),
            (Dtype::F32, 0),
        ] {
            let slab = room.of(dtype, numel);
            assert_eq!(slab.dtype(), dtype);
            assert!(slab.numel() >= numel);
        }
    }
}
