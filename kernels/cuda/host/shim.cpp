// How a grid runs on the processor: see shim.h.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <ucontext.h>

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace shim {
thread_local uint3 thread, block, grid, threads;

void calls(unsigned grid_size, unsigned block_size, Body body, const void* bound) {
    grid = {grid_size, 1, 1}, threads = {block_size, 1, 1};
    for (unsigned b = 0; b < grid_size; ++b) {
        block = {b, 0, 0};
        for (unsigned t = 0; t < block_size; ++t) {
            thread = {t, 0, 0};
            body(bound);
        }
    }
}

namespace {
enum State { READY, AT_BARRIER, AT_EXCHANGE, AT_LARGEST, DONE };

const size_t STACK_BYTES = 64 << 10;
const unsigned WARP = 32, MOST = 1024;

// One thread of a block.
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
    uint64_t value;    // brought to an exchange, then taken from it
    unsigned lane_xor; // of an exchange
};

// The fibers of the block that runs on this host thread; their stacks are kept for the next.
struct Team {
    Fiber fibers[MOST];
    ucontext_t scheduler;
    unsigned running, size;
    Body body;
    const void* bound;
};

Team& team() {
    static thread_local std::unique_ptr<Team> kept(new Team());
    return *kept;
}

void wait_as(State state) {
    Team& own = team();
    Fiber& fiber = own.fibers[own.running];
    fiber.state = state;
    swapcontext(&fiber.context, &own.scheduler);
}

void enter() {
    Team& own = team();
    own.body(own.bound);
    wait_as(DONE);
}

// Lanes that wait for one another go on once all of their warp have come. Whether any did.
bool release_warp(Fiber* lanes, unsigned count) {
    const State state = lanes[0].state;
    if (state != AT_EXCHANGE && state != AT_LARGEST) return false;
    for (unsigned lane = 0; lane < count; ++lane) {
        if (lanes[lane].state != state) return false;
    }
    uint64_t values[WARP], most = 0;
    for (unsigned lane = 0; lane < count; ++lane) {
        values[lane] = lanes[lane].value;
        most = values[lane] > most ? values[lane] : most;
    }
    for (unsigned lane = 0; lane < count; ++lane) {
        const unsigned other = (lane ^ lanes[lane].lane_xor) % WARP;
        lanes[lane].value = state == AT_LARGEST ? most : values[other];
        lanes[lane].state = READY;
    }
    return true;
}

bool release_barrier(Team& own) {
    for (unsigned t = 0; t < own.size; ++t) {
        if (own.fibers[t].state != AT_BARRIER) return false;
    }
    for (unsigned t = 0; t < own.size; ++t) own.fibers[t].state = READY;
    return true;
}

void run_block(Team& own) {
    for (unsigned t = 0; t < own.size; ++t) {
        Fiber& fiber = own.fibers[t];
        if (!fiber.stack) fiber.stack.reset(new char[STACK_BYTES]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
        fiber.state = READY;
    }
    for (;;) {
        bool moved = false, all_done = true;
        for (unsigned t = 0; t < own.size; ++t) {
            if (own.fibers[t].state == READY) {
                own.running = t;
                thread = {t, 0, 0};
                swapcontext(&own.scheduler, &own.fibers[t].context);
                moved = true;
            }
            all_done = all_done && own.fibers[t].state == DONE;
        }
        if (all_done) return;
        for (unsigned first = 0; first < own.size; first += WARP) {
            moved |= release_warp(own.fibers + first, WARP);
        }
        moved |= release_barrier(own);
        if (!moved) {
            fprintf(stderr, "a barrier or shuffle that not all threads of a block reach\n");
            abort();
        }
    }
}
} // namespace

void fibers(unsigned grid_size, unsigned block_size, Body body, const void* bound) {
    Team& own = team();
    grid = {grid_size, 1, 1}, threads = {block_size, 1, 1};
    own.size = block_size, own.body = body, own.bound = bound;
    for (unsigned b = 0; b < grid_size; ++b) {
        block = {b, 0, 0};
        run_block(own);
    }
}

void barrier() { wait_as(AT_BARRIER); }

uint64_t exchange(uint64_t mine, unsigned lane_xor) {
    Fiber& fiber = team().fibers[team().running];
    fiber.value = mine, fiber.lane_xor = lane_xor;
    wait_as(AT_EXCHANGE);
    return fiber.value;
}

uint32_t largest(uint32_t mine) {
    Fiber& fiber = team().fibers[team().running];
    fiber.value = mine;
    wait_as(AT_LARGEST);
    return (uint32_t)fiber.value;
}
} // namespace shim
