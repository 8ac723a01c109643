"""PyTorch's scaled_dot_product_attention on the CPU: the shapes of bench/attend.cpp, forward and backward, two threads."""
import statistics
import sys
import time

import torch
import torch.nn.functional as F

threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
torch.set_num_threads(threads)


def median_ms(f, runs=7):
    """Median of the wall time; with one thread the least processor time, which is right on a busy machine too."""
    clock, best = (time.process_time, min) if threads == 1 else (time.perf_counter, statistics.median)
    f()
    times = []
    for _ in range(runs):
        begin = clock()
        f()
        times.append(clock() - begin)
    return best(times) * 1e3


print(f"PyTorch {torch.__version__}, {threads} thread(s): dense causal attention, float32")
for heads, length, size in ((8, 4096, 64), (8, 4096, 128), (4, 16384, 64)):
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, length, heads, size).transpose(1, 2).requires_grad_() for _ in range(3))
    grad = torch.randn(1, length, heads, size).transpose(1, 2)
    runs = 5 if length < 10000 else 2
    with torch.no_grad():
        forward = median_ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), runs)

    def both():
        q.grad = k.grad = v.grad = None
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)

    total = median_ms(both, runs)
    flops = 2 * length * (length + 1) * size * heads
    print(f"T:{length}/H:{heads}/d:{size}  forward {forward:.1f} ms ({flops / forward * 1e-6:.0f} GFLOP/s)"
          f"  forward+backward {total:.1f} ms ({3.5 * flops / total * 1e-6:.0f} GFLOP/s)", flush=True)
