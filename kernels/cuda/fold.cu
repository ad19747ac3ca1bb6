// Equal to kernels/src/scalar/arithmetic.rs: fold. Folds among f64, f32, f16 and bf16.
#include "folds.cuh"

#define FOLD_INTO(B) FOLD(f64, B) FOLD(f32, B) FOLD(f16, B) FOLD(bf16, B)

FOLD_INTO(f64)
FOLD_INTO(f32)
FOLD_INTO(f16)
FOLD_INTO(bf16)
