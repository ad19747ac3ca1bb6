// What the peers' benchmarks share: the command line, exact inputs, and how times are taken, which is what `coll --dirty`
// does ([Note: how times are taken] in ../src/coll/measure.rs). Every rank rewrites its input, a barrier, the operation:
// above 64 KiB each operation is timed by itself; up to 64 KiB batches of 32 of these are timed, in turns with batches of 32
// times (rewrite, barrier), and the medians subtracted. Beside it, up to 64 KiB, the same without barriers ("pipelined").
// A time is the slowest rank's; the median over iterations is printed, as a line of JSON.
#pragma once

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <string>
#include <vector>

namespace peers {

constexpr int kBatch = 32;
constexpr size_t kBatchedBytes = 64 << 10;
constexpr int kLeastIterations = 3;
constexpr int kMostIterations = 2000;

// NAME -n RANKS -c COLLECTIVE -b BYTES -e BYTES -f FACTOR -t SECONDS [-p]; sizes in plain bytes.
struct Args {
  int ranks = 2;
  std::string collective = "all_reduce";
  size_t first = 1024, last = 1 << 20, factor = 4;
  double budget = 0.1;
  bool pin = false;

  Args(int count, char** words) {
    for (int at = 1; at < count; at++) {
      const std::string flag = words[at];
      const char* value = at + 1 < count ? words[at + 1] : "";
      if (flag == "-p") {
        pin = true;
        continue;
      }
      if (flag == "-n") ranks = std::atoi(value);
      else if (flag == "-c") collective = value;
      else if (flag == "-b") first = std::strtoull(value, nullptr, 10);
      else if (flag == "-e") last = std::strtoull(value, nullptr, 10);
      else if (flag == "-f") factor = std::max(2ull, std::strtoull(value, nullptr, 10));
      else if (flag == "-t") budget = std::atof(value);
      else {
        std::fprintf(stderr, "unknown flag %s\n", flag.c_str());
        std::exit(2);
      }
      at++;
    }
  }
};

// Rank r stays on the r-th core that is allowed.
inline void pin(int rank) {
  cpu_set_t allowed, own;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
  std::vector<int> cores;
  for (int core = 0; core < CPU_SETSIZE; core++)
    if (CPU_ISSET(core, &allowed)) cores.push_back(core);
  CPU_ZERO(&own);
  CPU_SET(cores[rank % cores.size()], &own);
  sched_setaffinity(0, sizeof own, &own);
}

// Whole numbers from -64 to 63: their sums are exact in any order.
inline float value(int rank, size_t index) {
  uint32_t x = uint32_t(index) * 0x9e3779b1u ^ uint32_t(rank + 1) * 0x85ebca6bu;
  x = (x ^ (x >> 15)) * 0x2c1b3c6du;
  return float(int32_t(x) >> 25);
}

inline float total(int ranks, size_t index) {
  float sum = 0;
  for (int rank = 0; rank < ranks; rank++) sum += value(rank, index);
  return sum;
}

struct Buffer {
  float* data;
  explicit Buffer(size_t elements)
      : data(static_cast<float*>(::operator new(elements * 4 + 4096, std::align_val_t(4096)))) {
    std::fill(data, data + elements, 0.0f);
  }
  ~Buffer() { ::operator delete(data, std::align_val_t(4096)); }
  Buffer(const Buffer&) = delete;
};

// One collective at one size: what to run, where its input lies, and how many results are wrong afterwards.
struct Case {
  std::function<void()> operation;
  float* input;
  size_t input_elements;
  std::function<void()> fill;   // exact inputs
  std::function<long()> wrong;  // after one operation on them
};

inline double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// Ranks must offer barrier(), largest(vector of doubles) by place, and sum(long).
template <class Ranks>
void measure(const Args& args, Ranks& ranks, size_t bytes, Case& test) {
  test.fill();
  ranks.barrier();
  test.operation();
  const long wrong = ranks.sum(test.wrong());

  const bool batched = bytes <= kBatchedBytes;
  const bool is_barrier = test.input == nullptr && args.collective == "barrier";
  auto rewrite = [&](int turn) { std::fill(test.input, test.input + test.input_elements, float(1 + turn % 2)); };
  struct Batch { bool meets, operates; };
  // Each is what is measured, and then what is subtracted: isolated, pipelined. A barrier is measured alone.
  const std::vector<Batch> kinds = is_barrier ? std::vector<Batch>{{false, true}}
                                   : batched  ? std::vector<Batch>{{true, true}, {true, false}, {false, true}, {false, false}}
                                              : std::vector<Batch>{{}};
  auto batch = [&](Batch kind) {
    ranks.barrier();
    const double start = now();
    for (int turn = 0; turn < kBatch; turn++) {
      rewrite(turn);
      asm volatile("" ::: "memory");
      if (kind.meets) ranks.barrier();
      if (kind.operates) test.operation();
    }
    return (now() - start) / kBatch;
  };
  auto lap = [&](Batch kind, int turn) {
    if (batched) return batch(kind);
    rewrite(turn);
    ranks.barrier();
    const double start = now();
    test.operation();
    return now() - start;
  };
  test.operation();  // connections, pages
  ranks.barrier();
  const double start = now();
  for (const Batch kind : kinds) lap(kind, 0);
  const double once = ranks.largest({now() - start})[0];
  const int iterations =
      std::min(double(kMostIterations), std::max(double(kLeastIterations), args.budget / std::max(once, 1e-9)));
  std::vector<std::vector<double>> laps(kinds.size());
  for (int turn = 0; turn < iterations; turn++)
    for (size_t kind = 0; kind < kinds.size(); kind++) laps[kind].push_back(lap(kinds[kind], turn));
  std::vector<double> medians;
  for (auto& of_kind : laps) {
    of_kind = ranks.largest(of_kind);
    std::sort(of_kind.begin(), of_kind.end());
    medians.push_back(of_kind[of_kind.size() / 2]);
  }
  const bool subtracts = kinds.size() == 4;
  const double isolated = subtracts ? std::max(0.0, medians[0] - medians[1]) : medians[0];
  if (ranks.rank() == 0) {
    std::printf("{\"collective\":\"%s\",\"ranks\":%d,\"bytes\":%zu,\"us\":%.4f,\"iterations\":%d,\"wrong\":%ld",
                args.collective.c_str(), ranks.size(), bytes, isolated * 1e6, iterations, wrong);
    if (subtracts) std::printf(",\"pipelined_us\":%.4f", std::max(0.0, medians[2] - medians[3]) * 1e6);
    std::puts("}");
    std::fflush(stdout);
  }
}

// The cases that all libraries share, from four verbs on float; `count` elements each, or by rank.
struct Verbs {
  std::function<void(float* from, float* into, size_t count)> all_reduce, reduce_scatter, all_gather, all_to_all;
  std::function<void(float* inout, size_t count)> broadcast;
  std::function<void()> barrier;
  bool reduce_scatter_in_place = false;  // the result begins where the input does
};

template <class Ranks>
int run(const Args& args, Ranks& ranks, const Verbs& verbs) {
  const int n = ranks.size(), rank = ranks.rank();
  const std::string& name = args.collective;
  if (args.pin) pin(rank);
  if (name == "barrier") {
    Case test{verbs.barrier, nullptr, 0, [] {}, [] { return 0L; }};
    measure(args, ranks, 0, test);
    return 0;
  }
  for (size_t bytes = args.first; bytes <= args.last; bytes *= args.factor) {
    const size_t count = bytes / 4, part = count / n;
    Buffer from_buffer(count), into_buffer(count);
    float *from = from_buffer.data, *into = into_buffer.data;
    auto differ = [](const float* found, size_t elements, auto expected) {
      long wrong = 0;
      for (size_t i = 0; i < elements; i++) wrong += found[i] != expected(i);
      return wrong;
    };
    auto fill = [&](size_t elements) {
      return [=] { for (size_t i = 0; i < elements; i++) from[i] = value(rank, i); };
    };
    Case test;
    if (name == "all_reduce") {
      test = {[&] { verbs.all_reduce(from, into, count); }, from, count, fill(count),
              [&] { return differ(into, count, [&](size_t i) { return total(n, i); }); }};
    } else if (name == "reduce_scatter") {
      float* found = verbs.reduce_scatter_in_place ? from : into;
      test = {[&] { verbs.reduce_scatter(from, into, part); }, from, part * n, fill(part * n),
              [&, found] { return differ(found, part, [&](size_t i) { return total(n, rank * part + i); }); }};
    } else if (name == "all_gather") {
      test = {[&] { verbs.all_gather(from, into, part); }, from, part, fill(part),
              [&] { return differ(into, part * n, [&](size_t i) { return value(i / part, i % part); }); }};
    } else if (name == "alltoall") {
      test = {[&] { verbs.all_to_all(from, into, part); }, from, part * n, fill(part * n),
              [&] { return differ(into, part * n, [&](size_t i) { return value(i / part, rank * part + i % part); }); }};
    } else if (name == "broadcast") {
      const size_t own = rank == 0 ? count : 0;
      test = {[&] { verbs.broadcast(from, count); }, from, own, fill(own),
              [&] { return differ(from, count, [&](size_t i) { return value(0, i); }); }};
    } else {
      std::fprintf(stderr, "unknown collective %s\n", name.c_str());
      return 2;
    }
    measure(args, ranks, count * 4, test);
  }
  return 0;
}

}  // namespace peers
