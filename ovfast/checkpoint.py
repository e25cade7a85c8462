"""Checkpoints on disk: where they are, which tensors they hold, and reading each of them once.

Owns the search for a checkpoint (directory, Hub id, "demo"), the safetensors files, and the check
that names and shapes are complete in both directions. Own names and fusions: tensor_names.py.

Tensors are read through a memory map straight into their final tensor. That is a real copy also
where nothing needs converting: a model that lived in the map would crash with SIGBUS when its file
is replaced or cut while the service runs. Each read maps its file anew, so that the peak of host
memory is the final weights and one tensor, not the weights twice.
"""

import logging
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ovfast.config import ModelConfig
from ovfast.errors import CheckpointError, OptionError
from ovfast.tensor_names import (
    EMBEDDING,
    LM_HEAD,
    expected_tensors,
    is_unused,
)
from ovfast.weight_files import StoredTensor, listing, problem_list, read_headers, read_tensor

__all__ = [
    "CheckpointWeights",
    "Progress",
    "check_vocab",
    "resolve_checkpoint",
    "terminal_progress",
]

Progress = Callable[[int, int], None]
logger = logging.getLogger("ovfast")

HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
COMPARED_ROWS = 64  # rows of a duplicate head that are compared with the embedding


def resolve_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The directory of a checkpoint, downloaded where `model` is a Hub id.

    Args:
        model: a directory, a Hub id ("owner/name"), or "demo" for the embedded model.
        revision: branch, tag or commit of a Hub repository.
        token: access token of the Hub; None takes the stored one.
        cache_dir: the Hub's cache; None takes its default.

    Returns:
        A directory with the checkpoint's files.

    Raises:
        OptionError: `model` is empty or not a str or path.
        CheckpointError: there is no such directory, or the download failed.
    """
    given: object = model  # callers without a type checker pass anything
    text = os.fspath(model) if isinstance(given, str | os.PathLike) else None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise OptionError(
            f"model={given!r}; expected a checkpoint directory, a Hub id such as "
            "'llava-hf/llava-onevision-qwen2-0.5b-ov-hf', or 'demo'"
        )
    if given == "demo":
        return _demo()
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"model={text!r} is a file; expected the checkpoint's directory, which holds "
            f"config.json and *.safetensors. Pass {str(path.parent)!r}?"
        )
    if not isinstance(given, str) or not HUB_ID.fullmatch(text):
        raise CheckpointError(
            f"model={text!r}: there is no such directory, and it is no Hub id (owner/name). "
            "Check the path, or pass an id such as 'llava-hf/llava-onevision-qwen2-0.5b-ov-hf'."
        )
    return _download(text, revision, token, cache_dir)


def _demo() -> Path:
    path = Path(__file__).parent / "demo"
    if not (path / "config.json").is_file():
        raise CheckpointError(
            "model='demo': this installation holds no demo model. Install a release of ovfast, or "
            "train it with tools/train_demo.py."
        )
    return path


def _download(
    repo: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                allow_patterns=HUB_PATTERNS,
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "GatedRepoError" in kinds:
            hint = "The repository is gated: accept its terms on the Hub and pass token=."
        elif "RevisionNotFoundError" in kinds:
            hint = f"It has no revision {revision!r}; pass a branch, tag or commit that exists."
        elif "RepositoryNotFoundError" in kinds:
            hint = "Check the id; a private repository needs token=."
        else:
            hint = (
                "Check the network; offline (HF_HUB_OFFLINE=1) only repositories already in the "
                "cache load. A downloaded directory can be passed instead."
            )
        raise CheckpointError(
            f"model={repo!r}: there is no such directory here, and fetching the Hub repository "
            f"failed ({type(error).__name__}: {str(error).strip()[:300]}). {hint}"
        ) from error


class CheckpointWeights:
    """The tensors of a checkpoint under ovfast's own names; each can be taken once.

    Opening reads only headers. `names` lacks lm_head.weight where the head is tied to the
    embedding: by the configuration, or because the files hold no head.

    Args:
        path: the checkpoint's directory.
        config: its configuration.
        progress: called with (bytes read, bytes in all) after each tensor.

    Raises:
        CheckpointError: unreadable files, or missing, unexpected or misshapen tensors.
    """

    def __init__(
        self, path: Path, config: ModelConfig, *, progress: Progress | None = None
    ) -> None:
        self._path = path = Path(path)
        self._progress = progress
        self._tensors = read_headers(path)
        tied = config.text.tie_word_embeddings
        if not tied and LM_HEAD not in self._tensors:
            logger.warning("%s holds no lm_head; it is tied to the embedding", path)
            tied = True
        self.vocab_size = self._check_vocab(config)
        self._expected = expected_tensors(config, self.vocab_size, tied=tied)
        self._check_complete(config, tied=tied)
        if tied and LM_HEAD in self._tensors:
            self._check_duplicate_head()
        self._left = dict.fromkeys(self._expected)
        self._done_bytes = 0
        self._all_bytes = sum(self._stored(part).num_bytes for part in self._parts())

    @property
    def names(self) -> tuple[str, ...]:
        """Own names of all tensors."""
        return tuple(self._expected)

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype of most of the numbers on disk."""
        counts: Counter[torch.dtype] = Counter()
        for part in self._parts():
            counts[self._stored(part).dtype] += math.prod(self._stored(part).shape)
        return counts.most_common(1)[0][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor by its own name."""
        return self._expected[name].shape

    def total_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of all tensors in `dtype`; None means as stored."""
        if dtype is None:
            return self._all_bytes
        return dtype.itemsize * sum(math.prod(e.shape) for e in self._expected.values())

    def take(self, name: str, *, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
        """Read a tensor into a new one, fused from its parts on disk; each name can be taken once.

        Args:
            name: own name, one of `names`.
            dtype: dtype of the result; None keeps the stored one.
            device: device of the result.

        Returns:
            A contiguous tensor of `shape(name)`.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        assert name in self._left, f"{name} is unknown or was taken before"
        expected = self._expected[name]
        stored = [self._stored(part) for part, _ in expected.parts]
        if dtype is None:
            dtype = stored[0].dtype
            for tensor in stored[1:]:
                dtype = torch.promote_types(dtype, tensor.dtype)
        result = torch.empty(expected.shape, dtype=dtype, device=device)
        row = 0
        for tensor in stored:
            rows = tensor.shape[0]
            result[row : row + rows].view(tensor.shape).copy_(read_tensor(tensor))
            row += rows
            self._done_bytes += tensor.num_bytes
        del self._left[name]
        if self._progress is not None:
            self._progress(self._done_bytes, self._all_bytes)
        return result

    def take_packed(self, name: str) -> None:
        """None: a checkpoint holds tensors for any back end."""

    def finish(self) -> None:
        """Check that the model took every tensor."""
        assert not self._left, f"tensors never taken: {listing(self._left)}"

    def _parts(self) -> Iterable[str]:
        return (part for expected in self._expected.values() for part, _ in expected.parts)

    def _stored(self, logical: str) -> "StoredTensor":
        return self._tensors[logical]

    def _check_vocab(self, config: ModelConfig) -> int:
        embedding = self._tensors.get(EMBEDDING)
        if embedding is None or len(embedding.shape) != 2:
            return config.text.vocab_size  # reported with the other missing or misshapen tensors
        check_vocab(embedding.shape[0], config, f"{embedding.name} in {embedding.file}")
        return embedding.shape[0]

    def _check_complete(self, config: ModelConfig, *, tied: bool) -> None:
        wanted = {part: shape for e in self._expected.values() for part, shape in e.parts}
        missing = [part for part in wanted if part not in self._tensors]
        unexpected = [
            tensor.name
            for logical, tensor in self._tensors.items()
            if logical not in wanted and not is_unused(logical, config, tied=tied)
        ]
        misshapen = [
            f"{self._stored(part).name} {self._stored(part).shape} instead of {shape}"
            for part, shape in wanted.items()
            if part in self._tensors and self._stored(part).shape != shape
        ]
        problems = problem_list(missing, unexpected, misshapen)
        if problems:
            raise CheckpointError(
                f"{self._path}: tensors {'; '.join(problems)}. Expected exactly those of a "
                "LLaVA-OneVision model of the sizes in config.json; download the checkpoint again, "
                "or correct config.json."
            )

    def _check_duplicate_head(self) -> None:
        head, embedding = self._stored(LM_HEAD), self._stored(EMBEDDING)
        rows = range(0, embedding.shape[0], max(1, embedding.shape[0] // COMPARED_ROWS))
        if head.shape != embedding.shape or not all(
            torch.equal(read_tensor(head, row), read_tensor(embedding, row)) for row in rows
        ):
            raise CheckpointError(
                f"{self._path}: tie_word_embeddings is true, but {head.name} differs from "
                f"{embedding.name}; expected the same values, or no head. Set tie_word_embeddings "
                "to false in config.json if the head was trained separately."
            )


def check_vocab(rows: int, config: ModelConfig, what: str) -> None:
    """Raises CheckpointError where an embedding lacks rows for ids that the configuration names."""
    ids = [*config.stop_token_ids]
    if config.dialect == "hf":
        ids += [config.image_token_id, config.video_token_id or 0]
    if rows <= max(ids, default=0):
        raise CheckpointError(
            f"{what} has {rows} rows; expected at least {max(ids) + 1}, because the configuration "
            f"uses token id {max(ids)}. The checkpoint's weights and config.json do not belong "
            "together."
        )
    if rows != config.text.vocab_size:
        logger.info("vocabulary of %d rows (config.json: %d)", rows, config.text.vocab_size)


def terminal_progress() -> Progress | None:
    """A progress bar on a terminal; None (and nothing printed) elsewhere."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("loading weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("loading weights", total=None)

    def update(done_bytes: int, all_bytes: int) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done_bytes, total=all_bytes)
        if done_bytes >= all_bytes:
            bar.stop()

    return update
