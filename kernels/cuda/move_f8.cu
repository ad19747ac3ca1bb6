// Equal to kernels/src/scalar/arithmetic.rs: cast_scaled. Casts from or into f8e4m3 or f8e5m2: a file of their own,
// because compute capability 8.9 and later convert them in hardware.
#include "moves.cuh"

MOVE(f64, f8e4m3)
MOVE(f64, f8e5m2)
MOVE(f32, f8e4m3)
MOVE(f32, f8e5m2)
MOVE(f16, f8e4m3)
MOVE(f16, f8e5m2)
MOVE(bf16, f8e4m3)
MOVE(bf16, f8e5m2)
MOVE(f8e4m3, f64)
MOVE(f8e4m3, f32)
MOVE(f8e4m3, f16)
MOVE(f8e4m3, bf16)
MOVE(f8e4m3, f8e4m3)
MOVE(f8e4m3, f8e5m2)
MOVE(f8e5m2, f64)
MOVE(f8e5m2, f32)
MOVE(f8e5m2, f16)
MOVE(f8e5m2, bf16)
MOVE(f8e5m2, f8e4m3)
MOVE(f8e5m2, f8e5m2)
