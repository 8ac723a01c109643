#!/usr/bin/env bash
# bash bench/include_time.sh [COMPILER…]: what `#include <ratplus/ratplus.hpp>` costs a consumer: median seconds of five compilations
# (user time) of a file with nothing else in it, lines after preprocessing, and the same for Eigen's core alone, the floor.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
eigen=$(pkg-config --cflags eigen3 2>/dev/null || echo -I/usr/include/eigen3)

measure() {  # COMPILER HEADER
  local seconds
  echo "#include <$2>" | "$1" -std=c++20 -fopenmp -Iinclude $eigen -x c++ -O0 -fsyntax-only -  # its errors, if any, end the script
  seconds=$(for _ in 1 2 3 4 5; do
    TIMEFORMAT=%U
    { time echo "#include <$2>" | "$1" -std=c++20 -fopenmp -Iinclude $eigen -x c++ -O0 -fsyntax-only -; } 2>&1
  done | sort -n | sed -n 3p)
  printf '%-10s %-24s %6s s %8d lines\n' "$1" "$2" "$seconds" \
    "$(echo "#include <$2>" | "$1" -std=c++20 -fopenmp -Iinclude $eigen -x c++ -E - | grep -vc '^#')"
}

for compiler in "${@:-g++}"; do
  measure "$compiler" Eigen/Core
  measure "$compiler" ratplus/ratplus.hpp
done
