"""What choosing among options and asking again about a held picture cost, in first tokens.

    python -m tests.support.checkpoints DIR --size 0.5b      makes a full-size random checkpoint
    python -m benchmarks.choices --checkpoint DIR [--dtype float32] [--size 640x480] [--threads 2]
        [--repeats 5] [--separate 1] [--out FILE.jsonl]

One engine on the CPU; every repeat has a new picture and runs each request once, so that the
machine's noise meets all: `first`, a question about an encoded picture up to its first token;
`choose`, four options of several tokens about it; `encode`, a handle with the prefix; `again`, the
same question over that handle; `text`, it without a picture. Ratios are made repeat by repeat.

`share` is the least time for what `again` must do beyond `text`: read the held keys and values
once, and multiply with them, at the rates measured here. `separate` repeats also score the options
in four calls of their own; `score_error` is the largest relative difference of a log-probability.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ovfast
from ovfast.bench.calibration import calibrate
from ovfast.bench.machine import make_header, quiet_check
from ovfast.bench.record import Row, append_row, write_header
from ovfast.bench.workloads import encoded_picture
from ovfast.roofline import Machine, Stage, kv_bytes_per_token

QUESTION = "What is shown in this picture? Answer in one word."
OPTIONS = ["a red circle", "a small dog on the grass", "two blue squares", "nothing at all"]
ONE = {"max_new_tokens": 1, "ignore_eos": True}
BOUNDS = {"choose / first": 1.25, "again / first": 0.05, "beyond / share": 1.25}


def milliseconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return 1e3 * (time.perf_counter() - start), result


def share_ms(engine: ovfast.Engine, held: int, computed: int, machine: Machine) -> float:
    """The floor of attending from `computed` positions to `held` ones in all layers."""
    text = engine.config.text
    attention = Stage(
        "attention",
        product_flops=0,
        attention_flops=4 * text.num_layers * computed * held * text.num_heads * text.head_dim,
        weight_bytes=0,
        cache_bytes=held * kv_bytes_per_token(text, engine.dtype.itemsize),
    )
    return attention.floor_ms(machine)


def run_once(
    engine: ovfast.Engine, picture: bytes, machine: Machine, *, separate: bool
) -> dict[str, float]:
    """Milliseconds of each request, the share, and the error where it is looked for."""
    row: dict[str, float] = {}
    row["first"], first = milliseconds(lambda: engine.generate(QUESTION, images=picture, **ONE))
    row["choose"], chosen = milliseconds(lambda: engine.choose(QUESTION, OPTIONS, images=picture))
    row["encode"], handle = milliseconds(lambda: engine.encode(images=picture, keep="prefix"))
    with handle:
        for name in ("takes the slot", "again"):  # copies the prefix; has it
            row[name], again = milliseconds(lambda: engine.generate(QUESTION, media=handle, **ONE))
            assert again.token_ids == first.token_ids, "another token over the handle"
    row["text"], _ = milliseconds(lambda: engine.generate(QUESTION, **ONE))
    held = again.usage.cached_tokens
    row["beyond"] = row["again"] - row["text"]
    row["share"] = share_ms(engine, held, again.usage.prompt_tokens - held, machine)
    if separate:
        row["separate"], scores = milliseconds(
            lambda: [engine.score(QUESTION, [text], images=picture)[0] for text in OPTIONS]
        )
        row["score_error"] = max(
            abs(ours.logprob - alone.logprob) / abs(alone.logprob)
            for ours, alone in zip(chosen.scores, scores, strict=True)
        )
    return row


def rows_of(args: argparse.Namespace, storage: str, runs: Sequence[dict[str, float]]) -> list[Row]:
    """A row a request."""
    names = ("first", "choose", "encode", "takes the slot", "again", "text", "separate")
    found = {name: tuple(run[name] for run in runs if name in run) for name in names}
    return [
        Row(
            suite="latency",
            workload=args.size,
            side="ovfast",
            storage=storage,
            metric=f"{name.replace(' ', '_')}_ms",
            unit="ms",
            samples=samples,
            parameters={"device": "cpu", "threads": args.threads, "options": len(OPTIONS)},
        )
        for name, samples in found.items()
        if samples
    ]


def run(args: argparse.Namespace) -> None:
    quiet = quiet_check()
    calibration = calibrate("cpu", threads=args.threads, storages=())
    command = (
        f"python -m benchmarks.choices --dtype {args.dtype} --size {args.size}"
        f" --threads {args.threads} --repeats {args.repeats} --separate {args.separate}"
    )
    header = make_header(command, calibration, quiet)
    size = tuple(int(side) for side in reversed(args.size.split("x")))
    runs = []
    with ovfast.load(
        args.checkpoint, device="cpu", dtype=args.dtype, threads=args.threads, max_seq_len=4096
    ) as engine:
        engine.warmup()
        machine = calibration.machine(engine.storage)
        for repeat in range(args.repeats):
            picture = encoded_picture((size[0], size[1]), repeat)
            runs.append(run_once(engine, picture, machine, separate=repeat < args.separate))
            print({name: round(value, 9) for name, value in runs[-1].items()}, flush=True)
        rows = rows_of(args, engine.storage, runs)
    for name, bound in BOUNDS.items():
        over, under = name.split(" / ")
        ratios = [run[over] / run[under] for run in runs]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{name}: {middle:.4f} ({low:.4f}–{high:.4f}); bound {bound}")
    if args.out is not None:
        write_header(args.out, header)
        for row in rows:
            append_row(args.out, row)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a directory, or demo")
    parser.add_argument("--dtype", default="float32", help="of the weights of linear layers")
    parser.add_argument("--size", default="640x480", help="width x height of the picture")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--separate", type=int, default=1, help="repeats with separate scores")
    parser.add_argument("--out", type=Path, help="a .jsonl file for the record")
    args = parser.parse_args()
    run(args)


if __name__ == "__main__":
    main()
