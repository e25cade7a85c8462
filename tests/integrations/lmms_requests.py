"""Models and requests as lmms-eval makes them, for tests that call the classes themselves."""

from collections.abc import Callable
from typing import Any

from PIL import Image

GREEDY = {"max_new_tokens": 48, "until": []}


def build(*, simple: bool = False, checkpoint: str = "demo", batch_size: int = 3, **kw: Any) -> Any:
    """The model that lmms-eval's registry and its argument string give."""
    from lmms_eval.models import get_model

    model = get_model("ovfast", force_simple=simple)
    arguments = ",".join(f"{name}={value}" for name, value in kw.items())
    return model.create_from_arg_string(
        f"pretrained={checkpoint}" + (f",{arguments}" if arguments else ""),
        {"batch_size": batch_size, "max_batch_size": None, "device": None},
    )


def request(kind: str, *arguments: Any, document: int = 0, **metadata: Any) -> Any:
    from lmms_eval.api.instance import Instance

    place = {"task": "scenes", "doc_id": document, "repeats": 1}
    return Instance(kind, (*arguments, document, "scenes", "test"), 0, place | metadata)


def say(*content: dict[str, Any]) -> Callable[[Any], list[dict[str, Any]]]:
    return lambda document: [{"role": "user", "content": list(content)}]


def show(pictures: list[Any]) -> list[dict[str, Any]]:
    return [{"type": "image", "url": picture} for picture in pictures]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def pictures_of(sample: Any) -> list[Image.Image]:
    return [Image.fromarray(scene.image) for scene in sample.scenes]


def with_documents(model: Any, count: int) -> Any:
    model.task_dict = {"scenes": {"test": list(range(count))}}
    return model
