#!/usr/bin/env bash
# Attention of this library and of PyTorch on the CPU, side by side: the same shapes, float32, two threads.
#     bash bench/compare_cpu.sh [BUILD_FOLDER]        (build/release; needs `pip install torch`, PYTHON chooses the interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/release}
cmake --build "$build" --target bench_attend
"${PYTHON:-python3}" bench/peers/attention_cpu.py 2
"$build/bench/attend" --benchmark_filter='dense.*threads:2|T:16384.*threads:2' --benchmark_min_time=0.3
