"""What the YAML files beside this one name: media, questions and scores of a document."""

from typing import Any

from PIL import Image

Document = dict[str, Any]


def media(document: Document) -> list[Any]:
    return [Image.open(path) for path in document["images"]] + list(document["videos"])


def question(document: Document, lmms_eval_specific_kwargs: object = None) -> str:
    return document["questions"][0]


def compare(document: Document, results: list[str]) -> dict[str, float]:
    return {"exact": float(results[0] == document["answer"])}


def next_question(
    document: Document,
    lmms_eval_specific_kwargs: object = None,
    previous_output: list[str] | None = None,
    round_idx: int | None = None,
    previous_round_info: int | None = None,
) -> Any:
    """The context of the first round, or what lmms-eval's protocol wants of a later one."""
    if round_idx is None:
        return document["questions"][0]
    assert len(previous_output) == round_idx
    assert previous_round_info == (None if round_idx == 1 else round_idx - 1)
    if round_idx == len(document["questions"]):
        return None, None, True, previous_output, None
    return media(document), document["questions"][round_idx], False, previous_output, round_idx


def compare_rounds(document: Document, results: list[list[str]]) -> dict[str, float]:
    return {"exact": float(results[0] == document["answers"])}
