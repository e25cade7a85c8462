"""The ``ovfast`` command: generate, explain, verify, convert, doctor, demo, bench. Parsing and
printing only.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import ovfast
from ovfast.anyres import VisualOptions
from ovfast.errors import OVFastError

app = typer.Typer(
    help="LLaVA-OneVision answered now.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="A directory, a Hub id, or 'demo'.")]
Images = Annotated[
    list[str] | None, typer.Option("--image", "-i", help="A picture; may be given several times.")
]
Videos = Annotated[
    list[str] | None,
    typer.Option("--video", "-v", help="A video file; may be given several times."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Quantization = Annotated[
    str | None, typer.Option(help="int8 or int4 weights on a CPU, fp8 on a GPU.")
]
MatmulPrecision = Annotated[
    str, typer.Option(help="float32, or bfloat16 on a CPU that multiplies it.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default all that are free to use.")]
Backend = Annotated[str, typer.Option(help="auto, triton, native or reference.")]
MaxViews = Annotated[
    int | None, typer.Option(help="Most views of a picture; 1 keeps only the base view.")
]
AnyresMax = Annotated[
    int | None, typer.Option(help="The N of anyres_max_N; default the checkpoint's.")
]
TokenPolicy = Annotated[str, typer.Option(help="paper, anyres or lmms_eval.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The question; <image> and <video> mark places.")],
    image: Images = None,
    video: Videos = None,
    model: Model = "demo",
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from this share of probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    backend: Backend = "auto",
    quantization: Quantization = None,
    matmul_precision: MatmulPrecision = "float32",
    threads: Threads = None,
    max_views: MaxViews = None,
    token_policy: TokenPolicy = "paper",
    num_frames: Annotated[int, typer.Option(help="Frames sampled from a video.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Answers one question, streaming to the terminal."""
    given: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    sampling = {name: value for name, value in given.items() if value is not None}
    visual = VisualOptions(token_policy=token_policy, max_views=max_views, num_frames=num_frames)
    with ovfast.load(
        model,
        device=device,
        dtype=dtype,
        backend=backend,
        quantization=quantization,
        matmul_precision=matmul_precision,
        threads=threads,
        visual=visual,
    ) as engine:
        chunks = engine.stream(
            prompt,
            images=image,
            videos=video,
            system=system,
            max_new_tokens=max_new_tokens,
            **sampling,
        )
        for chunk in chunks:
            if not as_json:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
            output = chunk.output
    assert output is not None
    if as_json:
        print(json.dumps(output.as_dict()))
    else:
        print()
        timings, usage = output.timings, output.usage
        Console(stderr=True, highlight=False).print(
            f"[dim]{usage.prompt_tokens} prompt tokens ({usage.visual_tokens} visual,"
            f" {usage.views} views), first token {timings.ttft_ms:.0f} ms,"
            f" {usage.completion_tokens} tokens at {timings.tpot_ms:.1f} ms[/dim]"
        )


@app.command()
def explain(
    image: Annotated[str, typer.Option("--image", "-i", help="The picture.")],
    out: Annotated[Path, typer.Option(help="Where the PNG goes.")] = Path("explain.png"),
    model: Model = "demo",
    max_views: MaxViews = None,
    anyres_max: AnyresMax = None,
    as_json: AsJson = False,
) -> None:
    """Draws how a picture becomes views and tokens, and what the options would change."""
    from ovfast.anyres import plan_image
    from ovfast.checkpoint import resolve_checkpoint
    from ovfast.config import ModelConfig
    from ovfast.explain import as_dict, explain_png, explain_text
    from ovfast.media import load_image

    visual = VisualOptions(max_views=max_views, anyres_max=anyres_max)
    geometry = ModelConfig.from_checkpoint(resolve_checkpoint(model)).geometry
    pixels = load_image(image)
    plan = plan_image(pixels.shape[:2], geometry, visual, num_images=1)
    explain_png(out, pixels, plan, geometry, visual)
    print(
        json.dumps(as_dict(plan, geometry, visual))
        if as_json
        else explain_text(plan, geometry, visual)
    )
    print(f"wrote {out}", file=sys.stderr)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A directory, a Hub id, or 'demo'.")] = "demo",
    device: Device = "auto",
    dtype: DType = "float32",
    backend: Backend = "auto",
    as_json: AsJson = False,
) -> None:
    """Proves parity on this machine, stage by stage; exit code 1 where it fails."""
    from ovfast.verify import verify as run

    report = run(model, device=device, dtype=dtype, backend=backend)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        table = Table(title=f"{model} against {report.reference}")
        for heading in ("case", "stage", "worst error", "bound", "", "note"):
            table.add_column(heading)
        for row in report.rows:
            verdict = "ok" if row.ok else "FAIL"
            cells = (row.case, row.stage, f"{row.error:.2e}", f"{row.bound:.3g}", verdict, row.note)
            table.add_row(*cells)
        Console().print(table)
        for note in report.notes:
            print(note)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A directory, a Hub id, or 'demo'.")],
    out: Annotated[Path, typer.Argument(help="The directory to make.")],
    quantization: Quantization = None,
    dtype: DType = "auto",
) -> None:
    """Writes weights packed for the native back end, which then loads in a fraction of a second."""
    path = ovfast.convert(model, out, quantization=quantization, dtype=dtype)
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"wrote {path}, {size / 1e6:.1f} MB; load it as any other model")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Shows versions, devices and what runs where, and answers one question as a self-test."""
    from ovfast.doctor import examine

    report = examine()
    if as_json:
        print(json.dumps(report))
    else:
        for section, entries in report.items():
            table = Table(title=section, show_header=False, title_justify="left")
            for name, value in entries.items():
                table.add_row(name, str(value))
            Console().print(table)
    raise typer.Exit(0 if report["self-test"]["passed"] else 1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the explanatory picture goes.")] = Path(
        "demo-out"
    ),
) -> None:
    """Asks the embedded model about its sample pictures and clip; exit code 1 if an answer is
    wrong.
    """
    from ovfast.demo_run import run_demo

    results = run_demo(out)
    for result in results:
        mark = "ok" if result.correct else f"expected {result.expected!r}"
        print(", ".join(result.media))
        print(f"  {result.question}\n  {result.answer}  [{mark}, {result.total_ms:.0f} ms]")
    print(f"wrote {out / 'explain.png'}")
    raise typer.Exit(0 if all(result.correct for result in results) else 1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench(ctx: typer.Context) -> None:
    """Measures this machine, beside peers and physical limits: latency, stages, throughput, ..."""
    from ovfast.bench.cli import app as bench_app  # its imports are for no other command

    bench_app(ctx.args, prog_name="ovfast bench")


def main(args: list[str] | None = None) -> Any:
    """Runs the command; errors of ovfast become one line and exit code 2, Ctrl-C exit code 130.

    What the terminal's encoding does not have is printed as "?".
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return app(args)
    except OVFastError as error:
        print(f"ovfast: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:  # of our own output: a full disk, a folder that is not there
        print(f"ovfast: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
