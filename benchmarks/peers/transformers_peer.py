"""The peer transformers: its modules without the overhead of `generate`; SDPA attention, dynamic
cache, its Pillow image processor. `static=True` is `generate` over a static cache.

transformers' processor as a whole needs torchvision, for videos; a prompt's placeholders are
counted here by that processor's own methods, and a clip's frames are resized by Pillow as it does.
Ids without an entry of the tokenizer and placeholders are never generated, as in ovfast.
"""

import functools
import io
import json
import statistics
import time
import types
from pathlib import Path


class Peer:
    """A checkpoint in transformers."""

    def load(self, model, storage, device="cpu", threads=1, static=False):
        before = time.perf_counter()
        import torch
        from protocol import memory_bytes

        import_torch_ms, torch_bytes = 1e3 * (time.perf_counter() - before), memory_bytes("VmRSS")
        import transformers
        from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        imported = time.perf_counter()
        self.torch, self.device, self.static = torch, torch.device(device), static
        loaded = LlavaOnevisionForConditionalGeneration.from_pretrained(
            model, dtype=getattr(torch, storage), attn_implementation="sdpa"
        )
        self.model = loaded.to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.images = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(model)
        self.counter = _Counter(Path(model), self.images)
        self.forbidden = self._forbidden_ids()
        for name in ("get_image_features", "get_video_features"):
            setattr(self.model.model, name, self._timed(getattr(self.model.model, name)))
        return {
            "import_torch_ms": import_torch_ms,
            "import_ms": 1e3 * (imported - before),
            "load_ms": 1e3 * (time.perf_counter() - imported),
            "torch_bytes": torch_bytes,
            "weight_bytes": sum(p.nbytes for p in self.model.parameters()),
            "version": transformers.__version__,
        }

    def answer(self, requests, max_new_tokens):
        """Greedy tokens of one request, or of several whose prompts are equally long."""
        if self.static and len(requests) > 1:
            return None  # its `generate` streams one request at a time
        with self.torch.inference_mode():
            start = time.perf_counter()
            inputs = self._inputs(requests)
            prepared = time.perf_counter()
            self.vision_s = 0.0
            run = self._generate if self.static else self._decode
            token_ids, first, last = run(inputs, max_new_tokens)
        stages = {
            "preprocess_ms": 1e3 * (prepared - start),
            "vision_ms": 1e3 * self.vision_s,
            "prefill_ms": 1e3 * (first - prepared - self.vision_s),
        }
        return [
            {
                "ttft_ms": 1e3 * (first - start),
                "e2e_ms": 1e3 * (last - start),
                "prompt_tokens": inputs["input_ids"].shape[1],
                "token_ids": ids,
                "stages": stages,
            }
            for ids in token_ids
        ]

    def decode(self, context, steps, rows=1):
        """Milliseconds of a step over a cache of random keys."""
        from transformers import DynamicCache

        torch, config = self.torch, self.model.config.text_config
        width = config.hidden_size // config.num_attention_heads
        shape = (rows, config.num_key_value_heads, context, width)
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            keys, values = (self._random(shape) for _ in range(2))
            cache.update(keys, values, layer)
        tokens = torch.full((rows, 1), 5, device=self.device)
        times = []
        with torch.inference_mode():
            for _ in range(steps):
                start = time.perf_counter()
                out = self.model(input_ids=tokens, **self._cache_argument(cache))
                tokens = out.logits[:, -1].argmax(-1, keepdim=True)
                tokens[0].item()
                times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def tower(self, num_views):
        """Milliseconds a view."""
        side = self.model.config.vision_config.image_size
        pixels = self._random((num_views, 3, side, side))
        with self.torch.inference_mode():
            start = time.perf_counter()
            self.model.model.vision_tower(pixels, output_hidden_states=True)
            self._synchronize()
            return 1e3 * (time.perf_counter() - start) / num_views

    def prefill(self, num_tokens):
        """Milliseconds of the language model over a prompt."""
        embeds = 0.02 * self._random((1, num_tokens, self.model.config.text_config.hidden_size))
        with self.torch.inference_mode():
            start = time.perf_counter()
            out = self.model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
            out.logits[0, -1, 0].item()
            return 1e3 * (time.perf_counter() - start)

    def preprocess(self, picture, is_new_size=False):
        """Milliseconds from a decoded picture to the pixels of its views."""
        image = _open(picture)
        start = time.perf_counter()
        self.images([image], return_tensors="pt")
        return 1e3 * (time.perf_counter() - start)

    def _inputs(self, requests):
        torch, dtype = self.torch, self.model.dtype
        pictures = [[_open(data) for data in request["images"]] for request in requests]
        clips = [[_open(f) for f in clip] for request in requests for clip in request["videos"]]
        inputs = {}
        if any(pictures):
            made = self.images(pictures, return_tensors="pt")
            inputs["pixel_values"] = made["pixel_values"].to(self.device, dtype)
            inputs["image_sizes"] = made["image_sizes"].to(self.device)
            inputs["batch_num_images"] = torch.tensor([len(row) for row in pictures])
        if clips:
            pixels = torch.stack([self._clip(frames) for frames in clips])
            inputs["pixel_values_videos"] = pixels.to(self.device, dtype)
        texts = [
            self.counter.expand(request["prompt"], row, [len(clip) for clip in request["videos"]])
            for request, row in zip(requests, pictures, strict=True)
        ]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        inputs["input_ids"] = torch.tensor(ids, device=self.device)
        return inputs

    def _clip(self, frames):
        import numpy as np
        from PIL import Image

        side = self.model.config.vision_config.image_size
        resized = [frame.resize((side, side), Image.Resampling.BICUBIC) for frame in frames]
        pixels = self.torch.from_numpy(np.stack([np.asarray(frame) for frame in resized]))
        return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5

    def _decode(self, inputs, count):
        out = self.model(**inputs, use_cache=True, logits_to_keep=1)
        rows, first = [], None
        for step in range(count):
            logits = out.logits[:, -1].float()
            logits[:, self.forbidden] = float("-inf")
            tokens = logits.argmax(-1, keepdim=True)
            rows.append(tokens[:, 0].tolist())
            last = time.perf_counter()
            first = first or last
            if step + 1 < count:
                cache = self._cache_argument(out.past_key_values)
                out = self.model(input_ids=tokens, **cache)
        return [list(ids) for ids in zip(*rows, strict=True)], first, last

    def _generate(self, inputs, count):
        clock = _Clock()
        ids = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            suppress_tokens=self.forbidden.tolist(),
            cache_implementation="static",
            streamer=clock,
        )
        prompt_tokens = inputs["input_ids"].shape[1]
        return [ids[0, prompt_tokens:].tolist()], clock.times[1], clock.times[-1]

    def _forbidden_ids(self):
        torch, known = self.torch, set(self.tokenizer.get_vocab().values())
        known -= {self.model.config.image_token_id, self.model.config.video_token_id}
        allowed = torch.zeros(self.model.config.text_config.vocab_size, dtype=torch.bool)
        allowed[[i for i in known if i < len(allowed)]] = True
        return (~allowed).nonzero()[:, 0].to(self.device)

    def _timed(self, function):
        @functools.wraps(function)  # `generate` reads its signature
        def run(*args, **named):
            self._synchronize()
            start = time.perf_counter()
            out = function(*args, **named)
            self._synchronize()
            self.vision_s += time.perf_counter() - start
            return out

        return run

    def _synchronize(self):
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)

    def _random(self, shape):
        return self.torch.randn(shape, dtype=self.model.dtype, device=self.device)

    def _cache_argument(self, cache):
        """As the installed release names it: "cache" from 5.24 on, before "past_key_values"."""
        import inspect

        names = inspect.signature(self.model.forward).parameters
        return {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}


