// Equal to kernels/src/scalar/arithmetic.rs: cast_scaled. Casts among f64, f32, f16 and bf16, and bytes as they are.
#include "moves.cuh"

MOVE(f64, f64)
MOVE(f64, f32)
MOVE(f64, f16)
MOVE(f64, bf16)
MOVE(f32, f64)
MOVE(f32, f32)
MOVE(f32, f16)
MOVE(f32, bf16)
MOVE(f16, f64)
MOVE(f16, f32)
MOVE(f16, f16)
MOVE(f16, bf16)
MOVE(bf16, f64)
MOVE(bf16, f32)
MOVE(bf16, f16)
MOVE(bf16, bf16)

// One byte, of which V travel as they lie.
struct Byte {
    static const u32 SIZE = 1;
};

struct Copy {
    typedef Byte From;
    typedef Byte Into;
    static const bool LOADS = true, READS = false;
    static const u32 VECTORS = 4, SINGLES = 4;

    template <u32 V> METHOD Raw<V> run(const Raw<V>& source, const Raw<V>&, u64) const { return source; }
};

// As wide as source and target can be aligned together.
DEVICE void copy_all(const Move* table, u32 count, u64 chunks) {
    const u32 bytes = 4 * CHUNK;
    u32 at = 0;
    for (u64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        at = find(table, count, chunk, at);
        const Move entry = table[at];
        const u64 start = (chunk - entry.first) * bytes;
        const u64 from = entry.from + start, into = entry.into + start;
        const u32 len = chunk_len(entry.numel, start, bytes);
        const u32 apart = (u32)(from ^ into) & 15;
        if (apart == 0) {
            chunk_of<16>(Copy(), from, into, start, len);
        } else if (apart % 8 == 0) {
            chunk_of<8>(Copy(), from, into, start, len);
        } else if (apart % 4 == 0) {
            chunk_of<4>(Copy(), from, into, start, len);
        } else if (apart % 2 == 0) {
            chunk_of<2>(Copy(), from, into, start, len);
        } else {
            chunk_of<1>(Copy(), from, into, start, len);
        }
    }
}

KERNEL(copy_bytes, (const Move* table, u32 count, u64 chunks), copy_all(table, count, chunks))
