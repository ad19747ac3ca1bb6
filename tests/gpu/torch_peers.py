"""torch's own multi-tensor kernels over GPT-2's shapes, in milliseconds, as JSON: what `gpu speeds --torch` stands beside."""

import json

import torch

WIDTH, REPEATS = 768, 20


def shapes():
    layer = [WIDTH, WIDTH, WIDTH * 3 * WIDTH, 3 * WIDTH, WIDTH * WIDTH, WIDTH, WIDTH, WIDTH]
    layer += [WIDTH * 4 * WIDTH, 4 * WIDTH, 4 * WIDTH * WIDTH, WIDTH]
    return [50257 * WIDTH, 1024 * WIDTH] + 12 * layer + [WIDTH, WIDTH]


def median(run):
    run()
    took = []
    for _ in range(REPEATS):
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        run()
        ended.record()
        ended.synchronize()
        took.append(begun.elapsed_time(ended))
    return sorted(took)[REPEATS // 2]


def tensors(dtype):
    return [torch.randn(numel, device="cuda").to(dtype) for numel in shapes()]


def parts(dtype):
    flat = torch.zeros(sum(shapes()), dtype=dtype, device="cuda")
    return list(flat.split(shapes()))


def scaled(into, source, factor):
    torch._foreach_copy_(into, source)
    torch._foreach_mul_(into, factor)


grads, flat, small = tensors(torch.float32), parts(torch.float32), parts(torch.bfloat16)
figures = {
    "pack_f32": median(lambda: torch._foreach_copy_(flat, grads)),
    "pack_f32_scaled": median(lambda: scaled(flat, grads, 0.5)),
    "pack_bf16_scaled": median(lambda: scaled(small, grads, 0.5)),
    "unpack_bf16": median(lambda: torch._foreach_copy_(grads, small)),
    "unpack_f32_scaled": median(lambda: scaled(grads, flat, 2.0)),
    "norm": median(lambda: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).item()),
}
params = [torch.nn.Parameter(value) for value in tensors(torch.float32)]
for param, grad in zip(params, grads):
    param.grad = grad
optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
figures["adamw"] = median(optimizer.step)
print(json.dumps(figures))
