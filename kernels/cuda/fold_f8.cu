// Equal to kernels/src/scalar/arithmetic.rs: fold. Folds from or into f8e4m3 or f8e5m2.
#include "folds.cuh"

FOLD(f8e4m3, f64)
FOLD(f8e4m3, f32)
FOLD(f8e4m3, f16)
FOLD(f8e4m3, bf16)
FOLD(f8e5m2, f64)
FOLD(f8e5m2, f32)
FOLD(f8e5m2, f16)
FOLD(f8e5m2, bf16)

#define FOLD_INTO(B) FOLD(f64, B) FOLD(f32, B) FOLD(f16, B) FOLD(bf16, B) FOLD(f8e4m3, B) FOLD(f8e5m2, B)

FOLD_INTO(f8e4m3)
FOLD_INTO(f8e5m2)
