"""An engine over a slice of the 0.5B model: real widths, few layers, random weights in memory.

What the calibration times: it behaves as the full model does layer by layer, and takes a second
to build. Weights and vocabulary are many enough not to stay in a cache.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ovfast.anyres import VisualOptions
from ovfast.checkpoint import resolve_checkpoint
from ovfast.config import ModelConfig, TextConfig, VisionConfig
from ovfast.cuda_graphs import DEFAULT_GRAPH_BYTES, CudaCapture, GraphCache
from ovfast.engine import Engine
from ovfast.media import MediaLimits
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.ops import make_ops
from ovfast.processor import Processor
from ovfast.storage import DTYPES
from ovfast.tensor_names import expected_tensors

__all__ = ["TEXT", "VISION", "open_slice", "slice_config"]

VISION = VisionConfig(1152, 4304, 2, 16, 384, 14, 1e-6)
MAX_POSITIONS = 2048
TEXT = TextConfig(
    hidden_size=896,
    intermediate_size=4864,
    num_layers=3,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=80_000,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=MAX_POSITIONS,
    tie_word_embeddings=True,
)
SCALE = 0.02  # keeps activations near 1


def slice_config() -> ModelConfig:
    """The slice: the demo model's configuration but for its sizes."""
    side = VISION.image_size
    return replace(
        ModelConfig.from_checkpoint(resolve_checkpoint("demo")),
        vision=VISION,
        text=TEXT,
        grid_pinpoints_hw=((side, side), (side, 2 * side), (2 * side, side)),
    )


class RandomWeights:
    """A source of tensors of the right shapes; those of one shape have the same values.

    Args:
        config: of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        expected = expected_tensors(config, config.text.vocab_size, tied=True)
        self._shapes = {name: entry.shape for name, entry in expected.items()}
        self._made: dict[tuple[int, ...], Tensor] = {}

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._shapes)

    def take(self, name: str, *, dtype: torch.dtype | None, device: torch.device) -> Tensor:
        """A copy of its own: layers must not share memory, or caches would flatter them."""
        shape = self._shapes[name]
        if shape not in self._made:
            generator = torch.Generator().manual_seed(len(self._made))
            self._made[shape] = torch.randn(shape, generator=generator) * SCALE
        made = self._made[shape]
        return made.to(device=device, dtype=dtype or made.dtype, copy=True)

    def take_packed(self, name: str) -> None:
        """There is nothing packed."""


def open_slice(
    device: torch.device, backend: str, storage: str, threads: int | None, attention: str = "auto"
) -> Engine:
    """An engine over the slice.

    Args:
        device: of the engine.
        backend: as for `ovfast.load`.
        storage: of the weights.
        threads: of the native back end.
        attention: as for `ovfast.load`.

    Returns:
        An Engine with the demo's tokenizer; close it.
    """
    config = slice_config()
    quantization = "fp8" if storage == "fp8" else ""
    kept = "bfloat16" if quantization else storage  # of all that float8 leaves alone
    ops = make_ops(
        device, backend, attention, threads=threads, storage=kept, quantization=quantization
    )
    dtype = torch.float32 if ops.storage else DTYPES[kept]
    has_graphs = device.type == "cuda" and ops.backend == "triton"
    graphs = GraphCache(CudaCapture(device), DEFAULT_GRAPH_BYTES) if has_graphs else None
    model = LlavaOnevision(config, RandomWeights(config), ops, dtype, device, graphs)
    return Engine(
        model,
        Processor(resolve_checkpoint("demo"), config),
        ops,
        max_seq_len=MAX_POSITIONS,
        max_batch_size=1,
        visual=VisualOptions(),
        media_limits=MediaLimits(),
        graphs=graphs,
    )
