// Equal to kernels/src/scalar/stochastic.rs: cast_stochastic, random_bits. Casts that round up or down with the
// probability of the distance, into every type that has fewer bits or fewer digits: f32 into the four small ones, f16
// into bf16 and the two f8, bf16 into the two f8.
#include "walk.cuh"

// The output function of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", with
// the constants of Stafford's variant 13).
DEVICE u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
const u64 GOLDEN = 0x9e3779b97f4a7c15ull;

// x as a small float's bits: up if `random` / 2^32 is below the fraction that is cut off. Beyond the largest finite number
// there is nothing to choose between, and it rounds as always.
template <class T> DEVICE u32 shrink_by_chance(float x, u32 random) {
    const u32 exponent_up = (127 - T::BIAS) << 23, smallest = 128 - T::BIAS;
    const u32 largest = ((T::SIZE == 2 ? T::SPECIAL - 1 : T::TOP) << (23 - T::FRACTION)) + exponent_up;
    const u32 bits = bits_of(x), magnitude = bits & 0x7fffffff;
    if (magnitude > largest) return shrink<T>(x);
    const u32 normal = magnitude >= 1u << 23;
    const u32 exponent = normal ? magnitude >> 23 : 1;
    const u32 digits = (magnitude & 0x7fffff) | normal << 23;
    // Below the smallest normal number the last digit stays where it is.
    const u32 raised = exponent < smallest ? smallest : exponent;
    const u32 shift = 23 - T::FRACTION + raised - exponent;
    const u64 fixed = shift < 56 ? ((u64)digits << 32) >> shift : 0; // the digits that stay, and 32 of those that go
    const u32 kept = (u32)(fixed >> 32) + (random < (u32)fixed ? 1 : 0);
    return (bits >> 31) << (8 * T::SIZE - 1) | (((raised - smallest) << T::FRACTION) + kept);
}

// into = from * scale, in f32, rounded by chance.
template <class A, class B> struct Chanced {
    typedef A From;
    typedef B Into;
    static const bool LOADS = true, READS = false;
    static const u32 VECTORS = Lanes<A, B>::V < 8 ? 2 : 1, SINGLES = 2;
    float factor;
    u64 seed, key;

    METHOD void enter(u32 entry) { key = mix(seed + ((u64)entry + 1) * GOLDEN); }

    template <u32 V> METHOD Raw<V * B::SIZE> run(const Raw<V * A::SIZE>& source, const Raw<V * B::SIZE>&, u64 index) const {
        float x[V];
        decode<A, V>(source, x);
        // Two neighbours share the halves of one number.
        u64 random[V / 2 + 1];
        UNROLL
        for (u32 n = 0; n < V / 2 + 1; ++n) random[n] = mix(key + (index / 2 + n) * GOLDEN);
        const bool late = index % 2;
        Raw<V * B::SIZE> raw;
        UNROLL
        for (u32 w = 0; w < (V * B::SIZE + 3) / 4; ++w) raw.word[w] = 0;
        UNROLL
        for (u32 v = 0; v < V; ++v) {
            const u64 early_bits = random[v / 2] >> (32 * (v % 2));
            const u64 late_bits = random[(v + 1) / 2] >> (32 * ((v + 1) % 2));
            const u32 small = shrink_by_chance<B>(x[v] * factor, (u32)(late ? late_bits : early_bits));
            raw.word[v * B::SIZE / 4] |= small << (8 * (v * B::SIZE % 4));
        }
        return raw;
    }
};

#define STOCHASTIC(A, B) \
    KERNEL(stochastic_##A##_##B, (const Move* table, u32 count, u64 chunks, double scale, u64 seed), \
           (walk(Chanced<A, B>{(float)scale, seed, 0}, table, count, chunks)))

STOCHASTIC(f32, f16)
STOCHASTIC(f32, bf16)
STOCHASTIC(f32, f8e4m3)
STOCHASTIC(f32, f8e5m2)
STOCHASTIC(f16, bf16)
STOCHASTIC(f16, f8e4m3)
STOCHASTIC(f16, f8e5m2)
STOCHASTIC(bf16, f8e4m3)
STOCHASTIC(bf16, f8e5m2)
