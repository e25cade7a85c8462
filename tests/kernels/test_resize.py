"""Triton resample against Pillow, byte for byte: two passes, alone and with padding by address."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from ovfast import image
from ovfast.resize_table import resize_table, vertical_first
from tests.support.devices import kernel_params

resize = pytest.importorskip("ovfast.kernels.resize", reason="needs triton")

# There is one dtype: the devices alone.
DEVICES = [
    pytest.param(param.values[0], marks=param.marks, id=param.values[0])
    for param in kernel_params()
    if param.values[1] == torch.float32
]
CUDA = [param for param in DEVICES if param.values[0] == "cuda"]


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (height, width, 3), np.uint8))


def one_pass(
    source: torch.Tensor,
    size_in: int,
    size_out: int,
    axis: int,
    *,
    offset: int = 0,
    fill: int = 0,
    block: int | None = None,
) -> torch.Tensor:
    table = resize_table(size_in, size_out)
    first, coefficients = (
        torch.from_numpy(values).to(source.device) for values in (table.first, table.coefficients)
    )
    shape = list(source.shape)
    shape[axis - 3] = size_out
    out = torch.full(shape, 99, dtype=torch.uint8, device=source.device)
    options = {"offset": offset, "fill": fill, "block": block}
    assert resize.resample(source, first, coefficients, axis, out, **options) is out
    return out


def tile(device: str) -> int | None:
    """The shipped tile on a device, few large programs under the interpreter."""
    return 1024 if device == "cpu" else None


def resized(source: torch.Tensor, size_hw: tuple[int, int], block: int | None) -> torch.Tensor:
    """Of a picture, or of frames: all by the same passes."""
    source_hw = source.shape[-3], source.shape[-2]
    for axis in (0, 1) if vertical_first(source_hw, size_hw) else (1, 0):
        if source_hw[axis] != size_hw[axis]:
            source = one_pass(source, source_hw[axis], size_hw[axis], axis, block=block)
    return source


def squared(source: torch.Tensor, side: int, fill: int, block: int | None) -> torch.Tensor:
    """Pads to a square by address and resizes it: Pillow resizes a square horizontally first."""
    height, width = source.shape[:2]
    longest = max(height, width)
    offset_hw = ((longest - height) // 2, (longest - width) // 2)
    for axis in (1, 0):
        where = {"offset": offset_hw[axis], "fill": fill}
        source = one_pass(source, longest, side, axis, **where, block=block)
    return source


def pillow(source: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    picture = Image.fromarray(source.cpu().numpy())
    resampled = picture.resize(size_hw[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(resampled).copy())


def check(device: str, source_hw: tuple[int, int], size_hw: tuple[int, int]) -> None:
    source = picture(*source_hw, seed=sum(source_hw)).to(device)
    out = resized(source, size_hw, tile(device))
    assert torch.equal(out.cpu(), pillow(source, size_hw)), f"{source_hw} to {size_hw}"


# Shrinks by up to 4 and grows by up to 8: every tap costs the interpreter a millisecond.
@pytest.mark.parametrize("device", DEVICES)
def test_random_shapes(device: str) -> None:
    rng = random.Random(5)
    for _ in range(300):
        height, width = (int(2 ** rng.uniform(0, 5.5)) for _ in range(2))
        size_hw = tuple(max(1, int(n * 2 ** rng.uniform(-2, 3))) for n in (height, width))
        check(device, (height, width), size_hw)


# One row, one column, one pixel each way, a shrink by 50 and more, a side that stays.
@pytest.mark.parametrize(
    ("source_hw", "size_hw"),
    [
        ((1, 1), (70, 90)),
        ((1, 200), (40, 3)),
        ((200, 1), (3, 40)),
        ((90, 70), (1, 1)),
        ((300, 4), (6, 5)),
        ((4, 300), (5, 6)),
        ((31, 17), (31, 40)),
        ((31, 17), (9, 17)),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_extreme_shapes(device: str, source_hw: tuple[int, int], size_hw: tuple[int, int]) -> None:
    check(device, source_hw, size_hw)


# The tile that ships: several programs each way, the last of each partly masked.
@pytest.mark.parametrize("device", DEVICES)
def test_shipped_tile(device: str) -> None:
    source = picture(21, 190, seed=6).to(device)
    for size_hw in ((21, 100), (7, 190), (9, 11)):
        assert torch.equal(resized(source, size_hw, None).cpu(), pillow(source, size_hw))


# One row, one column, one pixel, sides that stay, a shrink by 30: taps must not leave their frame.
@pytest.mark.parametrize("num_frames", [1, 2, 5, 32])
@pytest.mark.parametrize("device", DEVICES)
def test_frames(device: str, num_frames: int) -> None:
    shapes = [((13, 17), (7, 9)), ((7, 9), (13, 21)), ((1, 41), (5, 3)), ((41, 1), (3, 5))]
    shapes += [((1, 1), (3, 4)), ((11, 5), (11, 9)), ((5, 11), (9, 11)), ((91, 2), (3, 7))]
    for source_hw, size_hw in shapes:
        clip = torch.stack([picture(*source_hw, seed=frame) for frame in range(num_frames)])
        expected = torch.stack([pillow(frame, size_hw) for frame in clip])
        out = resized(clip.to(device), size_hw, tile(device))
        assert torch.equal(out.cpu(), expected), f"{source_hw} to {size_hw}"


# Several programs, some over the end of a frame, and rows that are words or not.
@pytest.mark.parametrize("block", [8, None])
@pytest.mark.parametrize("device", DEVICES)
def test_frames_by_tiles(device: str, block: int | None) -> None:
    for width in (16, 19):
        clip = torch.stack([picture(11, 45, seed=frame) for frame in range(3)])
        expected = torch.stack([pillow(frame, (5, width)) for frame in clip])
        assert torch.equal(resized(clip.to(device), (5, width), block).cpu(), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("height", [1, 6])
@pytest.mark.parametrize("device", DEVICES)
def test_frames_of_wider_pictures(device: str, height: int, axis: int) -> None:
    """Windows of columns, also where a frame is one row: whatever lies beside them is not read."""
    clip = torch.stack([picture(height, 7, seed=frame) for frame in range(3)]).to(device)
    expected = one_pass(clip, clip.shape[axis + 1], 4, axis, block=tile(device))
    wide = torch.full((3, height, 12, 3), 255, dtype=torch.uint8, device=device)
    wide[:, :, 2:9] = clip
    assert torch.equal(one_pass(wide[:, :, 2:9], height if axis == 0 else 7, 4, axis), expected)


@pytest.mark.parametrize("fill", [0, 127, 255])
@pytest.mark.parametrize("device", DEVICES)
def test_square_padding(device: str, fill: int) -> None:
    rng = random.Random(fill)
    # 56 on the longer side: the square keeps its size and is only padded.
    shapes = [(56, 20), (20, 56), (30, 30), (1, 90), (90, 1)]
    shapes += [(rng.randint(1, 120), rng.randint(1, 120)) for _ in range(10)]
    for height, width in shapes:
        source = picture(height, width, seed=height).to(device)
        longest = max(height, width)
        square = np.full((longest, longest, 3), fill, np.uint8)
        top, left = (longest - height) // 2, (longest - width) // 2
        square[top : top + height, left : left + width] = source.cpu().numpy()
        expected = pillow(torch.from_numpy(square), (56, 56))
        out = squared(source, 56, fill, tile(device)).cpu()
        assert torch.equal(out, expected), f"{height} × {width}"


# The paths of the host, whose bytes the device must repeat; too much for the interpreter.
@pytest.mark.parametrize(
    "source_hw", [(1080, 1920), (1920, 1080), (3000, 417), (100, 5000), (384, 384), (401, 377)]
)
@pytest.mark.parametrize("device", CUDA)
def test_real_pictures(device: str, source_hw: tuple[int, int]) -> None:
    source = picture(*source_hw, seed=7).to(device)
    on_host = source.cpu().numpy()
    for size_hw in ((384, 384), (1152, 768)):
        expected = torch.from_numpy(image.resize(on_host, size_hw).copy())
        assert torch.equal(resized(source, size_hw, None).cpu(), expected)
    longest = max(source_hw)
    offset_hw = ((longest - source_hw[0]) // 2, (longest - source_hw[1]) // 2)
    expected = torch.from_numpy(image._resize_square(on_host, 384, offset_hw, 127).copy())
    assert torch.equal(squared(source, 384, 127, None).cpu(), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("device", DEVICES)
def test_only_the_source_is_read(device: str, axis: int) -> None:
    """A window of a larger picture, whatever lies around it, into a window of a larger out."""
    window = picture(13, 11, seed=8).to(device)
    table = resize_table(20, 9)  # the source is 13 or 11 of 20 positions: taps fall outside
    first, coefficients = (
        torch.from_numpy(values).to(device) for values in (table.first, table.coefficients)
    )
    shape = (9, 11, 3) if axis == 0 else (13, 9, 3)
    outs = []
    for around in (0, 255):
        large = torch.full((19, 18, 3), around, dtype=torch.uint8, device=device)
        large[4:17, 3:14] = window
        large_out = torch.full((17, 15, 3), 7, dtype=torch.uint8, device=device)
        out = large_out[2 : 2 + shape[0], 1 : 1 + shape[1]]
        options = {"offset": 4, "fill": 127, "block": tile(device)}
        resize.resample(large[4:17, 3:14], first, coefficients, axis, out, **options)
        outs.append(out.clone())
        out.fill_(7)
        assert bool((large_out == 7).all())
    assert torch.equal(outs[0], outs[1])
    padded = torch.full((20, 11, 3) if axis == 0 else (13, 20, 3), 127, dtype=torch.uint8)
    padded.narrow(axis, 4, window.shape[axis])[:] = window.cpu()
    expected = one_pass(padded.to(device), 20, 9, axis, block=tile(device))
    assert torch.equal(outs[0], expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("device", DEVICES)
def test_positions_outside_are_fill(device: str, axis: int) -> None:
    source = torch.full((5, 5, 3), 200, dtype=torch.uint8, device=device)
    one = torch.tensor([[1 << 22]] * 4, dtype=torch.int32, device=device)
    first = torch.tensor([-1, 0, 4, 5], dtype=torch.int32, device=device)
    out = torch.empty((4, 5, 3) if axis == 0 else (5, 4, 3), dtype=torch.uint8, device=device)
    resize.resample(source, first, one, axis, out, fill=9)
    assert out.select(1 - axis, 2)[:, 0].tolist() == [9, 200, 200, 9]


# Weights of 2 and -1: above 255 and below 0 before the clip.
@pytest.mark.parametrize("device", DEVICES)
def test_results_are_clipped(device: str) -> None:
    source = torch.tensor([0, 100, 255], dtype=torch.uint8, device=device)
    source = source[:, None, None].expand(3, 2, 3).contiguous()
    first = torch.tensor([0, 1, 0], dtype=torch.int32, device=device)
    weights = [[2 << 22, -1 << 22], [-1 << 22, 2 << 22], [1 << 21, 1 << 21]]
    coefficients = torch.tensor(weights, dtype=torch.int32, device=device)
    out = torch.empty_like(source)
    resize.resample(source, first, coefficients, 0, out)
    assert out[:, 1, 2].tolist() == [0, 255, 50]


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3)])
@pytest.mark.parametrize("device", DEVICES)
def test_empty_out(device: str, shape: tuple[int, int, int]) -> None:
    empty = torch.empty(shape, dtype=torch.uint8, device=device)
    first = torch.zeros(4, dtype=torch.int32, device=device)
    coefficients = torch.zeros(4, 3, dtype=torch.int32, device=device)
    axis = 1 if shape[0] == 0 else 0
    assert resize.resample(empty, first, coefficients, axis, empty).shape == shape


# A source without rows is all fill.
@pytest.mark.parametrize("device", DEVICES)
def test_empty_source(device: str) -> None:
    source = torch.empty(0, 5, 3, dtype=torch.uint8, device=device)
    out = one_pass(source, 8, 4, 0, fill=127, block=tile(device))
    assert bool((out == 127).all())


def u8(*shape: int, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8, device=device)


BAD_ARGUMENTS = {
    "source-float": (0, torch.zeros(6, 5, 3), TypeError, "source is"),
    "source-2d": (0, u8(6, 15), ValueError, "source has shape"),
    "source-5d": (0, u8(1, 2, 6, 5, 3), ValueError, "source has shape"),
    "source-frames": (0, u8(2, 6, 5, 3), ValueError, r"expected \(2, 4, 5, 3\)"),
    "source-4-channels": (0, u8(6, 5, 4), ValueError, "source has shape"),
    "source-planes": (0, u8(3, 6, 5).permute(1, 2, 0), ValueError, "source has strides"),
    "source-4-byte-pixels": (0, u8(6, 5, 4)[..., :3], ValueError, "source has strides"),
    "first-int64": (1, torch.zeros(4, dtype=torch.int64), TypeError, "first is"),
    "first-2d": (1, torch.zeros(4, 1, dtype=torch.int32), ValueError, "first has shape"),
    "first-strided": (1, torch.zeros(8, dtype=torch.int32)[::2], ValueError, "first has stride"),
    "coefficients-float": (2, torch.zeros(4, 3), TypeError, "coefficients is"),
    "coefficients-short": (
        2,
        torch.zeros(3, 3, dtype=torch.int32),
        ValueError,
        "coefficients has shape",
    ),
    "coefficients-meta": (
        2,
        torch.zeros(4, 3, dtype=torch.int32, device="meta"),
        ValueError,
        "coefficients is on meta",
    ),
    "axis-2": (3, 2, ValueError, "axis is 2"),
    "axis-other": (3, 1, ValueError, "out has shape"),
    "out-float": (4, torch.zeros(4, 5, 3), TypeError, "out is"),
    "out-rows": (4, u8(6, 5, 3), ValueError, "out has shape"),
    "out-planes": (4, u8(3, 4, 5).permute(1, 2, 0), ValueError, "out has strides"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    position, value, error, message = BAD_ARGUMENTS[name]
    arguments = [
        u8(6, 5, 3),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(4, 3, dtype=torch.int32),
        0,
        u8(4, 5, 3),
    ]
    arguments[position] = value
    with pytest.raises(error, match=message):
        resize.resample(*arguments)


@pytest.mark.parametrize("name", ["source", "out"])
def test_frames_lie_one_behind_another(name: str) -> None:
    tensors = {"source": u8(4, 6, 5, 3), "out": u8(4, 4, 5, 3)}
    tensors |= {other: tensor[:2] for other, tensor in tensors.items() if other != name}
    tensors[name] = tensors[name][::2]
    first, coefficients = torch.zeros(4, dtype=torch.int32), torch.zeros(4, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"{name} has .* strides .* expected the first to be"):
        resize.resample(tensors["source"], first, coefficients, 0, tensors["out"])


@pytest.mark.parametrize("fill", [-1, 256])
def test_fill_is_a_byte(fill: int) -> None:
    first = torch.zeros(4, dtype=torch.int32)
    coefficients = torch.zeros(4, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="fill is"):
        resize.resample(u8(6, 5, 3), first, coefficients, 0, u8(4, 5, 3), fill=fill)
