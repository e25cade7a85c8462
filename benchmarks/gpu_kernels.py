"""Each kernel of the vision half at the shapes of the model, the device alone, against torch.

A peer does what the kernel does, as plain torch would: "cublas" is a product by it and what
follows the product. The tiles of fused_linear race each other, for its table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_bench import Bench, random_pixels
from benchmarks.gpu_vision import FRAME_HW, NUM_FRAMES, PICTURES_HW, VIEWS, normalise
from ovfast.kernels import attention, fused_linear, layer_norm, patch_embed, place
from ovfast.models.visual_rows import row_table
from ovfast.ops import RowTable
from ovfast.pixels import view_pixels
from ovfast.resize_table import resize_table

Works = dict[str, Callable[[], Any]]


@torch.inference_mode()
def kernels(bench: Bench) -> None:
    """All of them; fused_linear at every shape by its shipped tile."""
    for num_views in VIEWS:
        what = f"{num_views} views"
        bench.each(f"layer_norm, {what}", _race_layer_norm, num_views)
        bench.each(f"view_attention, {what}", _race_attention, num_views)
        bench.each(f"patch_embed, {what}", _race_patch_embed, num_views)
        bench.each(f"fused_linear, {what}", _race_products, num_views)
    for size_hw in PICTURES_HW:
        what = f"{size_hw[1]}x{size_hw[0]}"
        bench.each(f"resample, {what}", _race_resize, size_hw)
        bench.each(f"projector, {what}", _race_projector, random_pixels(*size_hw), what)
    clip, what = random_pixels(NUM_FRAMES, *FRAME_HW), f"{NUM_FRAMES} frames"
    bench.each(f"projector, {what}", _race_projector, clip, what)


@torch.inference_mode()
def tiles(bench: Bench) -> None:
    """Every tile at every shape, and whether it gives the same bits as the shipped one."""
    for num_views in VIEWS:
        for product in _products(bench, num_views):
            bench.each(f"tiles of {product.name}", _race_tiles, product)


def _race_tiles(bench: Bench, product: _Product) -> None:
    candidates = [tile for tile, _ in fused_linear._HALF_TILES]
    expected = product.ours()
    equal = all(torch.equal(product.ours(tile), expected) for tile in candidates)
    bench.records.write(
        "ovfast",
        "same_bits",
        "%",
        suite="accuracy",
        workload=f"tiles of {product.name}",
        samples=(100.0 * equal,),
        parameters={"model": bench.name},
    )
    works = product.works()
    for tile in candidates:
        works[f"{tile.block_m}x{tile.block_n}"] = partial(product.ours, tile)
    _race(bench, f"tiles of {product.name}", works, flop=product.flop)


def _race(bench: Bench, name: str, works: Works, flop: float = 0.0, num_bytes: float = 0.0) -> None:
    samples = bench.time_device(name, works)
    bench.race("kernels", name, samples, flop=flop, num_bytes=num_bytes)


def _race_layer_norm(bench: Bench, num_views: int) -> None:
    vision = bench.config.vision
    width = vision.hidden_size
    x = bench.random(num_views * vision.tokens_per_view, width)
    gain, shift = bench.random(width), bench.random(width)
    works: Works = {
        "ovfast": lambda: layer_norm.layer_norm(x, gain, shift, 1e-6),
        "torch": lambda: F.layer_norm(x, (width,), gain, shift, 1e-6),
    }
    _race(bench, f"layer_norm, {num_views} views", works, num_bytes=2.0 * x.nbytes)


def _race_attention(bench: Bench, num_views: int) -> None:
    vision = bench.config.vision
    heads, tokens, width = vision.num_heads, vision.tokens_per_view, vision.hidden_size
    qkv = bench.random(num_views * tokens, 3 * width)
    q, k, v = qkv.view(num_views, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    works: Works = {
        "ovfast": lambda: attention.attention(qkv, num_heads=heads, tokens_per_view=tokens),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    flop = 4.0 * num_views * tokens**2 * width
    _race(bench, f"view_attention, {num_views} views", works, flop=flop)


def _race_patch_embed(bench: Bench, num_views: int) -> None:
    """Against torch's convolution of pixels that are normalised before."""
    vision, tower = bench.config.vision, bench.model.vision_tower
    side, patch, width = vision.image_size, vision.patch_size, vision.hidden_size
    views = random_pixels(num_views, side, side)
    pixels, normalised = view_pixels(views, bench.device), normalise(views, bench)
    out = bench.random(num_views * vision.tokens_per_view, width)
    kernel = bench.random(width, 3, patch, patch, scale=vision.patch_dim**-0.5)
    bias, positions = bench.random(width), bench.random(vision.tokens_per_view, width)

    def ours() -> Tensor:
        return patch_embed.patch_embed(
            pixels.buffer,
            pixels.windows,
            tower._patch_weight,
            tower._patch_offset,
            out,
            patch_size=patch,
            image_size=side,
        )

    def upstream() -> Tensor:
        made = F.conv2d(normalised, kernel, bias, stride=patch)
        return made.flatten(2).transpose(1, 2) + positions

    flop = 2.0 * len(out) * vision.patch_dim * width
    num_bytes = float(views.nbytes + out.nbytes)
    name = f"patch_embed, {num_views} views"
    _race(bench, name, {"ovfast": ours, "torch": upstream}, flop=flop, num_bytes=num_bytes)


