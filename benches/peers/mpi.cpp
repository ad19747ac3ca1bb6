// Collectives of an MPI (Open MPI, MPICH, Intel MPI) on floats: `mpirun -n 2 mpi -c all_reduce -b 1024 -e 1048576 -f 4`.
#include <mpi.h>

#include "measure.hpp"

namespace {

struct Ranks {
  int rank() const { return own; }
  int size() const { return all; }
  void barrier() { MPI_Barrier(MPI_COMM_WORLD); }
  std::vector<double> largest(const std::vector<double>& numbers) {
    std::vector<double> most(numbers.size());
    MPI_Allreduce(numbers.data(), most.data(), int(numbers.size()), MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    return most;
  }
  long sum(long number) {
    long all_numbers = 0;
    MPI_Allreduce(&number, &all_numbers, 1, MPI_LONG, MPI_SUM, MPI_COMM_WORLD);
    return all_numbers;
  }
  int own = 0, all = 1;
};

}  // namespace

int main(int count, char** words) {
  MPI_Init(&count, &words);
  Ranks ranks;
  MPI_Comm_rank(MPI_COMM_WORLD, &ranks.own);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks.all);
  const peers::Args args(count, words);
  peers::Verbs verbs;
  const MPI_Comm world = MPI_COMM_WORLD;
  verbs.all_reduce = [=](float* from, float* into, size_t n) { MPI_Allreduce(from, into, int(n), MPI_FLOAT, MPI_SUM, world); };
  verbs.reduce_scatter = [=](float* from, float* into, size_t n) {
    MPI_Reduce_scatter_block(from, into, int(n), MPI_FLOAT, MPI_SUM, world);
  };
  verbs.all_gather = [=](float* from, float* into, size_t n) { MPI_Allgather(from, int(n), MPI_FLOAT, into, int(n), MPI_FLOAT, world); };
  verbs.all_to_all = [=](float* from, float* into, size_t n) { MPI_Alltoall(from, int(n), MPI_FLOAT, into, int(n), MPI_FLOAT, world); };
  verbs.broadcast = [=](float* inout, size_t n) { MPI_Bcast(inout, int(n), MPI_FLOAT, 0, world); };
  verbs.barrier = [=] { MPI_Barrier(world); };
  const int status = peers::run(args, ranks, verbs);
  MPI_Finalize();
  return status;
}
