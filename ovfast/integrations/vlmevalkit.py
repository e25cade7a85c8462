"""VLMEvalKit's model class, its registration, and a launcher of its runner.

    python -m ovfast.integrations.vlmevalkit --checkpoint DIR --data MMBench_DEV_EN --work-dir out

VLMEvalKit has no plug-ins: `register` puts the class where its `--model` names and its `--config`
files look for it. Importing this module imports VLMEvalKit.
"""

import argparse
import json
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import vlmeval
import vlmeval.vlm
from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel

from ovfast.anyres import VisualOptions
from ovfast.errors import BackendError, OptionError
from ovfast.integrations.evaluation import sort_options, within_context
from ovfast.loading import load
from ovfast.outputs import GenerationOutput
from ovfast.sampling import SamplingParams

__all__ = ["OVFast", "main", "register"]

Item = dict[str, Any]

NEW_TOKENS = 2048  # as VLMEvalKit's LLaVA-OneVision classes
# VLMEvalKit sets `fps` only where it is positive before; until then it means nothing.
FPS_BEFORE = 1.0


class OVFast(BaseModel):
    """A checkpoint answering VLMEvalKit's messages.

    Items keep their order, in one turn. Keys beside `type` and `value` (roles, pixel limits) have
    no effect, as in VLMEvalKit's own LLaVA-OneVision classes.

    Args:
        model_path: a directory, a Hub id, or "demo".
        system_prompt: a system turn's text.
        **kwargs: further arguments of `ovfast.load`, fields of `ovfast.VisualOptions` and of
            `ovfast.SamplingParams`. Greedy, at most 2048 tokens, unless these say otherwise.

    Attributes:
        nframe, fps: of videos, set by VLMEvalKit's video data sets; one of the two is None then.

    Raises:
        OptionError: an unknown name or a wrong value; else as `ovfast.load`.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    VIDEO_LLM = True
    allowed_types = ["text", "image", "video"]  # noqa: RUF012  (VLMEvalKit declares it so)

    def __init__(
        self, model_path: str = "demo", system_prompt: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        options = sort_options(kwargs, sampling=True)
        self._sampling = SamplingParams(**{"max_new_tokens": NEW_TOKENS, **options.sampling})
        self._visual, self._system = options.visual, system_prompt
        self._engine = load(model_path, **options.load)
        self.nframe: int | None = self._visual.num_frames
        self.fps: float | None = FPS_BEFORE

    def generate_inner(self, message: Sequence[Item], dataset: str | None = None) -> str:
        """The answer to one message."""
        return self._answer([{"role": "user", "content": _parts(message)}])

    def chat_inner(self, message: Sequence[Item], dataset: str | None = None) -> str:
        """The answer to the last of several turns."""
        return self._answer(
            [{"role": turn["role"], "content": _parts(turn["content"])} for turn in message]
        )

    def _answer(self, chat: list[Item]) -> str:
        inputs = self._engine.prepare(chat, visual=self._visual_now(), system=self._system)
        params = within_context(self._sampling, inputs.num_tokens, self._engine.max_seq_len)
        output: GenerationOutput = self._engine.generate(inputs, sampling=params)
        return output.text

    def _visual_now(self) -> VisualOptions:
        """The options with the frames that a video data set asks for."""
        if self.nframe is None and self.fps is None:
            return self._visual
        if self.nframe is not None and self.fps == FPS_BEFORE:  # no data set came by
            return replace(self._visual, num_frames=int(self.nframe))
        num_frames = self._visual.num_frames if self.nframe is None else int(self.nframe)
        return replace(self._visual, num_frames=num_frames, fps=self.fps)


def register(name: str = "ovfast", **kwargs: Any) -> None:
    """Makes a checkpoint known to VLMEvalKit.

    Args:
        name: for `--model`; it names files too.
        **kwargs: of `OVFast`. Files for `--config` say `"class": "OVFast"` and give their own.

    Raises:
        OptionError: VLMEvalKit has a model of that name.
    """
    known = supported_VLM.get(name)
    if known is not None and getattr(known, "func", None) is not OVFast:
        raise OptionError(f"VLMEvalKit has a model {name!r} already; expected a new name.")
    vlmeval.vlm.OVFast = OVFast
    supported_VLM[name] = partial(OVFast, **kwargs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Registers a checkpoint and runs VLMEvalKit's runner with the remaining arguments.

    Args:
        arguments: of the command line; None takes the process's.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ovfast.integrations.vlmevalkit",
        description="VLMEvalKit's runner with an ovfast model; other arguments go to the runner.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", help="directory, Hub id or 'demo'; not with --config")
    parser.add_argument("--name", default="ovfast", help="of the model, in names of files too")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of OVFast, for example quantization=int8 or max_views=1",
    )
    given, rest = parser.parse_known_args(arguments)
    if given.checkpoint is None:
        if given.option or not any(word.split("=")[0] == "--config" for word in rest):
            parser.error('expected --checkpoint, or --config of a file with "class": "OVFast"')
        register(given.name)
    else:
        options = dict(_option(text) for text in given.option)
        register(given.name, model_path=given.checkpoint, **options)
        rest += ["--model", given.name]
    _run(rest)


def _run(arguments: Sequence[str]) -> None:
    """VLMEvalKit's runner: a module of its package on PyPI, a file beside it in its repository."""
    sys.argv = ["run.py", *arguments]
    folder = Path(vlmeval.__file__).parent
    for script in (folder / "run.py", folder.parent / "run.py"):
        if script.is_file():
            runpy.run_path(str(script), run_name="__main__")
            return
    raise BackendError(
        f"VLMEvalKit in {folder} has no run.py; expected one in it or beside it. Install"
        " ovfast[vlmevalkit], or VLMEvalKit from its repository with pip install -e."
    )


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise OptionError(f"--option {text!r}; expected NAME=VALUE.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _parts(message: Sequence[Item]) -> list[Item]:
    if unknown := {item["type"] for item in message} - set(OVFast.allowed_types):
        raise OptionError(f"items of type {sorted(unknown)}; expected {OVFast.allowed_types}.")
    return [{"type": item["type"], item["type"]: item["value"]} for item in message]


if __name__ == "__main__":
    main()
