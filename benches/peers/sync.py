"""Torch's side of `sync.rs`, over gloo, one thread a rank: `sync.py RANKS STEPS BUCKET_MIB`. A line of JSON for each row.

Needs `pip install torch`. GPT-2 small's parameters under DistributedDataParallel with gradient_as_bucket_view: a backward, and
the same one under no_sync; who starts this takes the difference. In `kept` gradients stay in DDP's buckets from one backward to
the next and are zeroed there. In `new` they are None before each, come in memory of their own, and DDP copies them and lets go
of them; under no_sync they are dropped there as they come, because gradients that all stay take fresh memory from the system,
which costs more than the copy. The forward and the zeroing are not timed. A time is the slowest rank's, the median of STEPS.
"""

import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

LAYERS, WIDTH, VOCABULARY, CONTEXT, WARM_UP = 12, 768, 50257, 1024, 2


def shapes():
    layer = [
        (WIDTH,),
        (WIDTH,),
        (3 * WIDTH, WIDTH),
        (3 * WIDTH,),
        (WIDTH, WIDTH),
        (WIDTH,),
        (WIDTH,),
        (WIDTH,),
        (4 * WIDTH, WIDTH),
        (4 * WIDTH,),
        (WIDTH, 4 * WIDTH),
        (WIDTH,),
    ]
    return [(VOCABULARY, WIDTH), (CONTEXT, WIDTH)] + layer * LAYERS + [(WIDTH,), (WIDTH,)]


class Weighted(nn.Module):
    """The sum of all parameters' elements, times a number: every element's gradient is that number."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes())

    def forward(self, factor):
        return sum((weight * factor).sum() for weight in self.weights)


def drop(parameter):
    parameter.grad = None


def check(model, expected):
    for parameter in model.parameters():
        assert (parameter.grad == expected).all(), f"a gradient is not {expected}"


def median(laps):
    laps = torch.tensor(laps[WARM_UP:], dtype=torch.float64)
    dist.all_reduce(laps, op=dist.ReduceOp.MAX)
    return statistics.median(laps.tolist())


def rank_main(rank, world, port, row, steps, bucket_mib):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = DistributedDataParallel(Weighted(), bucket_cap_mb=bucket_mib, gradient_as_bucket_view=True)
    own = 2 * rank + 1
    factor = torch.tensor([float(own)])

    def backward(laps):
        loss = model(factor)
        dist.barrier()
        begun = time.perf_counter()
        loss.backward()
        laps.append(time.perf_counter() - begun)

    synced, alone, last, is_new = [], [], WARM_UP + steps - 1, row == "new"
    for step in range(last + 1):
        model.zero_grad(set_to_none=is_new)
        backward(synced)
        if step in (0, last):
            check(model, world)  # the mean of 1, 3, 5, ...
        model.zero_grad(set_to_none=is_new)
        drops = [weight.register_post_accumulate_grad_hook(drop) for weight in model.parameters() if is_new]
        with model.no_sync():
            backward(alone)
        for handle in drops:
            handle.remove()
        if step in (0, last) and not is_new:
            check(model, own)
    sync_s, alone_s = median(synced), median(alone)
    if rank == 0:
        print(json.dumps(dict(who="torch", row=row, sync_s=sync_s, alone_s=alone_s)), flush=True)
    dist.destroy_process_group()


def main():
    world, steps, bucket_mib = (int(word) for word in sys.argv[1:4])
    for index, row in enumerate(["kept", "new"]):
        args = (world, 29710 + index, row, steps, bucket_mib)
        mp.start_processes(rank_main, args=args, nprocs=world, start_method="spawn")


if __name__ == "__main__":
    main()
