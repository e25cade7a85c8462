"""What choosing among options and asking again about a held picture cost, in first tokens.

    python -m tests.support.checkpoints DIR --size 0.5b      makes a full-size random checkpoint
    python -m benchmarks.choices --checkpoint DIR [--dtype float32] [--size 640x480] [--threads 2]
        [--repeats 5] [--separate 1] [--out FILE.json]

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
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ovfast
from benchmarks.cpu import measure_machine
from benchmarks.side_by_side import QUESTION, commit, encoded_picture, summary, write_record
from ovfast.roofline import Machine, kv_bytes_per_token

OPTIONS = ["a red circle", "a small dog on the grass", "two blue squares", "nothing at all"]
ONE = {"max_new_tokens": 1, "ignore_eos": True}
BOUNDS = {"choose / first": 1.25, "again / first": 0.05, "(again - text) / share": 1.25}


def milliseconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return 1e3 * (time.perf_counter() - start), result


def share_ms(engine: ovfast.Engine, held: int, computed: int, machine: dict[str, Any]) -> float:
    """The floor of attending from `computed` positions to `held` ones in all layers."""
    text = engine.config.text
    flops = 4 * text.num_layers * computed * held * text.num_heads * text.head_dim
    rates = Machine(machine["read_gb_per_s"], machine["torch_float32_gflops"])
    return rates.floor_ms(flops, held * kv_bytes_per_token(text, engine.dtype.itemsize))


def run_once(
    engine: ovfast.Engine, picture: bytes, machine: dict[str, Any], *, separate: bool
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
        row["handle_bytes"] = handle.nbytes
    row["text"], _ = milliseconds(lambda: engine.generate(QUESTION, **ONE))
    held = again.usage.cached_tokens
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    width, height = map(int, args.size.split("x"))
    machine = measure_machine(args.threads)
    with ovfast.load(
        args.checkpoint, device="cpu", dtype=args.dtype, threads=args.threads, max_seq_len=4096
    ) as engine:
        storage = engine.storage
        engine.warmup()
        rows = []
        for repeat in range(args.repeats):
            picture = encoded_picture((width, height), repeat)
            rows.append(run_once(engine, picture, machine, separate=repeat < args.separate))
            shown = {name: round(value, 9) for name, value in rows[-1].items()}
            print(json.dumps(shown), flush=True)
    names = [name for name in rows[0] if name not in ("score_error", "handle_bytes")]
    ratios = {
        "choose / first": [row["choose"] / row["first"] for row in rows],
        "again / first": [row["again"] / row["first"] for row in rows],
        "(again - text) / share": [(row["again"] - row["text"]) / row["share"] for row in rows],
    }
    return {
        "command": f"python -m benchmarks.choices --dtype {args.dtype} --size {args.size}"
        f" --threads {args.threads} --repeats {args.repeats} --separate {args.separate}",
        "machine": machine,
        "commit": commit(),
        "storage": storage,
        "milliseconds": {
            name: summary([row[name] for row in rows if name in row]) for name in names
        },
        "ratios": {name: summary(values) for name, values in ratios.items()},
        "bounds": BOUNDS,
        "handle_bytes": rows[0]["handle_bytes"],
        "score_error": max((row.get("score_error", 0.0) for row in rows), default=None),
        "samples": rows,
    }


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
    parser.add_argument("--out", type=Path, help="a JSON file for the record")
    args = parser.parse_args()
    record = run(args)
    write_record(record, args.out)
    print(json.dumps({k: v for k, v in record.items() if k != "samples"}, indent=1))


if __name__ == "__main__":
    main()
