// Collectives of Gloo on floats, over TCP on the loopback: `gloo -n 2 -c all_reduce -b 1024 -e 1048576 -f 4`. Forks its ranks,
// which meet in a temporary folder.
#include <gloo/allgather.h>
#include <gloo/allreduce.h>
#include <gloo/alltoall.h>
#include <gloo/barrier.h>
#include <gloo/broadcast.h>
#include <gloo/math.h>
#include <gloo/reduce_scatter.h>
#include <gloo/rendezvous/context.h>
#include <gloo/rendezvous/file_store.h>
#include <gloo/transport/tcp/device.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <map>
#include <memory>

#include "measure.hpp"

namespace {

constexpr int kMostRanks = 64;

// What the ranks tell each other about measurements goes through a page that they share, not through Gloo.
struct Page {
  pthread_barrier_t meeting;
  double numbers[kMostRanks][peers::kMostIterations];
  long counts[kMostRanks];
};

struct Ranks {
  int rank() const { return own; }
  int size() const { return all; }
  void meet() { pthread_barrier_wait(&page->meeting); }
  void barrier() {
    gloo::BarrierOptions options(context);
    options.setTag(tag++);
    gloo::barrier(options);
  }
  std::vector<double> largest(std::vector<double> numbers) {
    std::copy(numbers.begin(), numbers.end(), page->numbers[own]);
    meet();
    for (int rank = 0; rank < all; rank++)
      for (size_t at = 0; at < numbers.size(); at++) numbers[at] = std::max(numbers[at], page->numbers[rank][at]);
    meet();
    return numbers;
  }
  long sum(long number) {
    page->counts[own] = number;
    meet();
    number = 0;
    for (int rank = 0; rank < all; rank++) number += page->counts[rank];
    meet();
    return number;
  }
  Page* page;
  int own, all;
  std::shared_ptr<gloo::rendezvous::Context> context;
  uint32_t tag = 0;
};

void add(void* into, const void* a, const void* b, size_t n) { gloo::sum<float>(into, a, b, n); }

int rank_main(const peers::Args& args, Page* page, int rank, const char* folder) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  gloo::rendezvous::FileStore store(folder);
  gloo::transport::tcp::attr address("127.0.0.1");
  auto device = gloo::transport::tcp::CreateDevice(address);
  auto context = std::make_shared<gloo::rendezvous::Context>(rank, args.ranks);
  context->connectFullMesh(store, device);
  Ranks ranks{page, rank, args.ranks, context};

  peers::Verbs verbs;
  verbs.all_reduce = [&](float* from, float* into, size_t n) {
    gloo::AllreduceOptions options(context);
    options.setInput(from, n);
    options.setOutput(into, n);
    options.setReduceFunction(add);
    options.setTag(ranks.tag++);
    gloo::allreduce(options);
  };
  // An object for each buffer, made before it is timed; it works in place.
  std::map<std::pair<float*, size_t>, std::unique_ptr<gloo::ReduceScatterHalvingDoubling<float>>> made;
  verbs.reduce_scatter_in_place = true;
  verbs.reduce_scatter = [&](float* from, float*, size_t n) {
    auto& algorithm = made[{from, n}];
    if (!algorithm) {
      const int all = int(n) * args.ranks;
      algorithm = std::make_unique<gloo::ReduceScatterHalvingDoubling<float>>(
          context, std::vector<float*>{from}, all, std::vector<int>(args.ranks, int(n)));
    }
    algorithm->run();
  };
  verbs.all_gather = [&](float* from, float* into, size_t n) {
    gloo::AllgatherOptions options(context);
    options.setInput(from, n);
    options.setOutput(into, n * args.ranks);
    options.setTag(ranks.tag++);
    gloo::allgather(options);
  };
  verbs.all_to_all = [&](float* from, float* into, size_t n) {
    gloo::AlltoallOptions options(context);
    options.setInput(from, n * args.ranks);
    options.setOutput(into, n * args.ranks);
    options.setTag(ranks.tag++);
    gloo::alltoall(options);
  };
  verbs.broadcast = [&](float* inout, size_t n) {
    gloo::BroadcastOptions options(context);
    options.setRoot(0);
    options.setOutput(inout, n);
    options.setTag(ranks.tag++);
    gloo::broadcast(options);
  };
  verbs.barrier = [&] { ranks.barrier(); };
  const int status = peers::run(args, ranks, verbs);
  ranks.meet();
  std::fflush(stdout);
  _exit(status);
}

}  // namespace

int main(int count, char** words) {
  const peers::Args args(count, words);
  void* shared = mmap(nullptr, sizeof(Page), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  char folder[] = "/tmp/gloo-peer-XXXXXX";
  if (shared == MAP_FAILED || args.ranks > kMostRanks || !mkdtemp(folder)) return 1;
  auto* page = static_cast<Page*>(shared);
  pthread_barrierattr_t attributes;
  pthread_barrierattr_init(&attributes);
  pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_barrier_init(&page->meeting, &attributes, args.ranks);
  std::vector<pid_t> children;
  for (int rank = 0; rank < args.ranks; rank++) {
    const pid_t child = fork();
    if (child == 0) {
      try {
        return rank_main(args, page, rank, folder);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
        _exit(3);
      }
    }
    children.push_back(child);
  }
  int status = 0;
  for (size_t ended = 0; ended < children.size(); ended++) {
    int how = 0;
    wait(&how);
    if (!WIFEXITED(how) || WEXITSTATUS(how)) {
      status = 1;
      for (const pid_t child : children) kill(child, SIGKILL);
    }
  }
  const std::string remove = std::string("rm -rf ") + folder;
  return std::system(remove.c_str()) ? 1 : status;
}
