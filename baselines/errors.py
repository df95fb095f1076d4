"""Named errors of the trainers; each says what was received, what was expected and what to do."""

import agm

if not hasattr(agm, "GaussianMarginLoss"):  # PyPI's agm, a command line for Google's services
    raise ImportError(
        f"{agm} is another package of that name: run `pip uninstall agm; pip install -e .` in this "
        "project's folder"
    )

from agm import AgmError


class BaselineError(AgmError):
    """Root of the trainers' errors."""


class ConfigError(BaselineError, ValueError):
    """An option is unknown or out of range."""


class UnsupportedLayerError(BaselineError, ValueError):
    """The network holds a layer that should be quantized and cannot be."""


class NonFiniteLossError(BaselineError, ValueError):
    """A loss term or a gradient became infinite or NaN; the weights are those before the step."""


class CheckpointError(BaselineError, ValueError):
    """A checkpoint is missing, damaged, or of another network or run."""


class ExportError(BaselineError, ValueError):
    """A network cannot be written as integers, or something that does so is not installed."""
