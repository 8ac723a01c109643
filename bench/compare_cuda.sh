#!/usr/bin/env bash
# Everything this library does on a GPU and PyTorch's figures for the same shapes, one after the other on the same card. bfloat16.
#     bash bench/compare_cuda.sh [BUILD_FOLDER [PART…]]     (build/cuda; parts: attend core scan decode train generate peers, all unless given;
#                                                            peers needs PyTorch with CUDA, PYTHON chooses the interpreter)
set -uo pipefail
build=${1:-$(dirname "$0")/../build/cuda}
shift
parts=("$@")
[[ ${#parts[@]} == 0 ]] && parts=(attend core scan decode train generate peers)
failed=0
for part in "${parts[@]}"; do
  echo "== $part"
  case $part in
    train) "$build/bench/train_step_cuda" ;;
    peers) "${PYTHON:-python3}" "$(dirname "$0")/peers/attention_cuda.py" --flash --flex --scan ;;
    *) "$build/bench/${part}_cuda" ;;
  esac || { echo "$part: failed" && failed=1; }
done
exit $failed
