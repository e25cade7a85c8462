"""`ovfast bench`: parsing and printing only.

Every command that measures watches the machine first, calibrates it, writes a record if told where,
and prints a table of what it measured.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ovfast.bench.accuracy import Variant, default_variants, run_accuracy
from ovfast.bench.compare import compare as compare_records
from ovfast.bench.compare import rerun
from ovfast.bench.kernels import run_kernels
from ovfast.bench.latency import DEFINITIONS, run_latency
from ovfast.bench.memory import run_memory
from ovfast.bench.plots import draw
from ovfast.bench.record import read
from ovfast.bench.report import write_report
from ovfast.bench.running import (
    chosen_peers,
    chosen_sides,
    measuring,
    measuring_loaded,
    table_console,
)
from ovfast.bench.sides import REPEATS, SLOW_REPEATS, Rounds
from ovfast.bench.stages import CONTEXTS, PROMPT, STAGES, run_stages
from ovfast.bench.startup import run_startup
from ovfast.bench.table import print_comparison
from ovfast.bench.targets import PEERS, Target
from ovfast.bench.throughput import run_throughput
from ovfast.bench.workloads import WORKLOADS, named_workloads
from ovfast.cpu_threads import available_threads
from ovfast.demo_run import demo_questions, samples_path
from ovfast.errors import OptionError

app = typer.Typer(
    help="Measures this machine: ovfast beside its peers, and the physical limit beside both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="A directory, a Hub id, or 'demo'.")]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", help="May be repeated; peers run the first. Default 'demo'."),
]
Workloads = Annotated[
    list[str] | None,
    typer.Option("--workload", "-w", help=f"May be repeated: {', '.join(WORKLOADS)}."),
]
Storages = Annotated[
    list[str] | None,
    typer.Option(
        "--storage", "-s", help="Of ovfast's weights; may be repeated. Default the checkpoint's."
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--peer",
        "-p",
        help=f"NAME or NAME:STORAGE; may be repeated: {', '.join(PEERS)}. Default transformers"
        " where it is installed; 'none' for none.",
    ),
]
Tokens = Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Of each answer.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of every side; default all free ones.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Repeats = Annotated[
    int,
    typer.Option(min=1, help="Counted rounds."),
]
SlowRepeats = Annotated[
    int, typer.Option(min=1, help="Counted rounds at most, where sides take over a second.")
]
Warmup = Annotated[int, typer.Option(min=0, help="Rounds before that are not counted.")]
Budget = Annotated[
    float,
    typer.Option("--budget-s", help="Seconds of measuring after which no further round starts."),
]
Out = Annotated[Path | None, typer.Option(help="A file for the record, .jsonl.")]

PICTURES = ("text", "384", "640x480")
NO_BUDGET = 1e9


@app.command()
def latency(
    ctx: typer.Context,
    model: Model = "demo",
    workload: Workloads = None,
    storage: Storages = None,
    peer: Peers = None,
    new_tokens: Tokens = 32,
    device: Device = "auto",
    threads: Threads = None,
    repeats: Repeats = REPEATS,
    slow_repeats: SlowRepeats = SLOW_REPEATS,
    warmup: Warmup = 1,
    budget_s: Budget = NO_BUDGET,
    out: Out = None,
) -> None:
    """Whole requests: first token, time per token, stages, memory; sides in turn."""
    target = Target(model, device, threads or available_threads())
    workloads = named_workloads(workload or PICTURES)
    sides = chosen_sides(target, storage, peer)
    with measuring_loaded(ctx, target, sides, out, DEFINITIONS) as (session, bounds, loaded):
        rounds = Rounds(repeats, slow_repeats, warmup, time.monotonic() + budget_s)
        run_latency(
            session, target, bounds, loaded, workloads, new_tokens=new_tokens, rounds=rounds
        )


@app.command()
def stages(
    ctx: typer.Context,
    model: Model = "demo",
    stage: Annotated[
        list[str] | None, typer.Option(help=f"May be repeated: {', '.join(STAGES)}. Default all.")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Of decode steps; may be repeated.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a prefill.")] = PROMPT,
    storage: Storages = None,
    peer: Peers = None,
    device: Device = "auto",
    threads: Threads = None,
    repeats: Repeats = REPEATS,
    slow_repeats: SlowRepeats = SLOW_REPEATS,
    warmup: Warmup = 1,
    budget_s: Budget = NO_BUDGET,
    out: Out = None,
) -> None:
    """Single stages: a decode step by context, a view of the tower, a prefill, preprocessing."""
    for name in stage or ():
        if name not in STAGES:
            raise OptionError(f"stage {name!r}; expected one of {', '.join(STAGES)}.")
    target = Target(model, device, threads or available_threads())
    sides = chosen_sides(target, storage, peer)
    with measuring_loaded(ctx, target, sides, out) as (session, bounds, loaded):
        rounds = Rounds(repeats, slow_repeats, warmup, time.monotonic() + budget_s)
        run_stages(
            session,
            target,
            bounds,
            loaded,
            stages=[name for name in STAGES if name in (stage or STAGES)],
            prompt_tokens=prompt_tokens,
            contexts=sorted(context or CONTEXTS, reverse=True),
            rounds=rounds,
        )


@app.command()
def throughput(
    ctx: typer.Context,
    model: Model = "demo",
    workload: Workloads = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="May be repeated. Default 1, 4 and 16.")
    ] = None,
    storage: Storages = None,
    peer: Peers = None,
    new_tokens: Tokens = 32,
    device: Device = "auto",
    threads: Threads = None,
    repeats: Repeats = REPEATS,
    slow_repeats: SlowRepeats = SLOW_REPEATS,
    warmup: Warmup = 1,
    budget_s: Budget = NO_BUDGET,
    out: Out = None,
) -> None:
    """Tokens a second by batch size."""
    target = Target(model, device, threads or available_threads())
    workloads, batches = named_workloads(workload or PICTURES), batch or [1, 4, 16]
    sides = chosen_sides(target, storage, peer, max_batch_size=max(batches))
    with measuring_loaded(ctx, target, sides, out) as (session, bounds, loaded):
        rounds = Rounds(repeats, slow_repeats, warmup, time.monotonic() + budget_s)
        run_throughput(
            session,
            target,
            bounds,
            loaded,
            workloads,
            batches=batches,
            new_tokens=new_tokens,
            rounds=rounds,
        )


@app.command()
def startup(
    ctx: typer.Context,
    model: Models = None,
    storage: Storages = None,
    peer: Peers = None,
    device: Device = "auto",
    threads: Threads = None,
    repeats: Annotated[int, typer.Option(min=1, help="Starts of each side.")] = 6,
    warmup: Warmup = 1,
    out: Out = None,
) -> None:
    """Import, load and first token in new processes, with warm and cold file cache."""
    threads = threads or available_threads()
    targets = [Target(name, device, threads) for name in model or ["demo"]]
    ours = [
        (target, target.ovfast_side(name)) for target in targets for name in storage or ["auto"]
    ]
    peers = chosen_peers(targets[0], peer)
    sides = [*ours, *((targets[0], spec) for spec in peers)]
    with measuring(ctx, targets[0], peers, out) as (session, _):
        run_startup(session, sides, Rounds(repeats=repeats, warmup=warmup))


@app.command()
def memory(
    ctx: typer.Context,
    model: Model = "demo",
    workload: Workloads = None,
    storage: Storages = None,
    peer: Peers = None,
    new_tokens: Tokens = 8,
    device: Device = "auto",
    threads: Threads = None,
    repeats: Annotated[int, typer.Option(min=1, help="Requests of each process.")] = 2,
    out: Out = None,
) -> None:
    """Peak of resident memory of a request, each side alone in a process of its own."""
    target = Target(model, device, threads or available_threads())
    workloads = named_workloads(workload or ("640x480",))
    sides = chosen_sides(target, storage, peer)
    with measuring(ctx, target, sides, out) as (session, _):
        rounds = Rounds(repeats=repeats, warmup=0)
        run_memory(session, target, sides, workloads, new_tokens=new_tokens, rounds=rounds)


@app.command()
def accuracy(
    ctx: typer.Context,
    device: Device = "auto",
    threads: Threads = None,
    pictures: Annotated[
        int, typer.Option(min=1, help="Random ones whose answers are compared with float32's.")
    ] = 50,
    scenes: Annotated[
        int, typer.Option(min=0, help="Of each kind, drawn by the repository's tools.")
    ] = 0,
    out: Out = None,
) -> None:
    """Answers of the demo model on every back end and storage."""
    target = Target("demo", device, threads or available_threads())
    questions = [
        {
            "prompt": entry["question"],
            "answer": entry["answer"],
            "images": _sample_files(entry["images"]),
            "videos": _sample_files(entry["videos"]),
        }
        for entry in demo_questions()
    ]
    with measuring(ctx, target, (), out) as (session, _):
        run_accuracy(
            session,
            default_variants(target.device.type),
            questions=questions,
            num_pictures=pictures,
            num_scenes=scenes,
            device=str(target.device),
            threads=target.threads,
        )


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A record.")],
    new: Annotated[
        Path | None, typer.Argument(help="Another; without it the command of the first runs again.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Where the checkpoint of the first record is here."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A file for the record of that run.")] = None,
) -> None:
    """What became faster or slower between two records, or one and this code; exit code 1 where
    something became slower.
    """
    before = read(old)
    if new is not None:
        if model or out:
            raise OptionError("--model and --out are for a new run; leave NEW or them out.")
        after = read(new)
    else:
        with tempfile.TemporaryDirectory() as folder:
            after = rerun(before, out or Path(folder) / "new.jsonl", model or ())
    comparison = compare_records(before, after)
    print_comparison(comparison, table_console())
    raise typer.Exit(1 if comparison.slower else 0)


@app.command()
def plot(
    record: Annotated[Path, typer.Argument(help="A record.")],
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("bench-plots"),
) -> None:
    """Pictures of a record, PNG and SVG; needs the extra `bench`."""
    files = draw(read(record), out, record.stem)
    if not files:
        raise OptionError(
            f"{record} has no rows that a chart shows; expected those of latency, stages or"
            " kernels. Record one of these."
        )
    for path in files:
        typer.echo(path)


@app.command()
def report(
    records: Annotated[list[Path], typer.Argument(help="Committed records.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("BENCHMARKS.md"),
    pictures: Annotated[Path, typer.Option(help="Directory of its pictures.")] = Path(
        "benchmarks/pictures"
    ),
) -> None:
    """A page of tables and pictures from committed records; needs the extra `bench`."""
    for path in write_report(records, out, pictures):
        typer.echo(path)


@app.command()
def kernels(
    ctx: typer.Context,
    model: Model = "demo",
    storage: Storages = None,
    device: Device = "auto",
    threads: Threads = None,
    seconds: Annotated[
        float, typer.Option(help="For one operation on one back end, at most.")
    ] = 0.5,
    out: Out = None,
) -> None:
    """Every operation on every back end at the model's shapes."""
    target = Target(model, device, threads or available_threads())
    variants = default_variants(target.device.type)
    if storage:
        own = variants[-1].backend
        variants = [variants[0], *(Variant(own, name) for name in storage)]
    with measuring(ctx, target, (), out) as (session, bounds):
        run_kernels(session, target, bounds, variants, seconds=seconds)


def _sample_files(names: Any) -> list[Path] | None:
    return [samples_path() / name for name in names] or None
