// What becomes of an element into which another is folded. Equal to kernels/src/scalar/arithmetic.rs: fold. What is done
// is known at run time only, which costs a branch that a whole grid takes together.
#pragma once
#include "walk.cuh"

// Codes of the operations; what is none of the first three is the larger.
const u32 SUM = 0, PROD = 1, MIN = 2;

// NaN if either is, else the smaller, -0 before +0. Equal numbers have equal bits, but for the zeros, of which either's
// sign is the result's.
DEVICE float smaller(float a, float b) {
#ifdef __CUDA_ARCH__
    float least;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
    return least;
#endif
    if (a == b) return float_of(bits_of(a) | bits_of(b));
    return a < b || a != a ? a : b;
}
DEVICE double smaller(double a, double b) {
    if (a == b) return bits_as<double>(bits_as<u64>(a) | bits_as<u64>(b));
    return a < b || a != a ? a : b;
}

// into = into op from, in the accumulator of the two types.
template <class A, class B> struct Folded {
    typedef A From;
    typedef B Into;
    typedef typename Wide<typename A::Acc, typename B::Acc>::Acc C;
    static const bool LOADS = true, READS = true;
    static const u32 VECTORS = Lanes<A, B>::V < 8 ? 2 : 1, SINGLES = 1;
    u32 op;

    METHOD void enter(u32) {}

    template <u32 V> METHOD Raw<V * B::SIZE> run(const Raw<V * A::SIZE>& source, const Raw<V * B::SIZE>& target, u64) const {
        C a[V], b[V];
        decode<B, V>(target, a);
        decode<A, V>(source, b);
        switch (op) {
        case SUM:
            UNROLL
            for (u32 v = 0; v < V; ++v) a[v] = a[v] + b[v];
            break;
        case PROD:
            UNROLL
            for (u32 v = 0; v < V; ++v) a[v] = a[v] * b[v];
            break;
        case MIN:
            UNROLL
            for (u32 v = 0; v < V; ++v) a[v] = smaller(a[v], b[v]);
            break;
        default:
            UNROLL
            for (u32 v = 0; v < V; ++v) a[v] = -smaller(-a[v], -b[v]);
        }
        return encode<B, V>(a);
    }
};

#define FOLD(A, B) \
    KERNEL(fold_##A##_##B, (const Move* table, u32 count, u64 chunks, u32 op), \
           (walk(Folded<A, B>{op}, table, count, chunks)))
