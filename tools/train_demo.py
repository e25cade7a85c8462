"""Trains, exports and evaluates the embedded demo model.

    python tools/train_demo.py --out ovfast/demo               trains (about two hours on two CPU
    cores) python tools/train_demo.py --evaluate [--backend B] ...    exact answers on held-out
    scenes, through ovfast itself

Training has two phases. First the tower alone learns dense labels (colour and kind of what covers
each patch), which is cheap and is what answers' loss alone learns slowest. Then the
projector learns to name each patch by the language model's own word embeddings, and projector and
language model learn answers over the frozen tower: several questions share one visual prefix in one
row, each seeing only the prefix and itself, so that each is trained as the first turn of a chat.
Matrices are optimised with Muon, the rest with AdamW; rates decay linearly with the time budget.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ovfast
from ovfast.anyres import VisualGeometry, VisualOptions, VisualPlan, plan_image, plan_video
from ovfast.image import build_video_views, build_views
from tools import demo_model, demo_scenes
from tools.demo_model import IMAGE_SIZE, PATCH, VISION, DemoModel
from tools.evaluate_demo import evaluate, print_table

SIDE = IMAGE_SIZE // PATCH
GEOMETRY = VisualGeometry(IMAGE_SIZE, PATCH, tuple((h, w) for h, w in demo_model.GRIDS), 9)
COLOUR_IDS = {name: i + 1 for i, name in enumerate(demo_scenes.COLOURS)}
KIND_IDS = {name: i + 1 for i, name in enumerate([*demo_scenes.KINDS, *map(str, range(10))])}
IGNORE = -100
PRETRAIN_MIX = {"single": 0.25, "several": 0.1, "video": 0.1, "detail": 0.4, "near": 0.15}
SHORT_MIX = {"single": 15, "several": 6, "video": 9, "near": 3}
LONG_MIX = {"detail": 4}
MAKERS = {**demo_scenes.MAKERS, "near": partial(demo_scenes.detail, low=70, high=112)}
TRAINING_SEED = 1


@dataclass
class Encoded:
    """A sample in the model's terms: views, dense labels and the token rows of prefix and
    questions.
    """

    views: np.ndarray  # (views, S, S, 3) uint8
    labels: np.ndarray  # (views, SIDE², 2) int64: colour and kind of each patch
    prefix: list[int]  # ids; -1 stands for a visual row
    index: np.ndarray  # (visual rows, 4) into the sample's view tokens, -1 for the newline
    weight: np.ndarray  # (visual rows, 4)
    turns: list[
        tuple[list[int], list[int]]
    ]  # question ids with the assistant's header; answer ids with the stop


def layer_views(scene: demo_scenes.Scene, plan: VisualPlan) -> np.ndarray:
    """The object numbers under each view's pixels, (views, S, S): the pixels' path with nearest
    neighbour.
    """
    layer = Image.fromarray(scene.layer)
    if plan.kind == "square":
        side = max(layer.size)
        square = Image.new("L", (side, side))
        square.paste(layer, (plan.offset_hw[1], plan.offset_hw[0]))
        layer = square
    out = [np.asarray(layer.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST))]
    rows, cols = plan.grid_hw
    if rows:
        canvas = np.zeros((rows * IMAGE_SIZE, cols * IMAGE_SIZE), np.uint8)
        height, width = plan.resized_hw
        top, left = plan.offset_hw
        canvas[top : top + height, left : left + width] = layer.resize(
            (width, height), Image.Resampling.NEAREST
        )
        blocks = canvas.reshape(rows, IMAGE_SIZE, cols, IMAGE_SIZE).swapaxes(1, 2)
        out.extend(blocks.reshape(-1, IMAGE_SIZE, IMAGE_SIZE))
    return np.stack(out)


def dense_labels(scene: demo_scenes.Scene, layers: np.ndarray) -> np.ndarray:
    """Colour and kind of the object covering most of each patch; the kind is ignored where the view
    cuts the object.
    """
    labels = np.zeros((len(layers), SIDE * SIDE, 2), np.int64)
    best = np.full((len(layers), SIDE * SIDE), 0.12 * PATCH * PATCH)
    patches = (
        layers.reshape(-1, SIDE, PATCH, SIDE, PATCH)
        .swapaxes(2, 3)
        .reshape(len(layers), SIDE * SIDE, -1)
    )
    for number, thing in enumerate(scene.things, 1):
        cover = (patches == number).sum(-1)
        seen = cover.sum(1)
        complete = seen >= 0.75 * max(1, seen[1:].sum()) if len(layers) > 1 else seen >= 0
        complete[0] = not thing.kind.isdigit() or len(layers) == 1
        mine = cover > best
        best = np.maximum(best, cover)
        kinds = np.where(complete, KIND_IDS[thing.kind], IGNORE)[:, None].repeat(SIDE * SIDE, 1)
        labels[..., 0] = np.where(mine, COLOUR_IDS.get(thing.colour, 0), labels[..., 0])
        labels[..., 1] = np.where(mine, kinds, labels[..., 1])
    return labels


def visual_plans(sample: demo_scenes.Sample) -> list[VisualPlan]:
    sizes = [scene.image.shape[:2] for scene in sample.scenes]
    if sample.kind == "video":
        return [plan_video(len(sizes), sizes[0], GEOMETRY, VisualOptions())]
    return [plan_image(size, GEOMETRY, VisualOptions(), num_images=len(sizes)) for size in sizes]


class Encoder:
    """Turns samples into ids, views and labels exactly as ovfast lays a request out."""

    def __init__(self, tokenizer: object):
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]
        self.header = self.encode("<|im_start|>user\n")
        self.newline = self.encode("\n")
        names = [" nothing", *(f" {c}" for c in COLOUR_IDS), " nothing"]
        names += [kind if kind.isdigit() else f" {kind}" for kind in KIND_IDS]
        names += [" top", " bottom", " left", " right"]
        self.words = [self.encode(name)[-1] for name in names]

    def __call__(self, sample: demo_scenes.Sample) -> Encoded:
        plans = visual_plans(sample)
        if sample.kind == "video":
            views = [
                build_video_views(np.stack([scene.image for scene in sample.scenes]), plans[0])
            ]
            layers = [layer_views(scene, PLAIN)[:1] for scene in sample.scenes]
        else:
            views = [
                build_views(scene.image, plan)
                for scene, plan in zip(sample.scenes, plans, strict=True)
            ]
            layers = [
                layer_views(scene, plan) for scene, plan in zip(sample.scenes, plans, strict=True)
            ]
        labels = [
            dense_labels(scene, layer) for scene, layer in zip(sample.scenes, layers, strict=True)
        ]
        prefix, index, weight, base = list(self.header), [], [], 0
        for plan in plans:
            prefix += [-1] * plan.num_tokens + self.newline
            index.append(np.where(plan.table.index < 0, -1, plan.table.index + base))
            weight.append(plan.table.weight)
            base += plan.num_views * SIDE * SIDE
        turns = [
            (
                self.encode(f"{question}<|im_end|>\n<|im_start|>assistant\n"),
                self.encode(f"{answer}<|im_end|>"),
            )
            for question, answer in sample.questions
        ]
        return Encoded(
            np.concatenate(views),
            np.concatenate(labels),
            prefix,
            np.concatenate(index),
            np.concatenate(weight),
            turns,
        )


PLAIN = plan_image((IMAGE_SIZE, IMAGE_SIZE), GEOMETRY, VisualOptions(max_views=1), num_images=1)


def collate(samples: list[Encoded]) -> dict[str, Tensor]:
    """Pads rows of one prefix and its turns; a turn sees the prefix and itself and continues the
    prefix's positions.
    """
    length = max(len(s.prefix) + sum(len(q) + len(a) for q, a in s.turns) for s in samples)
    shape = (len(samples), length)
    ids, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
    importance = np.zeros(shape, np.float32)
    segment, positions = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    index, base = [], 0
    for row, sample in enumerate(samples):
        start = end = len(sample.prefix)
        ids[row, :end] = sample.prefix
        segment[row, :end], positions[row, :end] = 0, np.arange(end)
        for number, (question, answer) in enumerate(sample.turns, 1):
            size = len(question) + len(answer)
            ids[row, end : end + size] = question + answer
            targets[row, end + len(question) - 1 : end + size - 1] = answer
            # Between one vote a token and one an answer, or captions drown the short answers.
            importance[row, end + len(question) - 1 : end + size - 1] = len(answer) ** -0.5
            segment[row, end : end + size] = number
            positions[row, end : end + size] = np.arange(start, start + size)
            end += size
        index.append(np.where(sample.index < 0, -1, sample.index + base))
        base += len(sample.views) * SIDE * SIDE
    earlier = np.tril(np.ones((length, length), bool))
    mask = earlier & ((segment[:, None] == 0) | (segment[:, None] == segment[:, :, None]))
    arrays = {
        "views": np.concatenate([s.views for s in samples]),
        "labels": np.concatenate([s.labels for s in samples]),
        "ids": ids, "targets": targets, "importance": importance, "mask": mask[:, None],
        "positions": positions, "segment": segment,
        "index": np.concatenate(index), "weight": np.concatenate([s.weight for s in samples]),
    }  # fmt: skip
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Batches(IterableDataset):  # type: ignore[type-arg]
    """Endless batches; with ``num_views`` only views and labels, otherwise a short and a long group
    of rows.
    """

    def __init__(self, tokenizer_json: str, seed: int, num_views: int = 0):
        self.tokenizer_json, self.seed, self.num_views = tokenizer_json, seed, num_views

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        from tokenizers import Tokenizer

        torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        encode = Encoder(Tokenizer.from_str(self.tokenizer_json))
        while True:
            if self.num_views:
                yield [self.views_only(rng, encode)]
            else:
                yield self.rows(rng, encode)

    def rows(self, rng: np.random.Generator, encode: Encoder) -> list[dict[str, Tensor]]:
        parts = []
        words = torch.tensor(encode.words)
        for mix in (SHORT_MIX, LONG_MIX):
            names = [name for name, count in mix.items() for _ in range(count)]
            parts.append({**collate([encode(MAKERS[name](rng)) for name in names]), "words": words})
        total = sum(part["importance"].sum() for part in parts)
        for part in parts:
            part["importance"] /= total
        return parts

    def views_only(self, rng: np.random.Generator, encode: Encoder) -> dict[str, Tensor]:
        views, labels = [], []
        names, shares = list(PRETRAIN_MIX), list(PRETRAIN_MIX.values())
        while len(views) < self.num_views:
            sample = encode(MAKERS[names[rng.choice(len(names), p=shares)]](rng))
            busy = np.flatnonzero((sample.labels[..., 1] != 0).any(1))
            for i in rng.permutation(busy)[:3]:
                views.append(sample.views[i])
                labels.append(sample.labels[i])
        return {
            "views": torch.from_numpy(np.stack(views)),
            "labels": torch.from_numpy(np.stack(labels)),
            "words": torch.tensor(encode.words),
        }


def dense_loss(head: nn.Linear, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    colours, kinds = head(features).split((len(COLOUR_IDS) + 1, len(KIND_IDS) + 1), -1)
    loss = F.cross_entropy(colours.flatten(0, 1), labels[..., 0].flatten())
    loss = loss + F.cross_entropy(
        kinds.flatten(0, 1), labels[..., 1].flatten(), ignore_index=IGNORE
    )
    wanted = labels[..., 1] > 0
    return loss, (kinds.argmax(-1) == labels[..., 1])[wanted].float().mean()


def word_loss(model: DemoModel, features: Tensor, labels: Tensor, words: Tensor) -> Tensor:
    """Each projected token should name its colour, kind and place by the embeddings of these words.

    Then a question's words match visual tokens as they match text, which the language model learns
    at once; without it a question found its object no better than by chance after 1 200 steps. The
    tokens' size is held at that of embeddings: the tower's features are a hundred times larger, and
    what they tell would be lost in the norms.
    """
    rows = model.project(features).flatten(0, 1).float()
    embeddings = model.language_model.model.embed_tokens.weight
    vectors = F.rms_norm(embeddings[words], embeddings.shape[1:])
    logits = F.rms_norm(rows, embeddings.shape[1:]) @ vectors.T / 12
    colours, kinds, heights, sides = logits.split(
        (len(COLOUR_IDS) + 1, len(KIND_IDS) + 1, 2, 2), -1
    )
    patch = torch.arange(len(rows), device=rows.device) % (SIDE * SIDE)
    loss = F.cross_entropy(colours, labels[..., 0].flatten())
    loss = loss + F.cross_entropy(kinds, labels[..., 1].flatten(), ignore_index=IGNORE)
    loss = loss + 0.3 * F.cross_entropy(heights, patch // SIDE * 2 // SIDE)
    loss = loss + 0.3 * F.cross_entropy(sides, patch % SIDE * 2 // SIDE)
    size = rows.pow(2).mean(-1).log() - embeddings.detach().pow(2).mean().log()
    return loss + 0.1 * size.pow(2).mean()


def answer_logits(
    model: DemoModel, batch: dict[str, Tensor], features: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits and targets of all answer tokens."""
    rows = model.project(features).flatten(0, 1)
    gathered = (rows[batch["index"].clamp(min=0)] * batch["weight"][..., None]).sum(1)
    rows = torch.where(batch["index"][:, :1] < 0, model.image_newline, gathered)
    embed = model.language_model.model.embed_tokens
    x = embed(batch["ids"].clamp(min=0))
    x = x.masked_scatter((batch["ids"] < 0)[..., None], rows.to(x.dtype))
    mask = batch["mask"] | torch.eye(
        x.shape[1], dtype=torch.bool, device=x.device
    )  # padding sees itself
    hidden = model.language_model(x, mask, batch["positions"])
    wanted = batch["targets"] != IGNORE
    return hidden[wanted] @ embed.weight.T, batch["targets"][wanted]


