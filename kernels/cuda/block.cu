// Equal to kernels/src/scalar/block.rs: quantize_block, dequantize_block. f8 with a scale for each 128 elements, of which
// a warp takes four a thread.
#include "floats.cuh"

const u32 BLOCK = 128;
const u32 WARPS = THREADS / 32;
const u32 SMALLEST_SCALE = 0x00800000; // the bits of 2^-126, the smallest normal f32

// This thread's four elements of a block: their place in the chunk, and how many are there.
struct Quad {
    u32 first, count;
};

DEVICE Quad quad(u32 block, u32 len) {
    const u32 first = block * BLOCK + threadIdx.x % 32 * 4;
    return Quad{first, first >= len ? 0 : len - first < 4 ? len - first : 4};
}

// Element by element where the address or the end of the entry asks for it; the conversion is one and the same.
template <class T> DEVICE void load_quad(u64 from, Quad part, bool aligned, float* x) {
    const u64 address = from + (u64)part.first * T::SIZE;
    Raw<4 * T::SIZE> raw = {};
    if (aligned && part.count == 4) {
        raw = load<4 * T::SIZE>(address);
    } else {
        UNROLL
        for (u32 v = 0; v < 4; ++v) {
            if (v >= part.count) break;
            const u32 one = load<T::SIZE>(address + v * T::SIZE).word[0];
            raw.word[v * T::SIZE / 4] |= one << (8 * (v * T::SIZE % 4));
        }
    }
    decode<T, 4>(raw, x);
}

template <class T> DEVICE void store_quad(u64 into, Quad part, bool aligned, const float* x) {
    const u64 address = into + (u64)part.first * T::SIZE;
    const Raw<4 * T::SIZE> raw = encode<T, 4>(x);
    if (aligned && part.count == 4) {
        store<4 * T::SIZE>(address, raw);
        return;
    }
    UNROLL
    for (u32 v = 0; v < 4; ++v) {
        if (v >= part.count) break;
        store<T::SIZE>(address + v * T::SIZE, Raw<T::SIZE>{{raw.word[v * T::SIZE / 4] >> (8 * (v * T::SIZE % 4))}});
    }
}

// The scale at which the largest finite element becomes the largest number of Q.
template <class Q> DEVICE float scale_of(const float* x) {
    u32 most = 0;
    UNROLL
    for (u32 v = 0; v < 4; ++v) {
        const u32 magnitude = bits_of(x[v]) & 0x7fffffff;
        if (magnitude < INFINITE && magnitude > most) most = magnitude;
    }
    // The bits of positive numbers are in the order of the numbers.
    most = __reduce_max_sync(0xffffffff, most);
    if (most == 0) return 1;
    const float scale = float_of(most) / grow<Q>(Q::TOP);
    return bits_of(scale) < SMALLEST_SCALE ? float_of(SMALLEST_SCALE) : scale;
}

// Calls body(from, into, scales, len) for every chunk of this block of threads.
template <u32 FROM, u32 INTO, class Body>
DEVICE void each_chunk(const Blocks* table, u32 count, u64 chunks, const Body& body) {
    u32 at = 0;
    for (u64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        at = find(table, count, chunk, at);
        const Blocks entry = table[at];
        const u64 start = (chunk - entry.first) * CHUNK;
        body(entry.from + start * FROM, entry.into + start * INTO, entry.scales + start / BLOCK * 4,
             chunk_len(entry.numel, start, CHUNK));
    }
}

// Blocks that a warp has in flight.
const u32 AHEAD = 2;

template <class A, class Q> struct Quantize {
    METHOD void operator()(u64 from, u64 into, u64 scales, u32 len) const {
        const bool from_aligned = from % (4 * A::SIZE) == 0, into_aligned = into % 4 == 0;
        const u32 blocks = (len + BLOCK - 1) / BLOCK;
        for (u32 block = threadIdx.x / 32; block < blocks; block += WARPS * AHEAD) {
            float x[AHEAD][4];
            UNROLL
            for (u32 a = 0; a < AHEAD; ++a) {
                load_quad<A>(from, quad(block + a * WARPS, len), from_aligned, x[a]);
            }
            UNROLL
            for (u32 a = 0; a < AHEAD; ++a) {
                const u32 here = block + a * WARPS;
                if (here >= blocks) break;
                const float scale = scale_of<Q>(x[a]);
                UNROLL
                for (u32 v = 0; v < 4; ++v) x[a][v] = x[a][v] / scale;
                store_quad<Q>(into, quad(here, len), into_aligned, x[a]);
                if (threadIdx.x % 32 == 0) store<4>(scales + (u64)here * 4, Raw<4>{{bits_of(scale)}});
            }
        }
    }
};

template <class Q, class A> struct Dequantize {
    METHOD void operator()(u64 from, u64 into, u64 scales, u32 len) const {
        const bool from_aligned = from % 4 == 0, into_aligned = into % (4 * A::SIZE) == 0;
        const u32 blocks = (len + BLOCK - 1) / BLOCK;
        for (u32 block = threadIdx.x / 32; block < blocks; block += WARPS * AHEAD) {
            float x[AHEAD][4], scale[AHEAD] = {};
            UNROLL
            for (u32 a = 0; a < AHEAD; ++a) {
                const u32 here = block + a * WARPS;
                load_quad<Q>(from, quad(here, len), from_aligned, x[a]);
                if (here < blocks) scale[a] = float_of(load<4>(scales + (u64)here * 4).word[0]);
            }
            UNROLL
            for (u32 a = 0; a < AHEAD; ++a) {
                UNROLL
                for (u32 v = 0; v < 4; ++v) x[a][v] = x[a][v] * scale[a];
                store_quad<A>(into, quad(block + a * WARPS, len), into_aligned, x[a]);
            }
        }
    }
};

#define QUANTIZE(A, Q) \
    TEAM_KERNEL(quantize_##A##_##Q, (const Blocks* table, u32 count, u64 chunks), \
                (each_chunk<A::SIZE, Q::SIZE>(table, count, chunks, Quantize<A, Q>()))) \
    KERNEL(dequantize_##Q##_##A, (const Blocks* table, u32 count, u64 chunks), \
           (each_chunk<Q::SIZE, A::SIZE>(table, count, chunks, Dequantize<Q, A>())))

QUANTIZE(f32, f8e4m3)
QUANTIZE(f32, f8e5m2)
QUANTIZE(f16, f8e4m3)
QUANTIZE(f16, f8e5m2)
QUANTIZE(bf16, f8e4m3)
QUANTIZE(bf16, f8e5m2)