def _race_products(bench: Bench, num_views: int) -> None:
    for product in _products(bench, num_views):
        _race(bench, product.name, product.works(), flop=product.flop)


class _Product(NamedTuple):
    """One of the tower's four products with its neighbours."""

    name: str
    x: Tensor
    weight: Tensor
    bias: Tensor
    activation: Any
    residual: Tensor | None

    @property
    def flop(self) -> float:
        return 2.0 * len(self.x) * self.weight.numel()

    def ours(self, tile: Any = None) -> Tensor:
        return fused_linear.fused_linear(
            self.x,
            self.weight,
            self.bias,
            activation=self.activation,
            residual=self.residual,
            tile=tile,
        )

    def upstream(self) -> Tensor:
        out = F.linear(self.x, self.weight, self.bias)
        if self.activation is not None:
            out = F.gelu(out, approximate="tanh")
        return out if self.residual is None else out + self.residual

    def works(self) -> Works:
        return {"ovfast": self.ours, "cublas": self.upstream}


def _products(bench: Bench, num_views: int) -> list[_Product]:
    vision = bench.config.vision
    width, wide = vision.hidden_size, vision.intermediate_size
    rows = num_views * vision.tokens_per_view
    shapes = (
        ("qkv", 3 * width, width, None, False),
        ("out", width, width, None, True),
        ("fc1", wide, width, "gelu_tanh", False),
        ("fc2", width, wide, None, True),
    )
    return [
        _Product(
            f"fused_linear {name}, {num_views} views",
            bench.random(rows, k),
            bench.random(n, k, scale=k**-0.5),
            bench.random(n),
            activation,
            bench.random(rows, n) if has_residual else None,
        )
        for name, n, k, activation, has_residual in shapes
    ]


