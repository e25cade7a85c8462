"""ovfast: LLaVA-OneVision answered now. ``import ovfast; ovfast.generate(question,
images=...)``.
"""

from ovfast.anyres import VisualOptions
from ovfast.api import generate, stream
from ovfast.conversion import convert
from ovfast.encoded_media import EncodedMedia
from ovfast.engine import Engine
from ovfast.errors import (
    BackendError,
    CapacityError,
    CheckpointError,
    ConfigError,
    MediaError,
    OptionError,
    OVFastError,
    PromptError,
    QuantizationError,
)
from ovfast.loading import load
from ovfast.media import MediaLimits
from ovfast.outputs import ChoiceOutput, GenerationOutput, ScoreOutput, StreamChunk
from ovfast.processor import ModelInputs
from ovfast.roofline import Estimate
from ovfast.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CapacityError",
    "CheckpointError",
    "ChoiceOutput",
    "ConfigError",
    "EncodedMedia",
    "Engine",
    "Estimate",
    "GenerationOutput",
    "MediaError",
    "MediaLimits",
    "ModelInputs",
    "OVFastError",
    "OptionError",
    "PromptError",
    "QuantizationError",
    "SamplingParams",
    "ScoreOutput",
    "StreamChunk",
    "VisualOptions",
    "__version__",
    "convert",
    "generate",
    "load",
    "stream",
]
