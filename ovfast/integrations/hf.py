"""transformers' shape: `from_pretrained`, `generate` over the official processor's tensors.

    from ovfast.integrations.hf import OVFastForConditionalGeneration as Model

in place of `LlavaOnevisionForConditionalGeneration`. Which options count: `hf_options`. Answers are
those of transformers with the same tensors, except that media placeholders and ids without a token
are never generated, that sampled tokens come from other random numbers, and that padding is no part
of a prompt: a repetition penalty does not see it, and rows padded on the right are answered like
rows padded on the left (transformers goes on from the padding).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ovfast.engine import Engine
from ovfast.errors import BackendError, ConfigError, OptionError
from ovfast.integrations import hf_tensors
from ovfast.integrations.arguments import refuse_given, refuse_unknown
from ovfast.integrations.hf_loading import import_transformers, load_pretrained
from ovfast.integrations.hf_options import FORWARD_INPUTS, Generation, plan_generation
from ovfast.integrations.hf_outputs import greedy_scores, joined, prompt_logits, step_logits
from ovfast.integrations.hf_pipeline import TASK, Pipeline
from ovfast.integrations.hf_processor import OVFastProcessor
from ovfast.integrations.together import answer_all
from ovfast.model_inputs import ModelInputs
from ovfast.storage import DTYPES

__all__ = ["OVFastForConditionalGeneration", "OVFastProcessor", "Pipeline", "pipeline"]


class OVFastForConditionalGeneration:
    """A loaded model with transformers' generation interface.

    Attributes:
        engine: the engine behind it.
        generation_config: transformers' GenerationConfig of the checkpoint; may be changed.
    """

    main_input_name = "input_ids"

    def __init__(self, engine: Engine, path: Path) -> None:
        self.engine, self._path = engine, path
        if engine.config.dialect != "hf":
            raise ConfigError(
                f"{path} has the original layout, for which transformers has no processor; expected"
                " a Hugging Face conversion. Use ovfast.load() with it."
            )
        self._transformers = import_transformers()
        self._never_generated = frozenset(engine._processor.forbidden_ids.tolist())
        configs = self._transformers.GenerationConfig
        if (path / "generation_config.json").is_file():
            self.generation_config: Any = configs.from_pretrained(path)
        else:
            self.generation_config = configs(eos_token_id=list(engine.config.stop_token_ids))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Loads a checkpoint.

        Args:
            pretrained_model_name_or_path: as `ovfast.load` takes it.
            dtype: as `ovfast.load` takes it; None is "auto".
            torch_dtype: the older name of dtype.
            device_map: a device, "auto", or {"": device}; None is "auto".
            **kwargs: of LOAD_OPTIONS and NO_EFFECT_LOADING.

        Raises:
            OVFastError: as `ovfast.load`; OptionError for an argument that has no meaning here.
        """
        wanted = dtype if dtype is not None else torch_dtype
        engine, path = load_pretrained(pretrained_model_name_or_path, wanted, device_map, kwargs)
        return cls(engine, path)

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.dtype

    @cached_property
    def config(self) -> Any:
        """Transformers' configuration of the checkpoint."""
        return self._transformers.AutoConfig.from_pretrained(self._path)

    @cached_property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer of the checkpoint."""
        return self._transformers.AutoTokenizer.from_pretrained(self._path)

    def eval(self) -> Self:
        """The model itself, which never trains."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The model itself, where it already is what is asked for.

        Raises:
            BackendError: another device or dtype than the one loaded.
        """
        for wanted in (*args, *kwargs.values()):
            if wanted is None or isinstance(wanted, bool):  # non_blocking, copy
                continue
            if isinstance(wanted, torch.dtype):
                if wanted not in (self.dtype, DTYPES.get(self.engine.storage)):
                    raise BackendError(
                        f"to({wanted}) of a model loaded as {self.engine.storage}; expected the"
                        " same. Pass dtype= to from_pretrained."
                    )
                continue
            device = torch.device("cuda", wanted) if isinstance(wanted, int) else wanted
            device = torch.device(device)
            if device.type != self.device.type or device.index not in (None, self.device.index):
                raise BackendError(
                    f"to({str(device)!r}) of a model loaded on {str(self.device)!r}; expected the"
                    " same. Pass device_map= to from_pretrained."
                )
        return self

    def close(self) -> None:
        """Frees weights and cache."""
        self.engine.close()

    @torch.no_grad()
    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Any = None,
        synced_gpus: Any = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: Any = None,
        negative_prompt_attention_mask: Any = None,
        custom_generate: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Answers a batch of prompts; arguments as transformers' `generate`.

        Args:
            inputs: input_ids by another name.
            generation_config: replaces fields of the model's own.
            logits_processor: not supported.
            stopping_criteria: asked about one row at a time, (1, length) ids and None for scores.
            prefix_allowed_tokens_fn: not supported.
            synced_gpus: not supported.
            assistant_model: not supported.
            streamer: gets the prompt, then each token; for a single prompt.
            negative_prompt_ids: not supported.
            negative_prompt_attention_mask: not supported.
            custom_generate: not supported.
            **kwargs: the processor's tensors, and options of HONOURED and NO_EFFECT.

        Returns:
            LongTensor (batch · num_return_sequences, prompt + new): the prompts as they were given,
            then the new ids, filled up with pad_token_id; a GenerateDecoderOnlyOutput with
            return_dict_in_generate.

        Raises:
            OVFastError: see `ovfast.errors`; OptionError for what is not supported.
        """
        refuse_given(
            "ovfast chooses tokens by itself; stopping_criteria and streamer are supported.",
            logits_processor=logits_processor,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            synced_gpus=synced_gpus,
            assistant_model=assistant_model,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            custom_generate=custom_generate,
        )
        if inputs is not None:
            if kwargs.get("input_ids") is not None:
                raise OptionError("inputs and input_ids; they are the same argument. Pass one.")
            kwargs["input_ids"] = inputs
        tensors, options = self._split(kwargs)
        input_ids = tensors.get("input_ids")
        plan = self.plan(
            options,
            input_ids.shape[-1] if isinstance(input_ids, Tensor) else 0,
            generation_config,
            stopping_criteria,
        )
        prompts = self._requests(tensors, self._rows(tensors, plan))
        assert isinstance(input_ids, Tensor)
        repeated = input_ids.repeat_interleave(plan.num_return_sequences, 0)
        prompts = [each for each in prompts for _ in range(plan.num_return_sequences)]
        new_ids = self.answer(prompts, repeated, plan, streamer)
        sequences = joined(repeated, new_ids, plan.pad_token_id)
        return self._output(sequences, prompts, new_ids, plan) if plan.return_dict else sequences

    @torch.no_grad()
    def forward(self, *, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        """Logits of prompts, as transformers' `forward` without a cache.

        Args:
            logits_to_keep: how many of the last positions, 0 for all, or a tensor of positions.
            **kwargs: the processor's tensors; use_cache has no effect, return_dict may be True.

        Returns:
            A CausalLMOutputWithPast with `logits`, (batch, positions, vocab_size) float32; 0 at
            padding.

        Raises:
            OVFastError: see `ovfast.errors`; OptionError for labels, embeddings and caches.
        """
        kwargs.pop("use_cache", None)
        if kwargs.pop("return_dict", None) is False:
            raise OptionError("return_dict=False; expected True. Take `.logits` of what returns.")
        tensors, options = self._split(kwargs)
        refuse_unknown(_present(options), (), "forward")
        rows = hf_tensors.prompt_rows(tensors.get("input_ids"), tensors.get("attention_mask"), None)
        prompts = self._requests(tensors, rows)
        positions = range(tensors["input_ids"].shape[1])
        try:
            if isinstance(logits_to_keep, Tensor):
                wanted = [positions[each] for each in logits_to_keep.tolist()]
            else:
                wanted = list(positions[-logits_to_keep:])
        except (IndexError, TypeError) as error:
            raise OptionError(
                f"logits_to_keep={logits_to_keep!r:.100} of {len(positions)} positions; expected a"
                " number of them, or a tensor of some."
            ) from error
        logits = prompt_logits(self.engine, prompts, [row.first for row in rows], wanted)
        return self._transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    __call__ = forward

    def plan(
        self,
        options: Mapping[str, Any],
        prompt_length: int,
        generation_config: Any = None,
        stopping_criteria: Any = None,
    ) -> Generation:
        """Checks options of `generate` against generation configs; `tokenizer` is one of them."""
        options = dict(options)
        tokenizer = options.pop("tokenizer", None)
        config = self._transformers.GenerationConfig
        if not isinstance(generation_config, config | None):
            raise OptionError(
                f"generation_config={generation_config!r:.100}; expected a GenerationConfig. Pass"
                " single options as arguments."
            )
        given = {} if generation_config is None else vars(generation_config)
        return plan_generation(
            self._transformers,
            [options, given, vars(self.generation_config)],
            prompt_length=prompt_length,
            tokenizer=tokenizer,
            stopping_criteria=stopping_criteria,
            never_generated=self._never_generated,
        )

    def answer(
        self,
        prompts: Sequence[ModelInputs],
        input_ids: Tensor,
        plan: Generation,
        streamer: Any = None,
    ) -> list[list[int]]:
        """New ids of laid-out prompts.

        Args:
            prompts: the requests.
            input_ids: (len(prompts), length), what criteria and streamers see.
            plan: of `plan`.
            streamer: as in `generate`.
        """
        if streamer is None and not plan.criteria:
            params = [plan.sampling() for _ in prompts]
            return [list(out.token_ids) for out in answer_all(self.engine, prompts, params)]
        if streamer is not None and len(prompts) != 1:
            raise OptionError(
                f"streamer with {len(prompts)} rows; expected one. Call generate for each prompt."
            )
        if streamer is not None:
            streamer.put(input_ids.cpu())
        clocks = [c for c in plan.criteria if isinstance(c, self._transformers.MaxTimeCriteria)]
        if clocks and len(prompts) > 1:
            # Rows with criteria follow one another: the clock would run out in the first.
            raise OptionError(
                f"max_time={clocks[0].max_time!r} with {len(prompts)} rows; expected one row. Call"
                " generate for each prompt, or limit max_new_tokens."
            )
        new_ids = []
        for index, prompt in enumerate(prompts):
            new_ids.append(list(self._stream(prompt, input_ids[index : index + 1], plan, streamer)))
        if streamer is not None:
            streamer.end()
        return new_ids

    def _stream(
        self, prompt: ModelInputs, input_ids: Tensor, plan: Generation, streamer: Any
    ) -> Iterator[int]:
        chunks = self.engine.stream(prompt, sampling=plan.sampling())
        try:
            for chunk in chunks:
                token = torch.tensor(chunk.token_ids, device=input_ids.device)
                input_ids = torch.cat([input_ids, token[None]], dim=1)
                if streamer is not None:
                    streamer.put(token.cpu())
                yield from chunk.token_ids
                answers = [criterion(input_ids, None) for criterion in plan.criteria]
                if any(bool(torch.as_tensor(answer).all()) for answer in answers):
                    return
        finally:
            chunks.close()

    def _split(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The processor's tensors, and everything else, all of known names."""
        names = {name for name in vars(self._transformers.GenerationConfig()) if name[0] != "_"}
        expected = {
            "vision_feature_layer": self.config.vision_feature_layer,
            "vision_feature_select_strategy": self.config.vision_feature_select_strategy,
            "vision_aspect_ratio": self.config.vision_aspect_ratio,
        }
        for name, value in expected.items():
            if kwargs.get(name, value) not in (value, None):
                raise OptionError(f"{name}={kwargs[name]!r}; this checkpoint computes {value!r}.")
        known = (*FORWARD_INPUTS, *expected, "tokenizer", *names)
        refuse_unknown(_present(kwargs), known, "generate")
        tensors = {name: kwargs[name] for name in FORWARD_INPUTS if name in kwargs}
        options = {k: v for k, v in kwargs.items() if k in names or k == "tokenizer"}
        return tensors, options

    def _rows(self, tensors: Mapping[str, Any], plan: Generation) -> list[hf_tensors.Row]:
        # As transformers: padding is guessed only where its id cannot end an answer.
        pad = None if plan.pad_token_id in plan.eos_token_ids else plan.pad_token_id
        return hf_tensors.prompt_rows(tensors.get("input_ids"), tensors.get("attention_mask"), pad)

    def _requests(
        self, tensors: Mapping[str, Any], rows: Sequence[hf_tensors.Row]
    ) -> list[ModelInputs]:
        names = ("pixel_values", "image_sizes", "batch_num_images", "pixel_values_videos")
        given = {name: tensors.get(name) for name in names}
        return hf_tensors.requests(rows, self.engine.config, **given)

    def _output(
        self,
        sequences: Tensor,
        prompts: Sequence[ModelInputs],
        new_ids: Sequence[list[int]],
        plan: Generation,
    ) -> Any:
        """A GenerateDecoderOnlyOutput; logits are computed again, all positions at once."""
        logits = scores = None
        if plan.output_logits or plan.output_scores:
            raw = step_logits(self.engine, prompts, new_ids)
            logits = raw if plan.output_logits else None
            scores = greedy_scores(self.engine, raw, plan) if plan.output_scores else None
        return self._transformers.generation.GenerateDecoderOnlyOutput(
            sequences=sequences, scores=scores, logits=logits
        )


def pipeline(task: str = TASK, model: Any = "demo", **kwargs: Any) -> Pipeline:
    """A callable as transformers' `pipeline` returns.

    Args:
        task: "image-text-to-text".
        model: an OVFastForConditionalGeneration, or what its from_pretrained takes.
        **kwargs: of from_pretrained, where the model is loaded here; `device` is its device_map,
            -1 is the CPU.

    Raises:
        OptionError: another task.
    """
    if task != TASK:
        raise OptionError(f"task={task!r}; expected {TASK!r}, the only one of this model.")
    if isinstance(model, OVFastForConditionalGeneration):
        refuse_unknown(kwargs, (), "pipeline with a loaded model")
        return Pipeline(model)
    if "device" in kwargs:
        device = kwargs.pop("device")
        kwargs["device_map"] = "cpu" if device == -1 else device
    return Pipeline(OVFastForConditionalGeneration.from_pretrained(model, **kwargs))


def _present(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with a value: a processor's outputs may hold None."""
    return {name: value for name, value in kwargs.items() if value is not None}
