#!/usr/bin/env bash
# bash tests/run.sh [quick]: every check of this repository, on any Debian or Ubuntu machine. Installs what is missing, then
#   format    clang-format
#   release   all programs with g++; unit, header, layering, compile-error, consumer, README and example tests   (quick: up to here)
#   clang     headers, examples and trainer with clang++
#   debug     unit tests under the address and undefined-behaviour sanitizers
#   tsan      tests of code with OpenMP under the thread sanitizer
#   cuda      compiles every .cu where nvcc is; its tests report themselves as skipped where no GPU is
# A failing stage does not stop the next; the last line counts all of them and the exit status is 0 only when nothing failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash cmake/install_packages.sh test || exit 1

# Two gigabytes for each compiler.
jobs=$(awk -v cores="$(nproc)" '/MemAvailable/ {n = int($2 / 2097152); print n < 1 ? 1 : n < cores ? n : cores}' /proc/meminfo)
passed=0 failed=0 skipped=0 failures=()
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# check NAME COMMAND…: one check that is no ctest entry.
check() {
  local name=$1 start=$SECONDS
  shift
  if "$@"; then
    passed=$((passed + 1))
    echo "== $name: passed ($((SECONDS - start)) s)"
  else
    failed=$((failed + 1)) failures+=("$name")
    echo "== $name: FAILED ($((SECONDS - start)) s)"
    return 1
  fi
}

skip() {
  skipped=$((skipped + 1))
  echo "== $1: skipped ($2)"
}

# build PRESET TARGETS…
build() {
  local preset=$1
  shift
  check "$preset/configure" cmake --preset "$preset" && check "$preset/build" cmake --build "build/$preset" -j "$jobs" --target "$@"
}

# test PRESET CTEST_OPTIONS…
test() {
  local preset=$1 start=$SECONDS
  shift
  ctest --test-dir "build/$preset" --output-on-failure --no-tests=error -j "$(nproc)" "$@" 2>&1 | tee "$log"
  local status=${PIPESTATUS[0]} bad
  passed=$((passed + $(grep -cE '^ *[0-9]+/[0-9]+ Test .* Passed ' "$log")))
  skipped=$((skipped + $(grep -cE '^ *[0-9]+/[0-9]+ Test .*\*\*\*Skipped' "$log")))
  bad=$(sed -nE 's/^ *[0-9]+\/[0-9]+ Test +#[0-9]+: ([^ ]+) .*\*\*\*(Failed|Timeout|Exception|Not Run).*/\1/p' "$log")
  [[ $status == 0 || -n $bad ]] || bad=ctest
  for name in $bad; do
    failed=$((failed + 1)) failures+=("$preset/$name")
  done
  echo "== $preset/test: $([[ $status == 0 ]] && echo passed || echo FAILED) ($((SECONDS - start)) s)"
}

formatted() {
  find include tests bench examples -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | sort |
    xargs clang-format --dry-run --Werror
}

# Other versions of clang-format disagree about details.
if [[ $(clang-format --version) == *"version 14."* ]]; then
  check format formatted
else
  skip format "the rules are those of clang-format 14, here is $(clang-format --version)"
fi

build release all && test release

if [[ ${1:-} != quick ]]; then
  build clang examples ratplus_trainer && test clang -L header
  build debug unit_tests && test debug -L 'unit|sanitizer'
  build tsan openmp_tests && test tsan -L 'openmp|sanitizer'
  export PATH=$PATH:/usr/local/cuda/bin
  if ! command -v nvcc >/dev/null; then
    skip cuda "no nvcc"
  elif [[ -z $(find tests bench examples -name '*.cu') ]]; then
    skip cuda "no .cu files"
  else
    build cuda cuda_programs && test cuda -L cuda
  fi
fi

for name in "${failures[@]}"; do
  echo "FAILED: $name"
done
echo "run.sh: $passed passed, $failed failed, $skipped skipped in $((SECONDS / 60)) min $((SECONDS % 60)) s"
[[ $failed == 0 && $passed != 0 ]]
