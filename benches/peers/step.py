"""The model of `step.rs` in torch, over gloo, one thread a rank: `step.py RANKS STEPS`. A line of JSON for each row.

Needs `pip install torch`. The rows are DistributedDataParallel, DistributedDataParallel with ZeroRedundancyOptimizer, and
FSDP2 (fully_shard on every block), each with the fused AdamW; `compute` is the model alone on every rank at once, and
`adamw` the optimizer alone on one.
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
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

BLOCKS, WIDTH, WARM_UP = 16, 2048, 2


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.leaky = nn.LeakyReLU(0.25)

    def forward(self, x):
        return x + self.leaky(self.linear(x))


def status(name):
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    raise KeyError(name)


def adamw(params, lr):
    return torch.optim.AdamW(params, lr=lr, fused=True)


def build(row):
    model = nn.Sequential(*(Dense() for _ in range(BLOCKS)))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1e-4)
    if row == "ddp":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        return model, adamw(model.parameters(), 1e-3)
    if row == "zero1":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        return model, ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.AdamW, lr=1e-3, fused=True
        )
    if row == "fsdp":
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, adamw(model.parameters(), 1e-3)
    for parameter in model.parameters():
        # A gradient that is dropped at once leaves its memory, still in the cache, to the next one, as under DDP.
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    return model, None


def rank_main(rank, world, port, row, steps):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    before = status("VmRSS")
    model, optimizer = build(row)
    x = torch.full((1, WIDTH), 0.01 * (rank + 1))
    laps, updates = [], []
    for _ in range(WARM_UP + steps):
        dist.barrier()
        begun = time.perf_counter()
        (model(x) ** 2).sum().backward()
        middle = time.perf_counter()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        ended = time.perf_counter()
        laps.append(ended - begun)
        updates.append(ended - middle)
    if rank == 0:
        peak = status("VmHWM") - before
        report(row, world, laps[WARM_UP:], updates[WARM_UP:], peak)
    dist.destroy_process_group()


def report(row, world, laps, updates, peak):
    line = dict(
        who="torch",
        row=row,
        ranks=world,
        step_s=statistics.median(laps),
        update_s=statistics.median(updates),
        peak_bytes=peak,
    )
    print(json.dumps(line), flush=True)


def optimizer_alone(steps):
    torch.set_num_threads(1)
    params = [nn.Parameter(torch.full((WIDTH, WIDTH), 1e-4)) for _ in range(BLOCKS)]
    for parameter in params:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer, laps = adamw(params, 1e-3), []
    for _ in range(WARM_UP + steps):
        begun = time.perf_counter()
        optimizer.step()
        laps.append(time.perf_counter() - begun)
    report("adamw", 1, laps[WARM_UP:], laps[WARM_UP:], 0)


def main():
    world, steps = int(sys.argv[1]), int(sys.argv[2])
    optimizer_alone(steps)
    for index, row in enumerate(["compute", "ddp", "zero1", "fsdp"]):
        port = 29700 + index
        mp.start_processes(rank_main, args=(world, port, row, steps), nprocs=world, start_method="spawn")


if __name__ == "__main__":
    main()
