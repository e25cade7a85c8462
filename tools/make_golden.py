"""Makes the stored references with transformers: what it answers, for machines without it.

    python tools/make_golden.py                     tests/golden/*.json, of random checkpoints
    python tools/make_golden.py --demo ovfast/demo  verify_golden.json of the demo model

Prompt ids, views, logits and tokens are those of transformers alone; ovfast only says how many
tokens each picture has, which transformers checks.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ovfast import Engine, load  # noqa: E402
from ovfast.verify.cases import Case, make_cases, prepare_case  # noqa: E402
from ovfast.verify.oracle import Oracle, why_unavailable  # noqa: E402
from ovfast.verify.stored import (  # noqa: E402
    NUM_LOGITS,
    STORED_FILE,
    StoredCase,
    digest,
    hash_views,
    read_stored,
)
from tests.support.checkpoints import CheckpointSpec, make_checkpoint  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
# Fields of CheckpointSpec that differ from its defaults. The MLP widths are such that every token
# is ahead by MIN_MARGIN, so that tokens do not depend on the machine.
SPECS: dict[str, dict[str, Any]] = {
    "tied": {"hidden": 448, "heads": 7, "kv_heads": 1, "head_dim": 64, "mlp": 262},
    "untied": {"heads": 8, "kv_heads": 1, "head_dim": 16, "mlp": 308, "tie": False},
}
MIN_MARGIN = 2e-3
NUM_POSITIONS = 4
SHORTEST_RUN = 8  # of equal ids, to be stored as [id, count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, help="a demo checkpoint; only its file is written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.demo is not None:
        command = "python tools/make_golden.py --demo DIR"
        write(args.demo / STORED_FILE, {}, args.demo, command)
        return
    with tempfile.TemporaryDirectory() as directory:
        for name, fields in SPECS.items():
            checkpoint = make_checkpoint(Path(directory) / name, CheckpointSpec(**fields))
            command = "python tools/make_golden.py"
            write(GOLDEN / f"{name}.json", {"spec": fields}, checkpoint, command)


def write(file: Path, head: dict[str, Any], checkpoint: Path, command: str) -> None:
    """Makes the references of a checkpoint and writes them, a line a field."""
    made_with = {"command": command, "transformers": version("transformers")}
    made_with |= {"torch": torch.__version__, "pillow": version("pillow")}
    fields = head | {"made_with": made_with, "checkpoint": digest(checkpoint)}
    lines = [f'"{name}": {json.dumps(value)},' for name, value in fields.items()]
    cases = []
    for name, case in make_references(checkpoint).items():
        values = (f'"{k}": {json.dumps(v)}' for k, v in asdict(case).items())
        cases.append(f"{json.dumps(name)}: {{\n" + ",\n".join(values) + "\n}")
        if min(case.margins) < MIN_MARGIN:
            print(f"{file.name}, {name}: a token is ahead by {min(case.margins):.1e} only")
    text = "{\n" + "\n".join(lines) + '\n"cases": {\n' + ",\n".join(cases) + "\n}\n}\n"
    file.write_text(text)
    read_stored(file)
    print(f"wrote {file} ({len(text)} bytes)")


def make_references(checkpoint: Path) -> dict[str, StoredCase]:
    """The references of every case that fits into the checkpoint's context."""
    engine = load(checkpoint, device="cpu", dtype="float32")
    problem = why_unavailable(engine.config)
    if problem is not None:
        raise SystemExit(problem)
    with engine, Oracle(checkpoint, torch.float32, torch.device("cpu")) as oracle:
        cases = make_cases(engine.config.vision.image_size)
        return {case.name: make_reference(engine, oracle, case) for case in cases}


def make_reference(engine: Engine, oracle: Oracle, case: Case) -> StoredCase:
    inputs = prepare_case(engine, case)
    num_tokens = [inputs.plans[span.plan_index].num_tokens for span in inputs.spans]
    prompt_ids = oracle.prompt_ids(case, num_tokens)
    inputs = replace(inputs, input_ids=np.array(prompt_ids, np.int64))
    forbidden = engine._forbidden
    stages = oracle.run(case, inputs, forbidden)
    count = len(prompt_ids)
    positions = sorted({(i + 1) * count // NUM_POSITIONS - 1 for i in range(NUM_POSITIONS)})
    logits = oracle.head()(stages.hidden[positions])
    best = stages.token_logits.topk(2).values
    finite = stages.token_logits.masked_fill(forbidden, 0.0)
    return StoredCase(
        prompt=with_runs(prompt_ids),
        views=[hash_views(views) for views in media_views(engine, oracle, case)],
        positions=positions,
        first_logits=[rounded(row[:NUM_LOGITS]) for row in logits],
        largest_logits=rounded(logits.abs().amax(1)),
        token_ids=list(stages.token_ids),
        margins=rounded((best[:, 0] - best[:, 1]) / finite.abs().amax(1)),
    )


def media_views(engine: Engine, oracle: Oracle, case: Case) -> list[np.ndarray]:
    """Views of each picture and video in the order of the prompt, none of them made by ovfast."""
    inputs = prepare_case(engine, case)
    side = engine.config.vision.image_size
    counts = [inputs.plans[span.plan_index].num_views for span in inputs.spans]
    kinds = [span.kind for span in inputs.spans]
    pictures = [count for count, kind in zip(counts, kinds, strict=True) if kind == "image"]
    images = iter(oracle.views(case, pictures) if pictures else ())
    # Its video processor needs torchvision and is not exact; the original squashes with Pillow.
    clips = iter(
        np.stack([np.asarray(Image.fromarray(frame).resize((side, side))) for frame in clip])
        for clip in case.videos
    )
    return [next(images) if kind == "image" else next(clips) for kind in kinds]


def with_runs(ids: list[int]) -> list[int | list[int]]:
    result: list[int | list[int]] = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or ids[end] != ids[start]:
            length = end - start
            result += [[ids[start], length]] if length >= SHORTEST_RUN else ids[start:end]
            start = end
    return result


def rounded(values: torch.Tensor) -> list[float]:
    """Seven digits: float32 has no more."""
    return [float(f"{value:.7g}") for value in values.tolist()]


if __name__ == "__main__":
    main()