def optimisers(modules: list[nn.Module]) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for the rest.

    Queries and keys are AdamW's: under Muon their scores grew to a deviation of 15, attention
    became hard within 200 steps, and what it did not look at by then it never found.
    """
    named = [item for module in modules for item in module.named_parameters()]
    slow = ("embed", "q_proj", "k_proj")
    wide = {
        id(p)
        for n, p in named
        if p.dim() == 2 and min(p.shape) > 32 and not any(part in n for part in slow)
    }
    matrices = [p for _, p in named if id(p) in wide]
    others = [p for _, p in named if id(p) not in wide]
    return [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def batch_loss(
    phase: str, modules: tuple[DemoModel, nn.Linear], batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a phase; projector and answers learn over a frozen tower."""
    model, head = modules
    if phase == "tower":
        dense, right = dense_loss(head, model.tower(batch["views"]), batch["labels"])
        return dense, {"dense": dense.item(), "kind": right.item()}
    with torch.no_grad():
        features = model.tower(batch["views"])
    words = word_loss(model, features, batch["labels"], batch["words"])
    if phase == "projector":
        return words, {"words": words.item()}
    logits, targets = answer_logits(model, batch, features)
    weights = batch["importance"][batch["targets"] != IGNORE]
    answer = (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()
    right = (logits.argmax(-1) == targets).float().mean().item()
    shown = {"answer": answer.item() / weights.sum().item(), "token": right, "words": words.item()}
    return answer + 0.5 * words, shown


def run_phase(
    modules: tuple[DemoModel, nn.Linear],
    batches: Batches,
    minutes: float,
    *,
    device: torch.device,
    bfloat16: bool,
    rate: float,
    save: Path,
) -> None:
    """Optimises until the minutes are over, the rates falling linearly to 2 % of their start.

    The name of ``save`` is the phase: "tower", "projector" or "answers".
    """
    model, head = modules
    learners = {
        "tower": [model.tower, head],
        "projector": [model.multi_modal_projector],
        "answers": model.language_parts(),
    }
    opts = optimisers(learners[save.stem])
    groups = [(group, rate * group["lr"]) for opt in opts for group in opt.param_groups]
    parameters = [p for group, _ in groups for p in group["params"]]
    loader = DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=3)
    sums: dict[str, float] = {}
    begin = time.monotonic()
    for step, parts in enumerate(loader, 1):
        done = (time.monotonic() - begin) / (60 * minutes)
        if done >= 1:
            break
        for group, start in groups:
            group["lr"] = start * min(1.0, step / 40) * max(0.02, min(1.0, 1.4 * (1 - done)))
        for part in parts:
            batch = {key: value.to(device) for key, value in part.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss, shown = batch_loss(save.stem, modules, batch)
            loss.backward()
            for key, value in shown.items():
                sums[key] = sums.get(key, 0.0) + value / len(parts)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 100 == 0:
            line = " ".join(f"{key} {value / 100:.3f}" for key, value in sums.items())
            print(f"{save.stem} {step} {time.monotonic() - begin:.0f}s {line}", flush=True)
            sums.clear()
            torch.save({"model": model.state_dict(), "head": head.state_dict()}, save)
    torch.save({"model": model.state_dict(), "head": head.state_dict()}, save)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(TRAINING_SEED)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = demo_model.train_tokenizer(demo_scenes.corpus(np.random.default_rng(0), 500))
    print(
        "longest word pieces:",
        tokenizer.encode("What does the third image show? A purple triangle.").tokens,
    )
    model = DemoModel().to(device)
    head = nn.Linear(VISION["hidden_size"], len(COLOUR_IDS) + len(KIND_IDS) + 2).to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    if args.resume:
        resume(model, head, Path(args.resume))
    text, seed = tokenizer.to_str(), TRAINING_SEED + args.seed
    options = {"device": device, "bfloat16": args.bfloat16, "rate": args.rate}
    if args.pretrain_minutes > 0:
        views = Batches(text, seed + 100, num_views=256)
        run_phase((model, head), views, args.pretrain_minutes, save=work / "tower.pt", **options)
    if args.project_minutes > 0:
        views = Batches(text, seed + 150, num_views=256)
        run_phase((model, head), views, args.project_minutes, save=work / "projector.pt", **options)
    if args.minutes > 0:
        rows = Batches(text, seed + 200)
        run_phase((model, head), rows, args.minutes, save=work / "answers.pt", **options)
    demo_model.export(model, tokenizer, Path(args.out))


def resume(model: DemoModel, head: nn.Linear, path: Path) -> None:
    """Loads a training state, or an exported checkpoint directory, which holds no dense head."""
    if path.is_dir():
        model.load_state_dict(load_file(path / "model.safetensors"))
        return
    state = torch.load(path, map_location="cpu")
    model.load_state_dict(state["model"])
    head.load_state_dict(state["head"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="build/demo", help="where the checkpoint goes")
    parser.add_argument("--work", default="build/demo-work", help="where training states go")
    parser.add_argument("--pretrain-minutes", type=float, default=25)
    parser.add_argument("--project-minutes", type=float, default=2)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="bfloat16 products, where the device is fast at them",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1.0, help="a factor on the learning rates")
    parser.add_argument("--resume", help="a training state or a checkpoint directory to start from")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate --model")
    parser.add_argument("--model", default="demo", help="the checkpoint to evaluate")
    parser.add_argument(
        "--count", type=int, default=400, help="held-out samples of each kind to evaluate"
    )
    parser.add_argument("--backend", default="auto", help="of the evaluation")
    parser.add_argument("--quantization", help="of the evaluation")
    args = parser.parse_args()
    if args.evaluate:
        run_evaluation(args)
    else:
        train(args)


def run_evaluation(args: argparse.Namespace) -> None:
    options = {"device": args.device, "backend": args.backend, "quantization": args.quantization}
    with ovfast.load(args.model, threads=args.threads, **options) as engine:
        print_table(evaluate(engine, args.count), details=True)


if __name__ == "__main__":
    main()
