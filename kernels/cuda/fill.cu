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

// Magnitude bits of infinity, or of the largest number where there is none; what is above is NaN.
template <class T> DEVICE u64 top_of() {
    if constexpr (T::SIZE == 8) return 0x7ffull << 52;
    else if constexpr (T::SIZE == 4) return INFINITE;
    else return Same<T, f8e4m3>::YES ? T::TOP : T::SPECIAL;
}

// into = from within [-bound, bound], on bits, because an element that is not moved keeps its own, NaN and the infinities of
// f8e5m2 too. The magnitudes of floats are in the order of their bits.
template <class T> struct Clamped {
    typedef T From;
    typedef T Into;
    static const bool LOADS = true, READS = false;
    static const u32 VECTORS = Lanes<T, T>::V < 4 ? 4 : 16 / Lanes<T, T>::V, SINGLES = 2;
    static const u32 WORD = T::SIZE < 4 ? 8 * T::SIZE : 32; // bits of an element in one word
    u64 bound, flip;                                        // the bound's magnitude, and its sign

    METHOD void enter(u32) {}

    METHOD u64 bounded(u64 bits) const {
        const u64 sign = 1ull << (8 * T::SIZE - 1), magnitude = bits & (sign - 1);
        const bool moved = magnitude > bound && magnitude <= top_of<T>();
        return moved ? ((bits & sign) ^ flip) | bound : bits;
    }

    template <u32 V> METHOD Raw<V * T::SIZE> run(const Raw<V * T::SIZE>& source, const Raw<V * T::SIZE>&, u64) const {
        Raw<V * T::SIZE> raw = source;
        UNROLL
        for (u32 v = 0; v < V; ++v) {
            if constexpr (T::SIZE == 8) {
                const u64 bits = bounded((u64)source.word[2 * v] | (u64)source.word[2 * v + 1] << 32);
                raw.word[2 * v] = (u32)bits, raw.word[2 * v + 1] = (u32)(bits >> 32);
            } else {
                const u32 word = v * T::SIZE / 4, shift = 8 * (v * T::SIZE % 4);
                const u32 mask = 0xffffffffu >> (32 - WORD);
                const u32 bits = (source.word[word] >> shift) & mask;
                raw.word[word] = (raw.word[word] & ~(mask << shift)) | (u32)bounded(bits) << shift;
            }
        }
        return raw;
    }
};

// The limit becomes a number of T first. An infinite one bounds nothing, also where T would make it finite.
template <class T> DEVICE void clamp(const Move* table, u32 count, u64 chunks, double limit) {
    const Raw<T::SIZE> raw = encode<T, 1>(&limit);
    u64 bits = raw.word[0];
    if constexpr (T::SIZE == 8) bits |= (u64)raw.word[1] << 32;
    const u64 sign = 1ull << (8 * T::SIZE - 1);
    const bool infinite = (bits_as<u64>(limit) << 1) == 0x7ffull << 53;
    const u64 bound = infinite ? top_of<T>() : bits & (sign - 1);
    walk(Clamped<T>{bound, bits & sign}, table, count, chunks);
}

#define CLAMP(T) \
    KERNEL(clamp_##T, (const Move* table, u32 count, u64 chunks, double limit), (clamp<T>(table, count, chunks, limit)))

CLAMP(f64)
CLAMP(f32)
CLAMP(f16)
CLAMP(bf16)
CLAMP(f8e4m3)
CLAMP(f8e5m2)
