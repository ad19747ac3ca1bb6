// What the launcher and the kernels agree on: the layout of tables, the cut into chunks, and the names of kernels.
//
// A kernel takes a table, an array of entries in device memory, none of them empty. Every entry is cut into chunks of
// CHUNK elements, the last one shorter, and the chunks of all entries are numbered through: `first` is the number of an
// entry's first chunk, the sum of ceil(numel / CHUNK) over the entries before it, and `chunks` is the sum over all.
// The grid may have any size: block b takes the chunks b, b + gridDim.x, and so on. No result depends on it.
//
// Addresses are aligned to their element and to nothing else. The target may be the source (`from == into`) where both
// have elements of one size; other overlaps have no meaning.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

const u32 THREADS = 256; // blockDim.x of every kernel
const u32 CHUNK = 8192;  // elements that a block takes at a time; copy_bytes takes 4 * CHUNK bytes

// One source and one target: 32 bytes. `fill` has no source.
struct Move {
    u64 from;  // address
    u64 into;  // address
    u64 numel; // elements (bytes in copy_bytes)
    u64 first; // number of the first chunk
};

// One parameter with what belongs to it: 64 bytes. An address of 0 says that there is none.
struct Update {
    u64 param;
    u64 grad;   // elements of Rule::grad_dtype
    u64 state0; // sgd: the momentum buffer; adam: the mean; lion: the mean. In the accumulator of the parameter
    u64 state1; // adam: the mean square
    u64 copy;   // elements of Rule::copy_dtype
    u64 numel;
    u64 first;
    u64 unused;
};

// Elements and their scales, one f32 for 128 of them: 48 bytes.
struct Blocks {
    u64 from;
    u64 into;
    u64 scales; // ceil(numel / 128) f32
    u64 numel;
    u64 first;
    u64 unused;
};

// An optimizer's numbers, by value: 96 bytes. The host computes each in f64 as the comment says; kernels round it once to
// the parameter's accumulator. What a rule does not name is ignored.
//
//                sgd             adam (FLAG_DECOUPLED: adamw)                          lion
struct Rule {
    double lr;         // lr              lr / (1 - beta1^step)                                 lr
    double a;          // momentum        beta1                                                 beta1
    double a_rest;     // -               1 - beta1                                             1 - beta1
    double b;          // 1 - dampening   beta2                                                 beta2
    double b_rest;     // -               1 - beta2                                             1 - beta2
    double c;          // weight_decay    weight_decay; decoupled: 1 - lr * weight_decay        1 - lr * weight_decay
    double d;          // -               sqrt(1 - beta2^step)                                  -
    double e;          // -               eps                                                   -
    double grad_scale; // factor of every gradient; 1 is none
    double unused0;
    u32 flags;      // FLAG_*
    u32 grad_dtype; // Dtype::code of the gradients: f64 0, f32 1, f16 2, bf16 3, f8e4m3 4, f8e5m2 5
    u32 copy_dtype; // Dtype::code of the copies; ignored for entries without one
    u32 unused1;
};

const u32 FLAG_MAXIMIZE = 1;  // sgd: ascend
const u32 FLAG_NESTEROV = 2;  // sgd: look ahead by one momentum step
const u32 FLAG_FIRST = 4;     // sgd: this is step 1, on which the momentum buffer is written and not read
const u32 FLAG_MOMENTUM = 8;  // sgd: there is a momentum buffer
const u32 FLAG_DECOUPLED = 16; // adam: the parameter shrinks by itself, rather than through its gradient

static_assert(sizeof(Move) == 32 && sizeof(Update) == 64 && sizeof(Blocks) == 48 && sizeof(Rule) == 96, "the ABI");

// KERNEL(name, (parameters), call) is one launchable instance; TEAM_KERNEL one whose threads wait for one another. The
// shim for the host has its own.
//
// A multiprocessor shall hold at least RESIDENT blocks: 4 leave a thread 64 registers. Without a number ptxas goes below
// that, and spills on the way.
#ifndef RESIDENT
#define RESIDENT 4
#endif
#ifndef KERNEL
#define KERNEL(NAME, PARAMETERS, CALL) \
    extern "C" __global__ void __launch_bounds__(256, RESIDENT) NAME PARAMETERS { CALL; }
#define TEAM_KERNEL KERNEL
#endif

#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__
#define UNROLL _Pragma("unroll")

// The last entry that begins at or before a chunk. `low` is one that is known to: that of an earlier chunk, or 0.
template <class Entry>
DEVICE u32 find(const Entry* table, u32 count, u64 chunk, u32 low) {
    u32 high = count;
    while (high - low > 1) {
        const u32 middle = low + (high - low) / 2;
        if (table[middle].first <= chunk) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// Elements of a chunk that begins `start` elements into an entry.
DEVICE u32 chunk_len(u64 numel, u64 start, u32 chunk) {
    const u64 left = numel - start;
    return left < chunk ? (u32)left : chunk;
}
