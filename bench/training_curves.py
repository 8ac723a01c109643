"""Trains the same small model on the same data and seed on the CPU in float32 and on a GPU in bfloat16 (and in float32), with the
example trainer, and compares the losses of every iteration.

    python3 bench/training_curves.py build/cuda/examples/ratplus [--iterations 300] [--reference FOLDER]

The CPU's run is made in FOLDER, or taken from there when it has been made before (on another machine, say).
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

TEXT = pathlib.Path(__file__).parent.parent / "examples/data/king_james_bible.txt"
MODEL = "--d-model 128 --layers 4 --heads 4 --seq-len 256 --batch 16 --lr 3e-3 --warmup 0.05 --eval-every 0".split()


def losses(program, folder, iterations, device):
    command = [program, "pretrain", "--data", TEXT, "--out", folder, *MODEL, "--sparse", "dilated:16", "--iterations", str(iterations)]
    if not (folder / "log.jsonl").exists():
        subprocess.run([str(x) for x in command + device], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = [json.loads(line) for line in open(folder / "log.jsonl")]
    rows = [row for row in rows if "loss" in row]
    assert len(rows) == iterations, f"{len(rows)} iterations in the log"
    return [(row["sparse_loss"], row["loss"]) for row in rows], rows[-1]["seconds"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--reference", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = lambda folder, device: losses(options.program, folder, options.iterations, device)
        reference, seconds = run(options.reference or pathlib.Path(scratch) / "cpu", ["--device", "cpu"])
        print(f"CPU float32: {seconds:.1f} s")
        for precision in ("float32", "bfloat16"):
            curve, seconds = run(pathlib.Path(scratch) / precision, ["--device", "cuda", "--precision", precision])
            gaps = [abs(a - b) / b for ours, theirs in zip(curve, reference) for a, b in zip(ours, theirs)]
            print(f"GPU {precision}: {seconds:.1f} s; loss against the CPU's: mean difference {100 * sum(gaps) / len(gaps):.3f} %, "
                  f"largest {100 * max(gaps):.3f} %")
            for i in range(options.iterations // 6 - 1, options.iterations, options.iterations // 6):
                print(f"  iteration {i + 1:4d}  sparse {curve[i][0]:.4f} (CPU {reference[i][0]:.4f})  "
                      f"dense {curve[i][1]:.4f} (CPU {reference[i][1]:.4f})")


if __name__ == "__main__":
    main()
