// The way through the elements of a table of Moves, which is the same for all kernels with one source and one target.
//
// Where source and target can be aligned together, a thread takes V neighbours at a time, 16 bytes of the wider type, and
// the few elements before and after one by one; otherwise all are taken one by one. Several are loaded before the first is
// stored, so that a thread has several loads in flight.
//
// An Op says what becomes of V elements:
//   From, Into            the types
//   LOADS, READS          whether sources, and whether old targets, are read
//   VECTORS, SINGLES      how many of either a thread has in flight: more is quicker, and longer
//   enter(entry)          before the elements of an entry
//   run<V>(source, target, index)   the new targets; index is that of the first element in its entry
#pragma once
#include "floats.cuh"

// Elements that V * the wider size = 16 bytes hold.
template <class A, class B> struct Lanes {
    static const u32 V = 16 / (A::SIZE > B::SIZE ? A::SIZE : B::SIZE);
};

// How elements of one chunk are split: `vectors` of V elements behind the first `head`, and `edges` single ones around.
struct Split {
    u32 head, vectors, edges;
};

template <u32 V> DEVICE Split split(u64 from_index, u64 into_index, u32 len) {
    const u32 head = (u32)(V - from_index % V) % V;
    if (V == 1 || from_index % V != into_index % V || len < head + V) return Split{len, 0, len};
    const u32 vectors = (len - head) / V;
    return Split{head, vectors, len - vectors * V};
}

// V = 1: the edges. Otherwise: the vectors.
template <u32 V, u32 U, class Op>
DEVICE void sweep(const Op& op, u64 from, u64 into, u64 index, Split split, u32 skip) {
    typedef typename Op::From A;
    typedef typename Op::Into B;
    const u32 units = V == 1 ? split.edges : split.vectors;
    for (u32 unit = threadIdx.x; unit < units; unit += THREADS * U) {
        Raw<V * A::SIZE> source[U] = {};
        Raw<V * B::SIZE> target[U] = {};
        UNROLL
        for (u32 u = 0; u < U; ++u) {
            const u32 at = unit + u * THREADS;
            const u32 element = V == 1 ? (at < split.head ? at : at + skip) : split.head + at * V;
            if (at < units) {
                if (Op::LOADS) source[u] = load<V * A::SIZE>(from + (u64)element * A::SIZE);
                if (Op::READS) target[u] = load<V * B::SIZE>(into + (u64)element * B::SIZE);
            }
        }
        UNROLL
        for (u32 u = 0; u < U; ++u) {
            const u32 at = unit + u * THREADS;
            const u32 element = V == 1 ? (at < split.head ? at : at + skip) : split.head + at * V;
            if (at < units) {
                store<V * B::SIZE>(into + (u64)element * B::SIZE,
                                   op.template run<V>(source[u], target[u], index + element));
            }
        }
    }
}

// The elements of one chunk, of which the first is number `index` in its entry.
template <u32 V, class Op> DEVICE void chunk_of(const Op& op, u64 from, u64 into, u64 index, u32 len) {
    typedef typename Op::From A;
    typedef typename Op::Into B;
    const u64 into_index = into / B::SIZE;
    const Split parts = split<V>(Op::LOADS ? from / A::SIZE : into_index, into_index, len);
    if constexpr (V > 1) sweep<V, Op::VECTORS>(op, from, into, index, parts, 0);
    sweep<1, Op::SINGLES>(op, from, into, index, parts, parts.vectors * V);
}

template <class Op> DEVICE void walk(Op op, const Move* table, u32 count, u64 chunks) {
    typedef typename Op::From A;
    typedef typename Op::Into B;
    u32 at = 0;
    for (u64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        at = find(table, count, chunk, at);
        const Move entry = table[at];
        const u64 start = (chunk - entry.first) * CHUNK;
        op.enter(at);
        chunk_of<Lanes<A, B>::V>(op, entry.from + start * A::SIZE, entry.into + start * B::SIZE, start,
                                 chunk_len(entry.numel, start, CHUNK));
    }
}
