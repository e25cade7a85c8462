"""What lmms-eval reads at its start: which classes answer to the model name "ovfast".

Apart from the classes, so that a start with another model imports neither torch nor an engine.
"""

from typing import Any

CLASSES = "ovfast.integrations.lmms_eval"


def manifest() -> Any:
    """The payload of the entry point in group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="ovfast",
        simple_class_path=f"{CLASSES}.OVFastSimple",
        chat_class_path=f"{CLASSES}.OVFastChat",
    )
