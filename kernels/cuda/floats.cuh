// The six floats: their bits as an accumulator, and an accumulator as their bits. Equal to kernels/src/scalar/float.rs:
// Float::decode, Float::encode.
//
// f32 and f64 are computed in; the small ones are decoded into f32, exactly, and rounded once from f32. f64 is taken to
// f32 by rounding to odd on its way into a small one, which leaves the one rounding to the second step (Boldo and
// Melquiond 2008, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd").
#pragma once
#include "abi.cuh"

struct f64 {
    static const u32 SIZE = 8;
    typedef double Acc;
};
struct f32 {
    static const u32 SIZE = 4;
    typedef float Acc;
};
// Small floats: bits of the fraction, bias of the exponent, magnitude bits of what overflow becomes, of the first
// infinity or NaN, and of the NaN that is written.
struct f16 {
    static const u32 SIZE = 2, FRACTION = 10, BIAS = 15, TOP = 0x7c00, SPECIAL = 0x7c00, NOT = 0x7e00;
    typedef float Acc;
};
struct bf16 {
    static const u32 SIZE = 2, FRACTION = 7, BIAS = 127, TOP = 0x7f80, SPECIAL = 0x7f80, NOT = 0x7fc0;
    typedef float Acc;
};
struct f8e4m3 {
    static const u32 SIZE = 1, FRACTION = 3, BIAS = 7, TOP = 0x7e, SPECIAL = 0x7f, NOT = 0x7f;
    typedef float Acc;
};
struct f8e5m2 {
    static const u32 SIZE = 1, FRACTION = 2, BIAS = 15, TOP = 0x7b, SPECIAL = 0x7c, NOT = 0x7e;
    typedef float Acc;
};

template <class A, class B> struct Same { static const bool YES = false; };
template <class A> struct Same<A, A> { static const bool YES = true; };

// The accumulator of two: f64 if either is.
template <class A, class B> struct Wide { typedef float Acc; };
template <class B> struct Wide<double, B> { typedef double Acc; };
template <class A> struct Wide<A, double> { typedef double Acc; };
template <> struct Wide<double, double> { typedef double Acc; };

template <class Into, class From> DEVICE Into bits_as(From from) {
    static_assert(sizeof(Into) == sizeof(From), "the same bits");
    Into into;
    __builtin_memcpy(&into, &from, sizeof(Into));
    return into;
}

DEVICE u32 bits_of(float x) { return bits_as<u32>(x); }
DEVICE float float_of(u32 x) { return bits_as<float>(x); }

const u32 INFINITE = 0x7f800000; // the bits of an f32

// A small float's bits, without what lies above them, as f32: exact.
template <class T> DEVICE float grow(u32 bits) {
    const u32 sign = (bits >> (8 * T::SIZE - 1)) << 31;
    const u32 magnitude = bits & ((1u << (8 * T::SIZE - 1)) - 1);
    if (Same<T, bf16>::YES) return float_of(bits << 16);
#ifdef __CUDA_ARCH__
    if (Same<T, f16>::YES || Same<T, f8e5m2>::YES) {
        // f8e5m2 is the upper half of an f16.
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((u16)(bits << (16 - 8 * T::SIZE))));
        return x;
    }
#endif
    // The digits in an f32's place have too small an exponent; a power of two, which is exact, makes up for it.
    const float small = float_of(magnitude << (23 - T::FRACTION)) * float_of((254 - T::BIAS) << 23);
    const u32 special =
        Same<T, f8e4m3>::YES ? INFINITE | 1 : INFINITE | (magnitude - T::SPECIAL) << (23 - T::FRACTION);
    return float_of(sign | (magnitude >= T::SPECIAL ? special : bits_of(small)));
}

// An f32 as a small float's bits: rounded to the nearest, ties to even.
template <class T> DEVICE u32 shrink(float x) {
    const u32 shift = 23 - T::FRACTION;
    const u32 bits = bits_of(x), magnitude = bits & 0x7fffffff;
    const u32 sign = (bits >> 31) << (8 * T::SIZE - 1);
#ifdef __CUDA_ARCH__
    if (Same<T, f16>::YES) {
        u16 half;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
        return half;
    }
    if (Same<T, bf16>::YES) {
        u16 half;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(x));
        return half;
    }
