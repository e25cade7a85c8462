"""What other numbers of threads than the machine's cores cost.

    python -m benchmarks.threads --checkpoint build/checkpoints/0.5b-int8 [--threads 2 1 4 16]
        [--new 16] [--repeats 5] [--out FILE.jsonl]

An engine for each number, on the CPU; the first is what the others are compared with. A packed
checkpoint is in memory once. Every repeat has a new picture, encoded as one view, and each engine
answers about it in turn: so the machine's noise meets all. Ratios are made repeat by repeat.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from pathlib import Path

import ovfast
from ovfast.bench.calibration import calibrate
from ovfast.bench.machine import make_header, quiet_check
from ovfast.bench.record import Row, append_row, write_header
from ovfast.bench.workloads import encoded_picture

SIZE_HW = (384, 384)
METRICS = ("ttft_ms", "tpot_ms")


def run_once(engine: ovfast.Engine, picture: bytes, new: int) -> dict[str, float]:
    """Milliseconds to the first token, and a token after it."""
    timings = engine.generate(
        "What is shown in this picture?",
        images=picture,
        visual=ovfast.VisualOptions(max_views=1),
        max_new_tokens=new,
        ignore_eos=True,
    ).timings
    return {name: getattr(timings, name) for name in METRICS}


def run(args: argparse.Namespace) -> None:
    quiet = quiet_check()
    calibration = calibrate("cpu", threads=args.threads[0], storages=())
    numbers = " ".join(map(str, args.threads))
    header = make_header(
        f"python -m benchmarks.threads --threads {numbers} --new {args.new}"
        f" --repeats {args.repeats}",
        calibration,
        quiet,
    )
    samples: dict[tuple[int, str], list[float]] = {
        (count, name): [] for count in args.threads for name in METRICS
    }
    with ExitStack() as stack:
        engines = {
            count: stack.enter_context(
                ovfast.load(args.checkpoint, device="cpu", threads=count, max_seq_len=2048)
            )
            for count in args.threads
        }
        storage = engines[args.threads[0]].storage
        for engine in engines.values():
            engine.warmup()
        for repeat in range(args.repeats):
            picture = encoded_picture(SIZE_HW, repeat)
            for count, engine in engines.items():
                found = run_once(engine, picture, args.new)
                print(f"{count} threads: {found}", flush=True)
                for name, value in found.items():
                    samples[count, name].append(value)
    for (count, name), values in samples.items():
        base = samples[args.threads[0], name]
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        print(
            f"{name}, {count} threads: {statistics.median(values):.1f} ms,"
            f" {statistics.median(ratios):.2f} times ({min(ratios):.2f}–{max(ratios):.2f})"
            f" that of {args.threads[0]}"
        )
    if args.out is not None:
        write_header(args.out, header)
        for (count, name), values in samples.items():
            append_row(
                args.out,
                Row(
                    suite="latency",
                    workload=f"384, one view, threads {count}",
                    side="ovfast",
                    storage=storage,
                    metric=name,
                    unit="ms",
                    samples=tuple(values),
                    parameters={"device": "cpu", "threads": count, "new_tokens": args.new},
                ),
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a directory, or demo")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1, 4, 16])
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a .jsonl file for the record")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