class _Clock:
    """Notes when `generate` hands out tokens; it hands out the prompt first."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


class _Counter:
    """Expands the markers of a prompt by the methods of transformers' processor."""

    def __init__(self, path, image_processor):
        from transformers import LlavaOnevisionProcessor

        config = json.loads((path / "config.json").read_text())
        vision, self.side = config["vision_config"], config["vision_config"]["image_size"]
        self.per_view = (self.side // vision["patch_size"]) ** 2
        self.kind = LlavaOnevisionProcessor
        self.itself = types.SimpleNamespace(
            image_processor=image_processor,
            num_image_tokens=self.per_view,
            vision_aspect_ratio=config.get("vision_aspect_ratio", "anyres_max_9"),
            video_token="<video>",
        )
        self.itself._get_unpadded_features = types.MethodType(
            LlavaOnevisionProcessor._get_unpadded_features, self.itself
        )

    def expand(self, prompt, pictures, num_frames):
        for picture in pictures:
            count = self.per_view + 1
            if len(pictures) == 1:
                size_hw = (picture.height, picture.width)
                count = self.kind._get_number_of_features(
                    self.itself, *size_hw, self.side, self.side
                )
            prompt = prompt.replace("<image>", "<IMAGE>" * count, 1)
        for frames in num_frames:
            clip = {"pixel_values_videos": [[None] * frames]}
            text = self.kind.replace_video_token(self.itself, clip, 0)
            prompt = prompt.replace("<video>", text.replace("<video>", "<VIDEO>"), 1)
        return prompt.replace("<IMAGE>", "<image>").replace("<VIDEO>", "<video>")


def _open(data):
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")
