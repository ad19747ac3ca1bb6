// CUDA C++ for the processor: what the kernels use of it, and nothing else. Included before a .cu file.
//
// The threads of a block run one after the other, as plain calls. Where they wait for one another (TEAM_KERNEL) each runs
// on a fiber, in turn up to the next wait. Everything is thread_local, so several host threads may launch at once; the
// only memory they share is what the kernels are given.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct uint3 {
    unsigned x, y, z;
};

namespace shim {
// One kernel: how to run all blocks of a grid, and the bytes of each argument.
struct Kernel {
    const char* name;
    void (*run)(unsigned grid, unsigned block, void** arguments);
    const size_t* sizes;
    size_t count;
};

extern thread_local uint3 thread, block, grid, threads;

typedef void (*Body)(const void* bound);
// Runs a body for every thread of every block: as calls, or as fibers.
void calls(unsigned grid, unsigned block, Body body, const void* bound);
void fibers(unsigned grid, unsigned block, Body body, const void* bound);

// What the threads of a warp bring to a shuffle, and take away.
uint64_t exchange(uint64_t mine, unsigned lane_xor);
uint32_t largest(uint32_t mine);
void barrier();

template <class Lambda> void launch(bool team, unsigned grid, unsigned block, const Lambda& lambda) {
    const Body body = [](const void* bound) { (*(const Lambda*)bound)(); };
    (team ? fibers : calls)(grid, block, body, &lambda);
}

// Unpacks arguments as cuLaunchKernel has them: an array of pointers to the values.
template <class... P> struct Signature {
    static constexpr size_t SIZES[] = {sizeof(P)...};
    template <void (*F)(P...), bool TEAM> static void run(unsigned grid, unsigned block, void** arguments) {
        unpack<F, TEAM>(grid, block, arguments, std::make_index_sequence<sizeof...(P)>());
    }
    template <void (*F)(P...), bool TEAM, size_t... I>
    static void unpack(unsigned grid, unsigned block, void** arguments, std::index_sequence<I...>) {
        launch(TEAM, grid, block, [=] { F(*(P*)arguments[I]...); });
    }
};
template <bool TEAM, auto F> struct Describe;
template <bool TEAM, class... P, void (*F)(P...)> struct Describe<TEAM, F> {
    static constexpr Kernel of(const char* name) {
        return Kernel{name, &Signature<P...>::template run<F, TEAM>, Signature<P...>::SIZES, sizeof...(P)};
    }
};
} // namespace shim

#ifdef LIST_KERNELS
#define SHIM_KERNEL(TEAM, NAME, PARAMETERS, CALL) @kernel@ NAME @
#else
#define SHIM_KERNEL(TEAM, NAME, PARAMETERS, CALL)                                                              \
    extern "C" void NAME PARAMETERS { CALL; }                                                                  \
    extern "C" const shim::Kernel kernel_##NAME;                                                               \
    const shim::Kernel kernel_##NAME = shim::Describe<TEAM, &NAME>::of(#NAME);
#endif
#define KERNEL(NAME, PARAMETERS, CALL) SHIM_KERNEL(false, NAME, PARAMETERS, CALL)
#define TEAM_KERNEL(NAME, PARAMETERS, CALL) SHIM_KERNEL(true, NAME, PARAMETERS, CALL)

#define threadIdx shim::thread
#define blockIdx shim::block
#define blockDim shim::threads
#define gridDim shim::grid

inline void __syncthreads() { shim::barrier(); }
inline double __shfl_xor_sync(unsigned, double mine, int lane_xor) {
    uint64_t bits;
    memcpy(&bits, &mine, 8);
    bits = shim::exchange(bits, lane_xor);
    memcpy(&mine, &bits, 8);
    return mine;
}
inline unsigned __reduce_max_sync(unsigned, unsigned mine) { return shim::largest(mine); }
inline unsigned long long atomicAdd(unsigned long long* sum, unsigned long long more) {
    return __atomic_fetch_add(sum, more, __ATOMIC_RELAXED);
}
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline double __dsqrt_rn(double x) { return sqrt(x); }
