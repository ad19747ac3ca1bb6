// What becomes of an element that is moved. Equal to kernels/src/scalar/arithmetic.rs: cast_scaled.
#pragma once
#include "walk.cuh"

// into = from * scale, in the accumulator of the two types.
template <class A, class B> struct Scaled {
    typedef A From;
    typedef B Into;
    typedef typename Wide<typename A::Acc, typename B::Acc>::Acc C;
    static const bool LOADS = true, READS = false;
    // Where hardware does not convert f8, every element costs a screen of PTX.
    static const bool LONG = A::SIZE == 1 || B::SIZE == 1;
    static const u32 VECTORS = !LONG ? 4 : Lanes<A, B>::V < 8 ? 4 : 16 / Lanes<A, B>::V;
    static const u32 SINGLES = LONG ? 2 : 4;
    C factor;

    METHOD void enter(u32) {}

    template <u32 V> METHOD Raw<V * B::SIZE> run(const Raw<V * A::SIZE>& source, const Raw<V * B::SIZE>&, u64) const {
        C x[V];
        decode<A, V>(source, x);
        UNROLL
        for (u32 v = 0; v < V; ++v) x[v] = x[v] * factor;
        return encode<B, V>(x);
    }
};

template <class A, class B>
DEVICE void move(const Move* table, u32 count, u64 chunks, double scale) {
    typedef typename Scaled<A, B>::C C;
    walk(Scaled<A, B>{(C)scale}, table, count, chunks);
}

#define MOVE(A, B) \
    KERNEL(move_##A##_##B, (const Move* table, u32 count, u64 chunks, double scale), \
           (move<A, B>(table, count, chunks, scale)))
