"""Pictures and videos that were encoded once and are kept for many questions.

`EncodedMedia` is what the caller holds: a key with sizes; the tensors hang on it until it is
released, dropped, or its engine closed. `EncodedStore` knows the handles of one engine and keeps
what they hold together below a ceiling. Encoding, and laying questions out over a handle, is
`engine_base`.

Releasing is one store, so it may happen in any thread, also inside a step of the engine.
"""

import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ovfast.anyres import VisualOptions
from ovfast.errors import CapacityError, OptionError
from ovfast.kv_cache import KVCache

__all__ = ["DEFAULT_ENCODED_BYTES", "KEEP", "EncodedMedia", "EncodedStore", "Held"]

KEEP = ("features", "prefix")
DEFAULT_ENCODED_BYTES = 2 << 30  # a 7B prefix of 7 300 tokens in bfloat16 is 0.47 GB


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What a handle keeps on the model's device.

    Attributes:
        features: (num_visual_tokens, hidden_size), rows of inputs_embeds of all pictures, then of
            all videos.
        prefix: one slot with the prompt's positions up to the last visual one; None without.
        sources: (positions of the prefix,) int64, as `ModelInputs.sources`.
    """

    features: Tensor
    prefix: KVCache | None
    sources: NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        return self.features.nbytes + (self.prefix.nbytes if self.prefix is not None else 0)


class EncodedMedia:
    """Pictures and videos encoded once, for many questions; made by `Engine.encode`.

    `release` it, or use it in a `with`: until then it keeps memory of the model's device. Any
    thread may use or release it.

    Attributes:
        keep: "features" or "prefix".
        visual: the options the media were laid out with.
        image_sizes_hw: (height, width) of each picture.
        video_sizes: (frames, (height, width)) of each video.
        num_visual_tokens: positions that the media fill in a prompt.
        num_prefix_tokens: positions whose keys and values are kept, the media's among them.
    """

    def __init__(
        self,
        keep: str,
        visual: VisualOptions,
        image_sizes_hw: tuple[tuple[int, int], ...],
        video_sizes: tuple[tuple[int, tuple[int, int]], ...],
        num_visual_tokens: int,
        num_prefix_tokens: int,
    ) -> None:
        self.keep, self.visual = keep, visual
        self.image_sizes_hw, self.video_sizes = image_sizes_hw, video_sizes
        self.num_visual_tokens = num_visual_tokens
        self.num_prefix_tokens = num_prefix_tokens
        self._held: Held | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds now; 0 once it is released."""
        held = self._held
        return 0 if held is None else held.nbytes

    @property
    def released(self) -> bool:
        """Whether nothing is held any more: released, or the engine closed."""
        return self._held is None

    def release(self) -> None:
        """Frees what it holds; questions that have not begun then raise OptionError. Repeatable."""
        self._held = None

    def held(self) -> Held:
        """What it holds.

        Raises:
            OptionError: it was released.
        """
        held = self._held
        if held is None:
            raise OptionError(
                "media= a handle that was released; expected one that is still held. Call"
                " engine.encode() again, or ask before its `with` ends."
            )
        return held

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        count = f"{len(self.image_sizes_hw)} pictures, {len(self.video_sizes)} videos"
        return f"EncodedMedia({count}, keep={self.keep!r}, nbytes={self.nbytes})"


class EncodedStore:
    """The handles of one engine.

    Args:
        max_bytes: what they may hold together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._handles: weakref.WeakSet[EncodedMedia] = weakref.WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes held by all handles."""
        return sum(handle.nbytes for handle in self._handles)

    def __contains__(self, handle: EncodedMedia) -> bool:
        return handle in self._handles

    def check_room(self, num_bytes: int) -> None:
        """Checks that so many bytes more may be held.

        Raises:
            CapacityError: they may not.
        """
        used = self.nbytes
        if used + num_bytes > self._max_bytes:
            raise CapacityError(
                f"encode() needs {num_bytes} bytes for these media, and {used} of"
                f" {self._max_bytes} are held by other handles. Release handles, use"
                " keep='features' or smaller media, or load with a larger encoded_memory_bytes."
            )

    def add(self, handle: EncodedMedia, held: Held) -> None:
        """Takes a handle in; under the engine's lock, as nobody else may iterate then."""
        self._handles.add(handle)
        handle._held = held

    def clear(self) -> None:
        """Releases all handles."""
        for handle in list(self._handles):
            handle.release()
