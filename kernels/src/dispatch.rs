//! From a dtype known at run time to a type known at compile time: `match` written once.

/// Runs `body` with `$T` naming the type of a float dtype; other dtypes take the `else` arm.
macro_rules! with_float {
    ($dtype:expr, |$T:ident| $body:expr, else $other:expr) => {
        match $dtype {
            $crate::Dtype::F64 => {
                type $T = f64;
                $body
            }
            small => with_small_float!(small, |$T| $body, else $other),
        }
    };
}

/// As `with_float`, for the five floats whose accumulator is f32.
macro_rules! with_small_float {
    ($dtype:expr, |$T:ident| $body:expr, else $other:expr) => {
        match $dtype {
            $crate::Dtype::F32 => {
                type $T = f32;
                $body
            }
            $crate::Dtype::F16 => {
                type $T = half::f16;
                $body
            }
            $crate::Dtype::BF16 => {
                type $T = half::bf16;
                $body
            }
            $crate::Dtype::F8E4M3 => {
                type $T = $crate::F8E4M3;
                $body
            }
            $crate::Dtype::F8E5M2 => {
                type $T = $crate::F8E5M2;
                $body
            }
            _ => $other,
        }
    };
}

/// Runs `body` with `$A` and `$B` naming the types of two float dtypes, and `$C` the accumulator they share.
macro_rules! with_float_pair {
    ($first:expr, $second:expr, |$A:ident, $B:ident, $C:ident| $body:expr, else $other:expr) => {
        match ($first, $second) {
            ($crate::Dtype::F64, second) => {
                type $A = f64;
                type $C = f64;
                with_float!(second, |$B| $body, else $other)
            }
            (first, $crate::Dtype::F64) => {
                type $B = f64;
                type $C = f64;
                with_small_float!(first, |$A| $body, else $other)
            }
            (first, second) => {
                type $C = f32;
                with_small_float!(first, |$A| with_small_float!(second, |$B| $body, else $other), else $other)
            }
        }
    };
}

/// Runs `body` with `$T` naming the type of an integer dtype; other dtypes take the `else` arm.
macro_rules! with_integer {
    ($dtype:expr, |$T:ident| $body:expr, else $other:expr) => {
        match $dtype {
            $crate::Dtype::I8 => {
                type $T = i8;
                $body
            }
            $crate::Dtype::I16 => {
                type $T = i16;
                $body
            }
            $crate::Dtype::I32 => {
                type $T = i32;
                $body
            }
            $crate::Dtype::I64 => {
                type $T = i64;
                $body
            }
            $crate::Dtype::U8 => {
                type $T = u8;
                $body
            }
            $crate::Dtype::U16 => {
                type $T = u16;
                $body
            }
            $crate::Dtype::U32 => {
                type $T = u32;
                $body
            }
            $crate::Dtype::U64 => {
                type $T = u64;
                $body
            }
            _ => $other,
        }
    };
}
