"""The peer SGLang: its offline engine, streaming, radix cache off. Needs a CUDA device."""

import base64
import time


class Peer:
    """A checkpoint in SGLang."""

    def load(self, model, storage, threads, device="cuda"):
        if device == "cpu":
            raise ValueError("this peer is for a CUDA device")
        start = time.perf_counter()
        import sglang

        imported = time.perf_counter()
        self.engine = sglang.Engine(
            model_path=model,
            dtype=storage,
            disable_radix_cache=True,
            log_level="error",
        )
        return {
            "import_torch_ms": 0.0,
            "import_ms": 1e3 * (imported - start),
            "load_ms": 1e3 * (time.perf_counter() - imported),
            "torch_bytes": 0,
            "weight_bytes": 0,
            "version": sglang.__version__,
        }

    def answer(self, requests, max_new_tokens):
        if len(requests) != 1 or requests[0]["videos"]:
            return None  # one request at a time, without videos
        (request,) = requests
        pictures = [_data_uri(data) for data in request["images"]]
        options = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        start, times, answer = time.perf_counter(), [], None
        for chunk in self.engine.generate(
            prompt=request["prompt"],
            image_data=pictures or None,
            sampling_params=options,
            stream=True,
        ):
            times.append(time.perf_counter())
            answer = chunk
        return [
            {
                "ttft_ms": 1e3 * (times[0] - start),
                "e2e_ms": 1e3 * (times[-1] - start),
                "prompt_tokens": answer["meta_info"]["prompt_tokens"],
                "token_ids": list(answer["output_ids"]),
                "stages": {},
            }
        ]


def _data_uri(data):
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
