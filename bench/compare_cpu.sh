#!/usr/bin/env bash
# This library and PyTorch on the CPU, side by side, float32: attention, and joint training steps (PyTorch eager and torch.compile,
# a few minutes).
#     bash bench/compare_cpu.sh [BUILD_FOLDER [THREADS]]     (build/release, 2; needs `pip install torch`, PYTHON chooses the interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/release} threads=${2:-2} python=${PYTHON:-python3}
cmake --build "$build" --target bench_attend bench_train_step
"$python" bench/peers/attention_cpu.py "$threads"
"$build/bench/attend" --benchmark_filter="threads:$threads/" --benchmark_min_time=0.3
"$python" bench/peers/train_step_cpu.py --threads "$threads" --repeats 3
for config in demo mid; do "$python" bench/peers/train_step_cpu.py --threads "$threads" --repeats 3 --config "$config" --compile; done
"$build/bench/train_step" --benchmark_filter="threads:$threads/"
