"""Adversarial Gaussian margins for data-free quantization: an add-on for any trainer."""

from agm import functional
from agm.augment import LinearInterpolation
from agm.errors import AgmError
from agm.hooks import AGM, Hook
from agm.loss import GaussianMarginLoss
from agm.networks import frozen_parameters
from agm.temporal import DiversityProbe

__all__ = [
    "AGM",
    "AgmError",
    "DiversityProbe",
    "GaussianMarginLoss",
    "Hook",
    "LinearInterpolation",
    "frozen_parameters",
    "functional",
]
