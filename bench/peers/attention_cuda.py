"""The shapes of bench/attend.cu through PyTorch: scaled_dot_product_attention with cuDNN and with flash, and
FlexAttention for the sparse patterns. One line each: pattern, B, H, T, d, milliseconds, TFLOP/s of visited keys,
forward and backward apart. With --scan also the recurrence of bench/scan.cu (without RoPE) by torch's associative_scan.

    python3 bench/peers/attention_cuda.py [--flex] [--flash] [--scan] [--tokens 262144]
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def milliseconds(f, repeats=3):
    f()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        f()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def keys_visited(pattern, T):
    """Sum over queries of the number of keys seen, under dilation D and window W."""
    D, W = pattern
    window = sum(min(t, W) + 1 for t in range(T))
    return window if D is None else window + sum(max(t - W, 0) // D for t in range(T))


def report(name, pattern, shape, forward, backward):
    B, H, T, d = shape
    flops = 4 * d * B * H * keys_visited(pattern, T)
    print(f"{name:28s} B{B} H{H} T{T} d{d}  forward {forward:9.3f} ms {flops / forward * 1e-9:7.1f} TFLOP/s"
          f"  backward {backward:9.3f} ms {2.5 * flops / backward * 1e-9:7.1f} TFLOP/s", flush=True)


def measure(name, pattern, shape, attend):
    B, H, T, d = shape
    q, k, v = (torch.randn(B, T, H, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3))
    with torch.no_grad():
        forward = milliseconds(lambda: attend(q, k, v))
    out = attend(q, k, v)
    dout = torch.randn_like(out)
    backward = milliseconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), 2)
    report(name, pattern, shape, forward, backward)


def sdpa(backend):
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def flex(D, W, T):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(b, h, q, k):
        near = q - k <= W
        return (k <= q) & (near | ((k + 1) % D == 0) if D else near)

    torch._functorch.config.donated_buffer = False  # the backward pass is run more than once
    mask = create_block_mask(sees, None, None, T, T, device="cuda")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def measure_scan(B, T, C):
    """h_t = γ_t h_{t−1} + (1 − γ_t) x_t of keys and values, compiled; bytes: k, v, g in, k, v out."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def both(k, v, g):
        gate = torch.sigmoid(g.float())
        return tuple(associative_scan(combine, (gate, (1 - gate) * x.float()), dim=1)[1].bfloat16() for x in (k, v))

    k, v, g = (torch.randn(B, T, C, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    compiled = torch.compile(both)
    with torch.no_grad():
        ms = milliseconds(lambda: compiled(k, v, g))
    print(f"{'associative_scan':28s} B{B} T{T} C{C}  forward {ms:9.3f} ms {10 * k.numel() / ms * 1e-9:7.2f} TB/s", flush=True)


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--tokens", type=int, default=262144)
    options.add_argument("--heads", type=int, default=32)
    options.add_argument("--head-size", type=int, default=128)
    options.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768, 262144])
    options.add_argument("--flash", action="store_true")
    options.add_argument("--flex", action="store_true")
    options.add_argument("--scan", action="store_true")
    args = options.parse_args()
    if args.scan:
        try:
            measure_scan(args.tokens // 4096, 4096, args.heads * args.head_size)
        except Exception as error:  # not every release compiles it
            print(f"associative_scan: {type(error).__name__}: {str(error).splitlines()[0]}")
    for T in args.lengths:
        shape = (max(args.tokens // T, 1), args.heads, T, args.head_size)
        measure("cudnn dense", (1, 0), shape, sdpa(SDPBackend.CUDNN_ATTENTION))
        if args.flash:
            measure("flash dense", (1, 0), shape, sdpa(SDPBackend.FLASH_ATTENTION))
        if args.flex and T <= 32768:
            for name, D, W in (("dilated:16", 16, 0), ("dilated:64", 64, 0), ("dilated:16+local:256", 16, 256)):
                measure(f"flex {name}", (D, W), shape, flex(D, W, T))


if __name__ == "__main__":
    main()
