"""Parity proof on the user's machine: the same cases through ovfast and through a reference.

The reference is transformers where it is installed and can load the checkpoint, else a file of
stored references beside the checkpoint. The cases are in `cases`, transformers in `oracle`, the
stored references in `stored`, distances and their bounds in `stages`.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovfast.anyres import VisualOptions
from ovfast.checkpoint import resolve_checkpoint
from ovfast.config import ModelConfig
from ovfast.engine import Engine
from ovfast.errors import BackendError, OptionError
from ovfast.home_stream import use_device
from ovfast.loading import load
from ovfast.model_inputs import ModelInputs
from ovfast.packed_weights import is_packed
from ovfast.storage import DTYPES
from ovfast.verify.cases import NUM_NEW_TOKENS, Case, make_cases, prepare_case
from ovfast.verify.oracle import Oracle, views_of, why_unavailable
from ovfast.verify.report import VerifyReport, VerifyRow
from ovfast.verify.stages import Head, Stages, compare, keep_head, run_engine
from ovfast.verify.stored import STORED_FILE, Stored, compare_stored, count_different, read_stored

__all__ = ["VerifyReport", "VerifyRow", "verify"]

logger = logging.getLogger("ovfast")


def verify(
    model: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    backend: str = "auto",
) -> VerifyReport:
    """Compares ovfast with a reference, stage by stage, over a fixed set of requests.

    With transformers: prompt ids and views must be equal; tower features, visual rows and logits
    lie within a bound (float32: worst element by the largest magnitude; 16 bits: RMS distance from
    float32 by that of transformers); 16 greedy tokens are equal up to ties. With stored references:
    prompt ids, hashes of views, some logits and the tokens.

    Args:
        model: a directory, a Hub id, or "demo".
        device: as in `load`; the reference runs there too.
        dtype: as in `load`; stored references are for float32.
        backend: as in `load`.

    Returns:
        The report; `ok` says whether every stage of every case passed.

    Raises:
        BackendError: there is no reference for this checkpoint here.
        OptionError: stored references and another dtype than float32.
        OVFastError: the checkpoint or an argument cannot be used.
    """
    path = resolve_checkpoint(model)
    if is_packed(path):
        raise BackendError(
            f"{path} holds packed weights, which no reference reads. Verify the original; "
            "a packed directory of it gives the same bits."
        )
    problem = why_unavailable(ModelConfig.from_checkpoint(path))
    stored = read_stored(path / STORED_FILE) if problem is not None else None
    if problem is not None and stored is None:
        raise BackendError(
            f"{path} holds no stored references ({STORED_FILE}), so transformers has to be the "
            f"reference, but {problem}. The model 'demo' has stored references."
        )
    engine = load(path, device=device, dtype=dtype, backend=backend, visual=VisualOptions())
    with engine, use_device(engine.device):
        about = {
            "model": str(model),
            "device": str(engine.device),
            "dtype": engine.storage,
            "backend": engine.ops.backend,
        }
        if stored is None:
            return _with_transformers(engine, path, about)
        return _with_stored(engine, path, about, stored, str(problem))


def _with_stored(
    engine: Engine, path: Path, about: dict[str, str], stored: Stored, problem: str
) -> VerifyReport:
    if engine.storage != "float32":
        raise OptionError(
            f"dtype={about['dtype']!r} with {stored.title}; they are for 'float32'. Use that, or "
            f"compare with transformers: {problem}."
        )
    cases = make_cases(engine.config.vision.image_size)
    rows = compare_stored(engine, stored, path, cases)
    return VerifyReport(**about, reference=stored.title, rows=tuple(rows), notes=(problem,))


def _with_transformers(engine: Engine, path: Path, about: dict[str, str]) -> VerifyReport:
    """One model at a time is in memory: ours leaves its results and its head."""
    # Weights in 16 bits are judged as a model of 16 bits, also where arithmetic is float32.
    dtype, device = DTYPES[engine.storage], engine.device
    requests, notes = _requests(engine)
    ours = {case.name: run_engine(engine, inputs) for case, inputs in requests}
    forbidden = engine._forbidden.cpu()
    heads = [keep_head(engine)]
    rows: dict[str, list[VerifyRow]] = {}
    results: list[dict[str, Stages | str]] = []
    for precision in dict.fromkeys((dtype, torch.float32)):
        with Oracle(path, precision, device) as oracle:
            reference = f"transformers {oracle.version}"
            for case, inputs in requests if not results else ():
                rows[case.name] = _compare_inputs(oracle, case, inputs)
            stages, head = _run_reference(oracle, requests, forbidden)
        results.append(stages)
        heads.append(head)
    for case, _ in requests:
        found = [result[case.name] for result in results]
        rows[case.name] += _compare_stages(case.name, ours[case.name], found, tuple(heads))
    flat = tuple(row for case_rows in rows.values() for row in case_rows)
    return VerifyReport(**about, reference=reference, rows=flat, notes=notes)


def _requests(engine: Engine) -> tuple[list[tuple[Case, ModelInputs]], tuple[str, ...]]:
    """The cases that fit into the model's context, and a note for each that does not."""
    requests, notes = [], []
    for case in make_cases(engine.config.vision.image_size):
        inputs = prepare_case(engine, case)
        if inputs.num_tokens + NUM_NEW_TOKENS <= engine.max_seq_len:
            requests.append((case, inputs))
        else:
            notes.append(
                f"case {case.name!r} was left out: {inputs.num_tokens} tokens do not fit into the "
                f"model's {engine.max_seq_len}"
            )
    return requests, tuple(notes)


def _compare_inputs(oracle: Oracle, case: Case, inputs: ModelInputs) -> list[VerifyRow]:
    """What the model is given: ids of the prompt, bytes of the pictures' views."""
    num_tokens = [inputs.plans[span.plan_index].num_tokens for span in inputs.spans]
    theirs = oracle.prompt_ids(case, num_tokens)
    wrong = count_different(inputs.input_ids.tolist(), theirs)
    rows = [VerifyRow(case.name, "prompt", wrong, 0.0)]
    if case.images:
        pictures = views_of(inputs, "image")
        views: list[list[Any]] = [
            [view.tobytes() for picture in side for view in picture]
            for side in (pictures, oracle.views(case, [len(picture) for picture in pictures]))
        ]
        note = f"{len(views[0])} views"
        rows.append(VerifyRow(case.name, "views", count_different(*views), 0.0, note))
    return rows


def _run_reference(
    oracle: Oracle, requests: list[tuple[Case, ModelInputs]], forbidden: Tensor
) -> tuple[dict[str, Stages | str], Head]:
    """Stages by case, or what transformers said where it refused one."""
    results: dict[str, Stages | str] = {}
    for case, inputs in requests:
        logger.info("verify: %s through transformers %s", case.name, oracle.version)
        try:
            results[case.name] = oracle.run(case, inputs, forbidden)
        except (ValueError, RuntimeError) as error:
            results[case.name] = f"transformers: {type(error).__name__}: {error}"
    return results, oracle.head()


def _compare_stages(
    case: str, ours: Stages, found: list[Stages | str], heads: tuple[Head, ...]
) -> list[VerifyRow]:
    refused = [result for result in found if isinstance(result, str)]
    if refused:
        return [VerifyRow(case, "run", float("inf"), 0.0, refused[0])]
    stages = [result for result in found if isinstance(result, Stages)]
    truth = stages[1] if len(stages) > 1 else None
    return compare(case, ours, stages[0], truth, heads)
