#!/usr/bin/env bash
# bash examples/demo.sh [ITERATIONS]: RAT+ from text to a model that runs under every pattern, in about ten minutes on two cores
# (400 iterations; 1500 take four times as long). Installs what is missing (Debian, Ubuntu), builds, and
#   - pretrains a small RAT+ jointly on the bytes of the King James Bible, and with the same number of optimiser steps the
#     attention baseline;
#   - adapts both to each sparse pattern, in a tenth of the optimiser steps at a tenth of the rate;
#   - prints one table of held-out bits per byte, draws it with the training curves, and writes a passage.
# Everything it makes is in build/demo, the results in build/demo/ITERATIONS. A demo that was interrupted goes on where it
# was; remove that folder to start anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

iterations=${1:-400}
[[ $iterations =~ ^[1-9][0-9]+$ ]] || { echo "usage: bash examples/demo.sh [ITERATIONS], at least 10" >&2; exit 2; }
patterns=(dilated:4 dilated:16 dilated:32 dilated:16+local:16+sinks:4)
out=build/demo/$iterations
began=$SECONDS

echo "== build"
bash cmake/install_packages.sh build
build=build/demo/release  # without tests and benchmarks, which need more packages
cmake --preset release -B $build -DRATPLUS_BUILD_TESTS=OFF -DRATPLUS_BUILD_BENCH=OFF >/dev/null
cmake --build $build --target ratplus_trainer demo_report
ratplus=$build/examples/ratplus
built=$SECONDS

# The end of the text is held out.
mkdir -p "$out"
text=examples/data/king_james_bible.txt
held_out=200000
head -c -$held_out $text >"$out/train.txt"
tail -c $held_out $text >"$out/held_out.txt"

# train FOLDER COMMAND…: a run, or the rest of one.
train() {
  local folder=$out/$1 resume=()
  shift
  [[ -e $folder/training.safetensors ]] && resume=(--resume)
  echo "== ${folder#"$out"/}"
  "$ratplus" "$@" --data "$out/train.txt" --eval-data "$out/held_out.txt" --out "$folder" --batch 16 "${resume[@]}"
}

# evaluate FOLDER PATTERN…: FOLDER/eval.json
evaluate() {
  local folder=$out/$1
  shift
  "$ratplus" eval --model "$folder" --data "$out/held_out.txt" --pattern "$@" --json "$folder/eval.json"
}

# study NAME ITERATIONS OPTIONS…: pretrains, evaluates, adapts to each pattern, evaluates again.
study() {
  local name=$1 steps=$2
  shift 2
  train "$name" pretrain --d-model 128 --layers 4 --heads 4 --seq-len 256 --lr 3e-3 --warmup 0.05 --iterations "$steps" "$@"
  evaluate "$name" dense "${patterns[@]}"
  for pattern in "${patterns[@]}"; do
    train "$name/adapted/${pattern//:/}" adapt --model "$out/$name" --pattern "$pattern" --lr 3e-4 \
      --iterations $((2 * iterations / 10)) --eval-every 0
    evaluate "$name/adapted/${pattern//:/}" "$pattern"
  done
}

study ratplus "$iterations" --joint --sparse dilated:16
study attention $((2 * iterations)) --no-recurrence --no-joint

echo
$build/examples/demo_report "$out" | tee "$out/table.txt"

sparse=dilated:16+local:16+sinks:4
for pass in "ratplus dense" "ratplus/adapted/${sparse//:/} $sparse"; do
  read -r folder pattern <<<"$pass"
  echo
  echo "== RAT+ writes under $pattern"
  "$ratplus" generate --model "$out/$folder" --pattern "$pattern" --prompt "And the LORD said unto " --tokens 400 \
    --temperature 0.7 --seed 3
done

echo
echo "table: $out/table.txt   picture: $out/demo.svg"
echo "built in $((built - began)) s, trained and measured in $((SECONDS - built)) s"
