//! The fifteen element types that kernels know, and the Rust type that stands for each.

use std::fmt;

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};

/// What one element is. The discriminant travels on wires and in files: append, never renumber.
#[repr(u8)]
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dtype {
    /// IEEE double.
    F64,
    /// IEEE single.
    F32,
    /// IEEE half: 5 exponent bits, 10 fraction bits.
    F16,
    /// The upper half of an f32: 8 exponent bits, 7 fraction bits.
    BF16,
    /// OCP "fn" format: 4 exponent bits, 3 fraction bits, no infinity, one NaN a sign, largest 448.
    F8E4M3,
    /// 5 exponent bits, 2 fraction bits, IEEE-like with infinities, largest finite 57344.
    F8E5M2,
    /// Signed, 8 bits.
    I8,
    /// Signed, 16 bits.
    I16,
    /// Signed, 32 bits.
    I32,
    /// Signed, 64 bits.
    I64,
    /// Unsigned, 8 bits.
    U8,
    /// Unsigned, 16 bits.
    U16,
    /// Unsigned, 32 bits.
    U32,
    /// Unsigned, 64 bits.
    U64,
    /// One byte: zero is false, anything else true; kernels write 0 or 1.
    Bool,
}

impl Dtype {
    /// Every dtype, in the order of its code.
    pub const ALL: [Dtype; 15] = [
        Dtype::F64,
        Dtype::F32,
        Dtype::F16,
        Dtype::BF16,
        Dtype::F8E4M3,
        Dtype::F8E5M2,
        Dtype::I8,
        Dtype::I16,
        Dtype::I32,
        Dtype::I64,
        Dtype::U8,
        Dtype::U16,
        Dtype::U32,
        Dtype::U64,
        Dtype::Bool,
    ];

    /// The dtype called `name`, as [`Dtype::name`] spells it.
    pub fn from_name(name: &str) -> Option<Dtype> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// The dtype whose [`Dtype::code`] is `code`.
    pub fn from_code(code: u8) -> Option<Dtype> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// Bytes of one element, which is also its alignment in bytes.
    #[inline]
    pub const fn size(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 | Dtype::U64 => 8,
            Dtype::F32 | Dtype::I32 | Dtype::U32 => 4,
            Dtype::F16 | Dtype::BF16 | Dtype::I16 | Dtype::U16 => 2,
            Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::I8 | Dtype::U8 | Dtype::Bool => 1,
        }
    }

    /// The short lower-case name: `"f32"`, `"f8e4m3"`, `"bool"`.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F64 => "f64",
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::BF16 => "bf16",
            Dtype::F8E4M3 => "f8e4m3",
            Dtype::F8E5M2 => "f8e5m2",
            Dtype::I8 => "i8",
            Dtype::I16 => "i16",
            Dtype::I32 => "i32",
            Dtype::I64 => "i64",
            Dtype::U8 => "u8",
            Dtype::U16 => "u16",
            Dtype::U32 => "u32",
            Dtype::U64 => "u64",
            Dtype::Bool => "bool",
        }
    }

    /// The byte that stands for this dtype on a wire.
    #[inline]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// One of the six floating-point types.
    #[inline]
    pub const fn is_float(self) -> bool {
        matches!(
            self,
            Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F8E4M3 | Dtype::F8E5M2
        )
    }

    /// One of the eight integer types; bool is not one.
    #[inline]
    pub const fn is_integer(self) -> bool {
        !self.is_float() && !matches!(self, Dtype::Bool)
    }

    /// The type in which sums of this one are kept: f64 for f64, f32 for every smaller float, itself otherwise.
    #[inline]
    pub const fn accumulator(self) -> Dtype {
        match self {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F8E4M3 | Dtype::F8E5M2 => Dtype::F32,
            other => other,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Where elements lie.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Memory {
    /// Addressable by the processor.
    Host,
    /// Memory of the CUDA device with this ordinal.
    Cuda(u32),
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Memory::Host => f.pad("host"),
            Memory::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// The bits of one [`Dtype::F8E4M3`].
#[repr(transparent)]
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct F8E4M3(pub u8);

/// The bits of one [`Dtype::F8E5M2`].
#[repr(transparent)]
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct F8E5M2(pub u8);

/// The byte of one [`Dtype::Bool`]: zero is false, anything else true.
///
/// Unlike `bool` every byte is a valid value, so it can be read from memory that someone else wrote. Equality compares
/// bytes; [`Bool::get`] compares meaning.
#[repr(transparent)]
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Bool(pub u8);

impl Bool {
    /// What the byte means.
    #[inline]
    pub const fn get(self) -> bool {
        self.0 != 0
    }
}

impl From<bool> for Bool {
    #[inline]
    fn from(value: bool) -> Self {
        Bool(u8::from(value))
    }
}

/// A Rust type that is one of the dtypes. Its size and its alignment are [`Dtype::size`].
pub trait Element: Pod + Send + Sync + 'static {
    /// The dtype this type stands for.
    const DTYPE: Dtype;
}

macro_rules! elements {
    ($($element:ty => $dtype:ident),* $(,)?) => {$(
        impl Element for $element {
            const DTYPE: Dtype = Dtype::$dtype;
        }
        const _: () = assert!(size_of::<$element>() == Dtype::$dtype.size());
        const _: () = assert!(align_of::<$element>() <= Dtype::$dtype.size());
    )*};
}

elements! {
    f64 => F64, f32 => F32, f16 => F16, bf16 => BF16, F8E4M3 => F8E4M3, F8E5M2 => F8E5M2,
    i8 => I8, i16 => I16, i32 => I32, i64 => I64, u8 => U8, u16 => U16, u32 => U32, u64 => U64,
    Bool => Bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_codes_lead_back_to_their_dtype() {
        for (index, dtype) in Dtype::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(dtype.code()), index);
            assert_eq!(Dtype::from_code(dtype.code()), Some(dtype));
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
            assert_eq!(dtype.to_string(), dtype.name());
        }
        assert_eq!(Dtype::from_code(15), None);
        assert_eq!(Dtype::from_name("float32"), None);
    }

    #[test]
    fn six_floats_eight_integers_one_bool() {
        assert_eq!(Dtype::ALL.iter().filter(|d| d.is_float()).count(), 6);
        assert_eq!(Dtype::ALL.iter().filter(|d| d.is_integer()).count(), 8);
        assert!(!Dtype::Bool.is_float() && !Dtype::Bool.is_integer());
    }

    #[test]
    fn accumulators_widen_small_floats_only() {
        for dtype in Dtype::ALL {
            let expected = if dtype.is_float() && dtype.size() < 4 {
                Dtype::F32
            } else {
                dtype
            };
            assert_eq!(dtype.accumulator(), expected);
        }
    }
}
