"""One fixed hypothesis profile, so that a failure on one machine is a failure on every machine."""

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "agm",
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("agm")

torch.set_num_threads(1)  # the tensors are tiny: threads only cost
