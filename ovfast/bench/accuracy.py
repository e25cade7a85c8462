"""What back ends and storages cost in answers: the demo model against what is right, and against
itself in float32 on the reference back end.

`samples` are the questions that ship with the model; `scenes` are drawn as those it was trained on,
from seeds it has not seen, by the repository's tools.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ovfast.bench.record import Row
from ovfast.bench.session import Session
from ovfast.bench.workloads import encoded_picture
from ovfast.engine import Engine
from ovfast.errors import OptionError, OVFastError
from ovfast.loading import load
from ovfast.media import load_image
from ovfast.ops import has_native, multiplies_bfloat16
from ovfast.storage import BFLOAT16_MATMUL, GROUPS, load_options

__all__ = ["Variant", "default_variants", "run_accuracy"]

NEW_TOKENS = 16
PICTURE_HW = (150, 170)


@dataclass(frozen=True, slots=True)
class Variant:
    """A back end and how it keeps the weights."""

    backend: str
    storage: str


def default_variants(device: str) -> list[Variant]:
    """Every one that a device has; the first is what the others are compared with.

    Args:
        device: "cpu" or "cuda".
    """
    if device == "cuda":
        return [Variant("reference", "float32"), Variant("triton", "bfloat16")]
    native = ("float32", "bfloat16", *GROUPS) if has_native() else ()
    if multiplies_bfloat16():
        native = (*native, BFLOAT16_MATMUL)
    return [Variant("reference", "float32"), *(Variant("native", name) for name in native)]


def run_accuracy(
    session: Session,
    variants: Sequence[Variant],
    *,
    questions: Sequence[Mapping[str, Any]],
    num_pictures: int,
    num_scenes: int,
    device: str,
    threads: int,
) -> None:
    """Asks every variant the same.

    Args:
        session: takes the rows.
        variants: the first is the one that the others' tokens are compared with.
        questions: keyword arguments of `generate`, and the right "answer".
        num_pictures: random pictures whose answers are compared token by token.
        num_scenes: of each kind, drawn by the repository's tools; 0 for none.
        device: as in `load`.
        threads: as in `load`.

    Raises:
        OptionError: scenes were asked for outside of a checkout.
    """
    evaluate = _scene_evaluator() if num_scenes else None
    first: list[tuple[int, ...]] | None = None
    for variant in variants:
        session.show(f"accuracy, {variant.backend} {variant.storage}")
        given = _head(variant, device, threads)
        try:
            engine = _open(variant, device, threads)
        except OVFastError as error:
            session.tell(f"accuracy, {variant.backend} {variant.storage}: failed: {error}")
            session.add(
                Row(**given("samples"), metric="exact_answers", samples=(), error=f"{error}")
            )
            continue
        with engine:
            right = [_is_right(engine, question) for question in questions]
            session.add(Row(**given("samples"), metric="exact_answers", samples=_percent(right)))
            tokens = [_tokens(engine, seed) for seed in range(num_pictures)]
            first = first or tokens
            same = [ours == theirs for ours, theirs in zip(tokens, first, strict=True)]
            session.add(
                Row(**given("random pictures"), metric="answers_as_float32", samples=_percent(same))
            )
            for row in evaluate(engine, num_scenes) if evaluate else ():
                samples = (100.0 * row.share,)
                session.add(Row(**given(row.kind), metric="exact_answers", samples=samples))


def _head(variant: Variant, device: str, threads: int) -> Any:
    def given(workload: str) -> dict[str, Any]:
        return {
            "suite": "accuracy",
            "workload": workload,
            "side": "ovfast",
            "storage": variant.storage,
            "unit": "%",
            "parameters": {
                "model": "demo",
                "backend": variant.backend,
                "device": device.partition(":")[0],
                "threads": threads,
            },
        }

    return given


def _open(variant: Variant, device: str, threads: int) -> Engine:
    kept: dict[str, Any] = load_options(variant.storage)
    return load(
        "demo",
        device=device,
        backend=variant.backend,
        threads=threads,
        **kept,
    )


def _is_right(engine: Engine, question: Mapping[str, Any]) -> bool:
    arguments = {name: value for name, value in question.items() if name != "answer"}
    output = engine.generate(**arguments, max_new_tokens=64)
    return bool(output.text == question["answer"])


def _tokens(engine: Engine, seed: int) -> tuple[int, ...]:
    picture = load_image(encoded_picture(PICTURE_HW, seed))
    question = "What is shown here?"
    output = engine.generate(question, images=picture, max_new_tokens=NEW_TOKENS)
    tokens: tuple[int, ...] = output.token_ids
    return tokens


def _percent(outcomes: Sequence[bool]) -> tuple[float, ...]:
    return (100.0 * sum(outcomes) / len(outcomes),)


def _scene_evaluator() -> Any:
    try:
        return importlib.import_module("tools.evaluate_demo").evaluate
    except ImportError as error:
        raise OptionError(
            f"scenes need the repository's tools ({error}); run `python -m ovfast bench accuracy`"
            " in a checkout, or leave --scenes out."
        ) from None