#endif
    // A carry out of the fraction runs into the exponent, which is just what it should do.
    const u32 even = (magnitude >> shift) & 1;
    u32 small = ((magnitude + (1u << (shift - 1)) - 1 + even) >> shift) - ((127 - T::BIAS) << T::FRACTION);
    if (T::BIAS != 127 && magnitude < (128 - T::BIAS) << 23) {
        // Subnormal: added to a number whose last digit is worth the smallest subnormal, the sum rounds as it should.
        const u32 anchor = (127 + 24 - T::BIAS - T::FRACTION) << 23;
        small = bits_of(float_of(magnitude) + float_of(anchor)) - anchor;
    }
    small = small < T::TOP ? small : T::TOP;
    return sign | (magnitude > INFINITE ? T::NOT : small);
}

// Two at a time, the first in the lower bits: the conversions that hardware has come in pairs.
template <class T> DEVICE void grow_pair(u32 bits, float* x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    if (T::SIZE == 1) {
        u32 halves;
        if (Same<T, f8e4m3>::YES) {
            asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((u16)bits));
        } else {
            asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(halves) : "h"((u16)bits));
        }
        grow_pair<f16>(halves, x);
        return;
    }
#endif
    x[0] = grow<T>(bits & ((1u << (8 * T::SIZE)) - 1));
    x[1] = grow<T>((bits >> (8 * T::SIZE)) & ((1u << (8 * T::SIZE)) - 1));
}

template <class T> DEVICE u32 shrink_pair(float low, float high) {
#ifdef __CUDA_ARCH__
    u32 pair;
    if (Same<T, f16>::YES) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
    if (Same<T, bf16>::YES) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
#if __CUDA_ARCH__ >= 890
    // Saturates, infinities too, and keeps NaN: the law of the two f8.
    u16 bytes;
    if (Same<T, f8e4m3>::YES) {
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(high), "f"(low));
    }
    return bytes;
#endif
#endif
    return shrink<T>(low) | shrink<T>(high) << (8 * T::SIZE);
}

// The f32 next to an f64 toward zero; where that is not the same number, its last digit is odd.
DEVICE float to_odd(double x) {
    const float near = (float)x;
    const double back = near;
    u32 bits = bits_of(near);
    // A NaN differs from itself, and stays.
    if (back == x || x != x) return near;
    const u64 sign = 1ull << 63;
    if ((bits_as<u64>(back) & ~sign) > (bits_as<u64>(x) & ~sign)) bits -= 1;
    return float_of(bits | 1);
}

// V neighbours in registers, as they lie in memory. Fewer than four bytes stand in the lower bits of the word.
template <u32 BYTES> struct Raw {
    u32 word[(BYTES + 3) / 4];
};

// Addresses out of a table could be of any memory; that it is global memory only the PTX can say.
template <u32 BYTES> DEVICE Raw<BYTES> load(u64 address) {
    static_assert(BYTES <= 16 && (BYTES & (BYTES - 1)) == 0, "what one instruction loads");
    Raw<BYTES> raw;
#ifdef __CUDA_ARCH__
    const u64 from = __cvta_generic_to_global((const void*)address);
    if constexpr (BYTES == 16) {
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(raw.word[0]), "=r"(raw.word[1]), "=r"(raw.word[2]), "=r"(raw.word[3])
                     : "l"(from)
                     : "memory");
    } else if constexpr (BYTES == 8) {
        asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                     : "=r"(raw.word[0]), "=r"(raw.word[1])
                     : "l"(from)
                     : "memory");
    } else if constexpr (BYTES == 4) {
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(raw.word[0]) : "l"(from) : "memory");
    } else if constexpr (BYTES == 2) {
        asm volatile("ld.global.u16 %0, [%1];" : "=r"(raw.word[0]) : "l"(from) : "memory");
    } else {
        asm volatile("ld.global.u8 %0, [%1];" : "=r"(raw.word[0]) : "l"(from) : "memory");
    }
