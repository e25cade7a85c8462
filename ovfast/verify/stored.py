"""Stored references: what transformers made of the cases once, for machines without it.

A file beside the checkpoint holds prompt ids, hashes of views, some logits and the greedy tokens of
each case, and to which weights they belong. `tools/make_golden.py` writes it.
"""

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ovfast.engine import Engine
from ovfast.errors import CheckpointError
from ovfast.json_fields import load_json
from ovfast.model_inputs import ModelInputs
from ovfast.verify.cases import Case, prepare_case
from ovfast.verify.report import VerifyRow
from ovfast.verify.stages import LOGITS_BOUND, TOKENS_BOUND

__all__ = ["STORED_FILE", "Stored", "StoredCase", "compare_stored", "digest", "read_stored"]

STORED_FILE = "verify_golden.json"
NUM_LOGITS = 8  # of a row that are stored, from id 0 on


@dataclass(frozen=True, slots=True)
class StoredCase:
    """What transformers made of one case, in float32.

    Attributes:
        prompt: ids; [id, count] for a run of placeholders.
        views: a hash for each picture and video, in the order of the prompt.
        positions: of which logits are stored.
        first_logits: (positions, NUM_LOGITS).
        largest_logits: the largest magnitude of each of these rows.
        token_ids: the greedy continuation.
        margins: by how much each token was ahead, relative to the row's largest magnitude.
    """

    prompt: list[int | list[int]]
    views: list[str]
    positions: list[int]
    first_logits: list[list[float]]
    largest_logits: list[float]
    token_ids: list[int]
    margins: list[float]

    @property
    def prompt_ids(self) -> list[int]:
        runs = [run if isinstance(run, list) else [run, 1] for run in self.prompt]
        return [token for token, count in runs for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of stored references.

    Attributes:
        made_with: the command, and the versions of transformers, torch and Pillow.
        checkpoint: `digest` of the checkpoint they belong to.
        cases: by name.
    """

    made_with: dict[str, str]
    checkpoint: dict[str, str]
    cases: dict[str, StoredCase]

    @property
    def title(self) -> str:
        packages = {k: v for k, v in self.made_with.items() if k != "command"}
        return f"stored references ({', '.join(f'{k} {v}' for k, v in packages.items())})"


def digest(path: Path) -> dict[str, str]:
    """Hashes of what a checkpoint's answers depend on: its weights and its tokenizer."""
    files = {"weights": sorted(path.glob("*.safetensors")), "tokenizer": [path / "tokenizer.json"]}
    result = {}
    for name, parts in files.items():
        hashed = hashlib.sha256()
        for part in parts:
            with part.open("rb") as file:
                hashed.update(hashlib.file_digest(file, "sha256").digest())
        result[name] = hashed.hexdigest()[:16]
    return result


def hash_views(views: NDArray[np.uint8]) -> str:
    """The first 16 digits of SHA-256 over (views, image_size, image_size, 3) bytes."""
    return hashlib.sha256(np.ascontiguousarray(views).tobytes()).hexdigest()[:16]


def read_stored(file: Path) -> Stored | None:
    """Reads a file of stored references.

    Returns:
        None where there is no such file.

    Raises:
        CheckpointError: the file is not of this kind.
    """
    values = load_json(file)
    if values is None:
        return None
    try:
        cases = {name: StoredCase(**case) for name, case in values["cases"].items()}
        return Stored(values["made_with"], values["checkpoint"], cases)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} holds no stored references as this version writes them ({error!r}); make them "
            "again with tools/make_golden.py, or remove the file."
        ) from error


def compare_stored(
    engine: Engine, stored: Stored, path: Path, cases: tuple[Case, ...]
) -> list[VerifyRow]:
    """Compares an engine with stored references.

    Args:
        engine: in float32.
        stored: of its checkpoint.
        path: the checkpoint's directory.
        cases: all known cases.

    Returns:
        Rows for prompt, views, logits and tokens of each stored case.

    Raises:
        CheckpointError: the references belong to another checkpoint or to other cases.
    """
    found, known = digest(path), {case.name: case for case in cases}
    if found != stored.checkpoint or not known.keys() >= stored.cases.keys():
        raise CheckpointError(
            f"the stored references of {path} are of {stored.checkpoint} with cases "
            f"{', '.join(stored.cases)}; the checkpoint is {found}, the known cases are "
            f"{', '.join(known)}. Make them again with tools/make_golden.py, or restore the files."
        )
    rows: list[VerifyRow] = []
    for name, reference in stored.cases.items():
        inputs = prepare_case(engine, known[name])
        rows += _compare_case(engine, name, inputs, reference, stored.made_with)
    return rows


def _compare_case(
    engine: Engine,
    name: str,
    inputs: ModelInputs,
    reference: StoredCase,
    made_with: dict[str, str],
) -> list[VerifyRow]:
    expected = reference.prompt_ids
    wrong_ids = count_different(inputs.input_ids.tolist(), expected)
    rows = [VerifyRow(name, "prompt", wrong_ids, 0.0)]
    if inputs.spans:
        wrong_views = count_different(plan_hashes(inputs), reference.views)
        here, there = version("pillow"), made_with.get("pillow", "?")
        note = f"resized by Pillow {here}, the references by {there}" if wrong_views else ""
        rows.append(VerifyRow(name, "views", wrong_views, 0.0, note))
    if len(expected) != inputs.num_tokens:
        return rows  # the positions would mean something else
    error = logits_error(engine.forward(inputs, positions=reference.positions), reference)
    rows.append(VerifyRow(name, "logits", error, LOGITS_BOUND))
    count = len(reference.token_ids)
    output = engine.generate(inputs, max_new_tokens=count, ignore_eos=True)
    pairs = zip(output.token_ids, reference.token_ids, strict=True)
    for index, (mine, their) in enumerate(pairs):
        if mine != their:
            note = f"token {index} is {mine} instead of {their}"
            margin = reference.margins[index]
            return [*rows, VerifyRow(name, "tokens", margin, TOKENS_BOUND, note)]
    return [*rows, VerifyRow(name, "tokens", 0.0, TOKENS_BOUND, f"{count} equal")]


def logits_error(logits: torch.Tensor, reference: StoredCase) -> float:
    """Worst distance from stored logits, relative to the largest magnitude.

    Args:
        logits: (positions, vocab_size) float32.
        reference: what they should be; its largest magnitudes stand for the logits not stored.
    """
    largest = torch.tensor(reference.largest_logits)
    expected = torch.tensor(reference.first_logits)
    given = logits[:, : expected.shape[1]].cpu()
    difference = (given - expected).abs().amax(1)
    difference = torch.maximum(difference, (logits.abs().amax(1).cpu() - largest).abs())
    return float(difference.max() / largest.max())


def plan_hashes(inputs: ModelInputs) -> list[str]:
    """`hash_views` of each picture and video, in the order of the prompt."""
    hashes, first = [], 0
    for span in inputs.spans:
        last = first + inputs.plans[span.plan_index].num_views
        hashes.append(hash_views(inputs.views[first:last]))
        first = last
    return hashes


def count_different(ours: list[Any], theirs: list[Any]) -> float:
    """Places at which two lists differ, those that only one has included."""
    pairs = zip(ours, theirs, strict=False)
    return float(sum(a != b for a, b in pairs) + abs(len(ours) - len(theirs)))
