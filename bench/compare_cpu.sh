#!/usr/bin/env bash
# Attention of this library and of PyTorch on the CPU, side by side: the same shapes, float32.
#     bash bench/compare_cpu.sh [BUILD_FOLDER [THREADS]]     (build/release, 2; needs `pip install torch`, PYTHON chooses the interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/release} threads=${2:-2}
cmake --build "$build" --target bench_attend
"${PYTHON:-python3}" bench/peers/attention_cpu.py "$threads"
"$build/bench/attend" --benchmark_filter="threads:$threads/" --benchmark_min_time=0.3
