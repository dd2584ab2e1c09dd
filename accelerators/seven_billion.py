"""A training step of a Llama with 7 billion parameters, compiled for sixteen v5e or eight H100.

    python accelerators/seven_billion.py tpu|cuda

32 layers of 4096, rank 16 on every linear, 16 sequences of 2048 tokens, rematerialized, fully
sharded, bfloat16. Prints one chip's peak memory, and compares it with hand-written LoRA.
"""

import argparse
import sys
import time

import llama
from compiling import compiled
from programs import programs
from targets import TARGETS, mesh_of

CHIPS = {"tpu": "v5e-16", "cuda": "h100-8"}
BATCH, RANK = (16, 2048), 16
GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("platform", choices=CHIPS)
    target = CHIPS[parser.parse_args().platform]
    mesh = mesh_of(TARGETS[target])
    model = llama.on(mesh, llama.SEVEN_BILLION, "fully sharded", BATCH, RANK)
    (step,) = (program for program in programs(mesh, model) if program.name == "training step")
    print(
        f"{'a training step for ' + target:32} {'peak':>10} {'arguments':>10} {'compiled in':>12}"
    )
    results = []
    for name, form in (("lorax", step.ours), ("hand-written LoRA", step.hand_written)):
        start = time.perf_counter()
        facts = compiled(*form)
        seconds = time.perf_counter() - start
        results.append(facts)
        peak, arguments = facts.peak / GIB, facts.arguments / GIB
        print(f"{name:32} {peak:6.3f} GiB {arguments:6.3f} GiB {seconds:10.0f} s", flush=True)
    ours, written = results
    print(f"{'peak, ours / hand-written':32} {ours.peak / written.peak:6.4f}")
    if ours.flops:
        print(f"{'FLOPs, ours / hand-written':32} {ours.flops / written.flops:6.4f}")
    same = ours.collectives == written.collectives
    print(f"collectives: {dict(ours.collectives)}{', the same when hand-written' if same else ''}")
    if not same:
        print(f"hand-written: {dict(written.collectives)}")
    return int(ours.peak > written.peak)


if __name__ == "__main__":
    sys.exit(main())
