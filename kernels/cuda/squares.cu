// Equal to kernels/src/scalar/chunked.rs: chunk_squares, end_squares. Sums of squares in f64, in an order that the
// elements' places in their chunk determine, and neither the grid nor the address.
//
// [Note: chunk order] An element's square is added to the lane of its thread: element i of a chunk belongs to lane
// (i / V) mod 256, where V elements are 16 bytes; a lane adds in order of i. Lane t below 32 then takes in the lanes
// t + 32, t + 64, and so on to t + 224, in this order; then t and t + 16, t and t + 8, 4, 2, 1. At the end the chunks'
// sums are one row, of which sum i belongs to lane i mod 256, and the lanes are added in the same way.
#include "floats.cuh"

// The sum of what all threads of a block bring, in the first 32 of them. `parts` is theirs until they have come to the
// next sum but one.
DEVICE double together(double mine, double* parts) {
    parts[threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.x >= 32) return 0;
    double sum = mine;
    UNROLL
    for (u32 lane = 32; lane < THREADS; lane += 32) sum = sum + parts[threadIdx.x + lane];
    UNROLL
    for (u32 apart = 16; apart > 0; apart /= 2) sum = sum + __shfl_xor_sync(0xffffffff, sum, apart);
    return sum;
}

// What one thread has seen besides finite numbers.
struct Odd {
    u32 infinities, nans;
};

DEVICE void add_square(double x, double& sum, Odd& odd) {
    const u64 magnitude = bits_as<u64>(x) << 1;
    if (magnitude < 0x7ffull << 53) {
        sum = sum + x * x;
    } else if (magnitude == 0x7ffull << 53) {
        odd.infinities += 1;
    } else {
        odd.nans += 1;
    }
}

// Adds this thread's elements of one chunk.
template <class T> DEVICE double chunk_squares(u64 from, u32 len, Odd& odd) {
    const u32 V = 16 / T::SIZE, U = 2;
    double sum = 0;
    const u32 vectors = from % 16 == 0 ? len / V : 0;
    for (u32 unit = threadIdx.x; unit * V < len; unit += THREADS * U) {
        if (unit + (U - 1) * THREADS < vectors) {
            Raw<16> raw[U];
            UNROLL
            for (u32 u = 0; u < U; ++u) raw[u] = load<16>(from + (u64)(unit + u * THREADS) * 16);
            UNROLL
            for (u32 u = 0; u < U; ++u) {
                double x[V];
                decode<T, V>(raw[u], x);
                UNROLL
                for (u32 v = 0; v < V; ++v) add_square(x[v], sum, odd);
            }
        } else {
            for (u32 u = 0; u < U; ++u) {
                const u32 first = (unit + u * THREADS) * V;
                UNROLL
                for (u32 v = 0; v < V; ++v) {
                    if (first + v >= len) break;
                    double x;
                    decode<T, 1>(load<T::SIZE>(from + (u64)(first + v) * T::SIZE), &x);
                    add_square(x, sum, odd);
                }
            }
        }
    }
    return sum;
}

template <class T> DEVICE void squares(const Move* table, u32 count, u64 chunks, double* sums, u64* odd) {
    // Two rows, so that the first threads may still read one while others write the other.
    __shared__ double parts[2 * THREADS];
    Odd seen = {0, 0};
    u32 at = 0, row = 0;
    for (u64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        at = find(table, count, chunk, at);
        const Move entry = table[at];
        const u64 start = (chunk - entry.first) * CHUNK;
        const double mine =
            chunk_squares<T>(entry.from + start * T::SIZE, chunk_len(entry.numel, start, CHUNK), seen);
        const double sum = together(mine, parts + row * THREADS);
        if (threadIdx.x == 0) sums[chunk] = sum;
        row = 1 - row;
    }
    if (seen.infinities) atomicAdd(odd, (u64)seen.infinities);
    if (seen.nans) atomicAdd(odd + 1, (u64)seen.nans);
}

// The sum of the chunks' sums, by the first block alone.
DEVICE void end(const double* sums, u64 chunks, double* out) {
    __shared__ double parts[THREADS];
    if (blockIdx.x > 0) return;
    double mine = 0;
    for (u64 chunk = threadIdx.x; chunk < chunks; chunk += THREADS) mine = mine + sums[chunk];
    const double sum = together(mine, parts);
    if (threadIdx.x == 0) *out = sum;
}

#define SQUARES(T) \
    TEAM_KERNEL(squares_##T, (const Move* table, u32 count, u64 chunks, double* sums, u64* odd), \
                (squares<T>(table, count, chunks, sums, odd)))

SQUARES(f64)
SQUARES(f32)
SQUARES(f16)
SQUARES(bf16)
SQUARES(f8e4m3)
SQUARES(f8e5m2)

TEAM_KERNEL(squares_end, (const double* sums, u64 chunks, double* out), (end(sums, chunks, out)))
