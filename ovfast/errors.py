"""The exception tree of ovfast; everything a caller may want to catch is here.

OVFastError
├── CheckpointError     files or tensors of a checkpoint are missing, wrong or unreadable
├── ConfigError         a configuration that ovfast does not compute
├── MediaError          a picture or a video that cannot be read, or that breaks a limit
├── PromptError         a prompt or chat that cannot be laid out
├── OptionError         an option with a wrong name, type or value (also a ValueError)
├── CapacityError       weights or a request that do not fit in memory or in the context
├── BackendError        a device or back end that is not available
└── QuantizationError   a quantisation that the device or checkpoint does not allow

Every message says what was given, what is allowed, and what to do.
"""


class OVFastError(Exception):
    """Base of all errors that ovfast raises on purpose."""


class CheckpointError(OVFastError):
    """Files or tensors of a checkpoint are missing, unexpected, misshapen or unreadable."""


class ConfigError(OVFastError):
    """The checkpoint's configuration asks for something ovfast does not compute."""


class MediaError(OVFastError):
    """A picture or video cannot be read, or breaks a limit of MediaLimits."""


class PromptError(OVFastError):
    """A prompt, chat or its markers cannot be laid out."""


class OptionError(OVFastError, ValueError):
    """An option has an unknown name, a wrong type or a value out of range."""


class CapacityError(OVFastError):
    """Weights or a request do not fit in memory, in the context or in the free slots."""


class BackendError(OVFastError):
    """A device or back end was asked for that is not available here."""


class QuantizationError(OVFastError):
    """The asked quantisation is unknown or not possible on this device or checkpoint."""
