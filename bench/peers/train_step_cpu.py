"""One joint training step of RAT+ in plain PyTorch on the CPU: the peer of bench/train_step.cpp.

The same model, precision (float32), batch and thread count, written the straightforward way: scaled_dot_product_attention with a
boolean mask for the sparse half (is_causal for dense), the recurrence as a blocked parallel scan in torch operations, AdamW(fused).
Prints one line per configuration: tokens of text per second (one joint iteration trains on its batch twice) and peak memory.

    python3 bench/peers/train_step_cpu.py [--threads 2] [--compile] [--config demo|mid]
"""

import argparse
import math
import resource
import statistics
import time

import torch
import torch.nn.functional as F

CONFIGS = {  # d_model, layers, heads, T, batch, vocabulary, dilation
    "demo": (128, 4, 4, 256, 16, 256, 16),
    "mid": (512, 8, 8, 1024, 4, 256, 16),
}


def scan(gate, x, block=32):
    """h_t = γ_t h_{t−1} + (1 − γ_t) x_t over dim 1: doubling inside blocks, then a loop over the blocks' carries."""
    batch, length, channels = x.shape
    a = gate.view(batch, length // block, block, channels)
    b = ((1 - gate) * x).view(batch, length // block, block, channels)
    shift = 1
    while shift < block:
        b = torch.cat([b[:, :, :shift], b[:, :, shift:] + a[:, :, shift:] * b[:, :, :-shift]], dim=2)
        a = torch.cat([a[:, :, :shift], a[:, :, shift:] * a[:, :, :-shift]], dim=2)
        shift *= 2
    carry, carries = torch.zeros_like(b[:, 0, 0]), []
    for i in range(length // block):
        carries.append(carry)
        carry = a[:, i, -1] * carry + b[:, i, -1]
    h = b + a * torch.stack(carries, dim=1).unsqueeze(2)
    return h.reshape(batch, length, channels)


def rotate(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


class Block(torch.nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = torch.nn.RMSNorm(d, eps=1e-6)
        self.norm2 = torch.nn.RMSNorm(d, eps=1e-6)
        self.in_proj = torch.nn.Linear(d, 5 * d, bias=False)
        self.out_proj = torch.nn.Linear(d, d, bias=False)
        self.fc1 = torch.nn.Linear(d, 4 * d, bias=False)
        self.fc2 = torch.nn.Linear(4 * d, d, bias=False)

    def forward(self, x, cos, sin, mask):
        batch, length, d = x.shape
        o, q, k, v, g = self.in_proj(self.norm1(x)).chunk(5, dim=-1)
        gate = torch.sigmoid(g)
        k, v = scan(gate, k), scan(gate, v)
        q, k, v = (z.view(batch, length, self.heads, -1).transpose(1, 2) for z in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.out_proj(a.transpose(1, 2).reshape(batch, length, d) * torch.sigmoid(o))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Model(torch.nn.Module):
    def __init__(self, d, layers, heads, length, vocabulary):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, d)
        self.blocks = torch.nn.ModuleList(Block(d, heads) for _ in range(layers))
        self.norm = torch.nn.RMSNorm(d, eps=1e-6)
        for p in self.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, 0.0, 0.02)
        frequency = 10000.0 ** (-torch.arange(0, d // heads, 2, dtype=torch.float64) / (d // heads))
        angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos().float())
        self.register_buffer("sin", angle.sin().float())

    def forward(self, tokens, labels, mask):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin, mask)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--config", choices=CONFIGS, action="append")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for name in options.config or CONFIGS:
        d, layers, heads, length, batch, vocabulary, dilation = CONFIGS[name]
        model = Model(d, layers, heads, length, vocabulary)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        run = torch.compile(model) if options.compile else model
        q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
        sparse = (k <= q) & (((k + 1) % dilation == 0) | (k == q))
        tokens = torch.randint(vocabulary, (batch, length))
        labels = torch.randint(vocabulary, (batch, length))

        def joint_step():
            for mask in (sparse, None):
                optimiser.zero_grad(set_to_none=True)
                run(tokens, labels, mask).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()

        for _ in range(2):
            joint_step()
        times = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            joint_step()
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        label = "torch.compile" if options.compile else "PyTorch eager"
        print(f"{label:14} {name:5} {options.threads} threads  {1e3 * seconds:9.1f} ms/iteration  "
              f"{batch * length / seconds:9.0f} tokens/s  peak memory {peak:7.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