#else
    // A device faults here; so shall the processor, which would not care.
    if (address % BYTES != 0) __builtin_trap();
    raw.word[0] = 0;
    __builtin_memcpy(raw.word, (const void*)address, BYTES);
#endif
    return raw;
}

template <u32 BYTES> DEVICE void store(u64 address, const Raw<BYTES>& raw) {
#ifdef __CUDA_ARCH__
    const u64 into = __cvta_generic_to_global((const void*)address);
    if constexpr (BYTES == 16) {
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(into), "r"(raw.word[0]), "r"(raw.word[1]),
                     "r"(raw.word[2]), "r"(raw.word[3])
                     : "memory");
    } else if constexpr (BYTES == 8) {
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(into), "r"(raw.word[0]), "r"(raw.word[1]) : "memory");
    } else if constexpr (BYTES == 4) {
        asm volatile("st.global.u32 [%0], %1;" ::"l"(into), "r"(raw.word[0]) : "memory");
    } else if constexpr (BYTES == 2) {
        asm volatile("st.global.u16 [%0], %1;" ::"l"(into), "r"(raw.word[0]) : "memory");
    } else {
        asm volatile("st.global.u8 [%0], %1;" ::"l"(into), "r"(raw.word[0]) : "memory");
    }
#else
    if (address % BYTES != 0) __builtin_trap();
    __builtin_memcpy((void*)address, raw.word, BYTES);
#endif
}

// V elements of T as accumulators. Only f64 taken to f32 rounds.
template <class T, u32 V, class C> DEVICE void decode(const Raw<V * T::SIZE>& raw, C* x) {
    if constexpr (T::SIZE == 8) {
        UNROLL
        for (u32 v = 0; v < V; ++v) {
            x[v] = (C)bits_as<double>((u64)raw.word[2 * v] | (u64)raw.word[2 * v + 1] << 32);
        }
    } else if constexpr (T::SIZE == 4) {
        UNROLL
        for (u32 v = 0; v < V; ++v) x[v] = (C)float_of(raw.word[v]);
    } else if constexpr (V == 1) {
        x[0] = (C)grow<T>(raw.word[0]);
    } else {
        const u32 pairs = 2 / T::SIZE; // in a word
        UNROLL
        for (u32 p = 0; p < V / 2; ++p) {
            float two[2];
            grow_pair<T>((raw.word[p / pairs] >> (16 * (p % pairs))) & (pairs == 1 ? ~0u : 0xffffu), two);
            x[2 * p] = (C)two[0], x[2 * p + 1] = (C)two[1];
        }
    }
}

DEVICE float to_small(float x) { return x; }
DEVICE float to_small(double x) { return to_odd(x); }

// V accumulators as elements of T, each rounded once.
template <class T, u32 V, class C> DEVICE Raw<V * T::SIZE> encode(const C* x) {
    Raw<V * T::SIZE> raw;
    if constexpr (T::SIZE == 8) {
        UNROLL
        for (u32 v = 0; v < V; ++v) {
            const u64 bits = bits_as<u64>((double)x[v]);
            raw.word[2 * v] = (u32)bits, raw.word[2 * v + 1] = (u32)(bits >> 32);
        }
    } else if constexpr (T::SIZE == 4) {
        UNROLL
        for (u32 v = 0; v < V; ++v) raw.word[v] = bits_of((float)x[v]);
    } else if constexpr (V == 1) {
        raw.word[0] = shrink<T>(to_small(x[0]));
    } else {
        const u32 pairs = 2 / T::SIZE; // in a word
        UNROLL
        for (u32 w = 0; w < (V * T::SIZE + 3) / 4; ++w) raw.word[w] = 0;
        UNROLL
        for (u32 p = 0; p < V / 2; ++p) {
            const u32 pair = shrink_pair<T>(to_small(x[2 * p]), to_small(x[2 * p + 1]));
            raw.word[p / pairs] |= pair << (16 * (p % pairs));
        }
    }
    return raw;
}
