// Equal to kernels/src/scalar/arithmetic.rs: clamp. And a constant, which is as many bits as an element has.
#include "walk.cuh"

template <u32 BYTES> struct Bytes {
    static const u32 SIZE = BYTES;
};

// into = bits.
template <u32 BYTES> struct Filled {
    typedef Bytes<BYTES> From;
    typedef Bytes<BYTES> Into;
    static const bool LOADS = false, READS = false;
    static const u32 VECTORS = 4, SINGLES = 4;
    u64 bits; // repeated up to 8 bytes

    METHOD void enter(u32) {}

    template <u32 V> METHOD Raw<V * BYTES> run(const Raw<V * BYTES>&, const Raw<V * BYTES>&, u64) const {
        Raw<V * BYTES> raw;
        UNROLL
        for (u32 w = 0; w < (V * BYTES + 3) / 4; ++w) raw.word[w] = (u32)(bits >> (32 * (w % 2)));
        return raw;
    }
};

template <u32 BYTES> DEVICE void fill(const Move* table, u32 count, u64 chunks, u64 bits) {
    UNROLL
    for (u32 size = BYTES; size < 8; size *= 2) {
        bits = (bits & ((1ull << (8 * size)) - 1)) | bits << (8 * size);
    }
    walk(Filled<BYTES>{bits}, table, count, chunks);
}

#define FILL(BYTES) \
    KERNEL(fill_##BYTES, (const Move* table, u32 count, u64 chunks, u64 bits), (fill<BYTES>(table, count, chunks, bits)))

FILL(1)
FILL(2)
FILL(4)
FILL(8)

// into = from within [-bound, bound]; NaN stays.
template <class T> struct Clamped {
    typedef T From;
    typedef T Into;
    typedef typename T::Acc C;
    static const bool LOADS = true, READS = false;
    static const u32 VECTORS = Lanes<T, T>::V < 4 ? 4 : 16 / Lanes<T, T>::V, SINGLES = 2;
    C bound;

    METHOD void enter(u32) {}

    template <u32 V> METHOD Raw<V * T::SIZE> run(const Raw<V * T::SIZE>& source, const Raw<V * T::SIZE>&, u64) const {
        C x[V];
        decode<T, V>(source, x);
        UNROLL
        for (u32 v = 0; v < V; ++v) x[v] = x[v] > bound ? bound : x[v] < -bound ? -bound : x[v];
        return encode<T, V>(x);
    }
};

// The limit becomes a number of T first. An infinite one bounds nothing, also where T would make it finite.
template <class T> DEVICE void clamp(const Move* table, u32 count, u64 chunks, double limit) {
    typename T::Acc bound;
    decode<T, 1>(encode<T, 1>(&limit), &bound);
    if ((bits_as<u64>(limit) << 1) == 0x7ffull << 53) bound = (typename T::Acc)limit;
    walk(Clamped<T>{bound}, table, count, chunks);
}

#define CLAMP(T) \
    KERNEL(clamp_##T, (const Move* table, u32 count, u64 chunks, double limit), (clamp<T>(table, count, chunks, limit)))

CLAMP(f64)
CLAMP(f32)
CLAMP(f16)
CLAMP(bf16)
CLAMP(f8e4m3)
CLAMP(f8e5m2)