def _race_resize(bench: Bench, size_hw: tuple[int, int]) -> None:
    """Each pass of a picture to one view, columns first; both of them against torch's resize."""
    side, (height, width) = bench.config.vision.image_size, size_hw
    source = torch.from_numpy(random_pixels(height, width)).to(bench.device)
    narrow = torch.empty((height, side, 3), dtype=torch.uint8, device=bench.device)
    out = torch.empty((side, side, 3), dtype=torch.uint8, device=bench.device)
    columns, rows = _tables(bench, width), _tables(bench, height)
    floats = source.permute(2, 0, 1)[None].float()

    def first() -> Tensor:
        return bench.ops.resample(source, *columns, 1, narrow)

    def second() -> Tensor:
        return bench.ops.resample(narrow, *rows, 0, out)

    def upstream() -> Tensor:
        return F.interpolate(floats, (side, side), mode="bicubic", antialias=True)

    def both() -> None:
        first()
        second()

    name = f"resample {width}x{height}"
    total = source.nbytes + 2.0 * narrow.nbytes + out.nbytes
    _race(bench, f"{name}, both", {"ovfast": both, "torch": upstream}, num_bytes=total)
    moved = float(source.nbytes + narrow.nbytes)
    _race(bench, f"{name}, columns", {"ovfast": first}, num_bytes=moved)
    _race(bench, f"{name}, rows", {"ovfast": second}, num_bytes=float(narrow.nbytes + out.nbytes))


def _tables(bench: Bench, size_in: int) -> tuple[Tensor, Tensor]:
    table = resize_table(size_in, bench.config.vision.image_size)
    first, coefficients = torch.from_numpy(table.first), torch.from_numpy(table.coefficients)
    return first.to(bench.device), coefficients.to(bench.device)


def _race_projector(bench: Bench, pixels: Any, what: str) -> None:
    """fc1 over the rows in use, then what `_race_place` times, of one picture or clip."""
    vision, width = bench.config.vision, bench.config.text.hidden_size
    plan = bench.plan(pixels)
    table = _device_table(bench, plan)
    features = bench.random(plan.num_views * vision.tokens_per_view, vision.hidden_size)
    weight = bench.random(width, vision.hidden_size, scale=vision.hidden_size**-0.5)
    bias, rows = bench.random(width), table.source_rows
    works: Works = {
        "ovfast": lambda: fused_linear.fused_linear(
            features, weight, bias, activation="gelu_erf", rows=rows
        ),
        "cublas": lambda: F.gelu(F.linear(features[rows], weight, bias)),
    }
    flop = 2.0 * len(rows) * weight.numel()
    _race(bench, f"fused_linear projector, {what}", works, flop=flop)
    _race_place(bench, table, what)


def _race_place(bench: Bench, table: RowTable, what: str) -> None:
    """Pooling where there is any, and fc2 with its placement."""
    num_rows, width = len(table.index), bench.config.text.hidden_size
    hidden, out = bench.random(len(table.source_rows), width), bench.random(num_rows, width)
    weight, bias = bench.random(width, width, scale=width**-0.5), bench.random(width)
    newline, words = bench.random(width), bench.random(8, width)
    ids = torch.zeros(num_rows, dtype=torch.int32, device=bench.device)
    index, is_newline = table.index.clamp(min=0), table.index[:, :1] < 0

    def mix() -> Tensor:
        if not table.has_pooled:
            return hidden[index[:, 0]]
        return (hidden[index] * table.weight[..., None]).sum(1).to(bench.dtype)

    if table.has_pooled:
        pooled = torch.empty_like(out)
        works: Works = {
            "ovfast": lambda: place.pool_rows(hidden, table.index, table.weight, pooled),
            "torch": mix,
        }
        _race(bench, f"pool_rows, {what}", works, num_bytes=float(hidden.nbytes + out.nbytes))
    works = {
        "ovfast": lambda: place.project_and_place(
            hidden, table.index, table.weight, weight, bias, newline, ids, words, out,
            has_pooled=table.has_pooled,
        ),
        "cublas": lambda: torch.where(is_newline, newline, F.linear(mix(), weight, bias)),
    }  # fmt: skip
    _race(bench, f"project_and_place, {what}", works, flop=2.0 * num_rows * weight.numel())


def _device_table(bench: Bench, plan: Any) -> RowTable:
    table = row_table(plan.num_tokens, ((0, 0, plan.table),))
    arrays = (torch.from_numpy(a) for a in (table.source_rows, table.index, table.weight))
    return RowTable(*(array.to(bench.device) for array in arrays), has_pooled=table.has_pooled)
