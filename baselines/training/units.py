"""What a step of quantization is to each of a student's parameters: the unit of their rates.

Adam moves every parameter by about its rate. By 3e-4 a weight of a narrow layer at 8 bits moves by
a whole step of quantization at once, and one of a wide layer at 3 bits by a thousandth.

Above 4 bits the unit falls further. Rounding then leaves a student that is nearly right, and what
is left to learn from generated images are their faults.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize

from baselines.quantization.policy import QuantizationConfig
from baselines.quantization.quantizers import ActivationQuantizer, WeightQuantizer

FULL_BITS = 4  # chosen at 8 bits, in benchmarks/evidence/results/ablation.md


@torch.no_grad()
def in_units(student: nn.Module) -> list[tuple[float, list[nn.Parameter]]]:
    """All parameters of ``student``, each once, in groups of one unit.

    A quantized weight, and the bias of its layer: the median over its numbers of their channels'
    ``scale``, zeros left out (0 if all are), times (2^4 - 1) / (2^bits - 1) from 5 bits on. An
    activation quantizer's ``log_gain``: 1 / (2^bits - 1), by which the highest of its levels moves
    by one. All else, such as a BatchNorm that stands by itself: the same for the student's
    activation bits.
    """
    config: QuantizationConfig = student.meta["config"]  # type: ignore[assignment]
    groups, known = [], set()
    for module in student.modules():
        bits = module.bit_width if isinstance(module, ActivationQuantizer) else config.act_bits
        unit, params = 1 / (2**bits - 1), list(module.parameters(recurse=False))
        if parametrize.is_parametrized(module, "weight"):
            quantizer, weight = module.parametrizations.weight[0], module.parametrizations.weight
            unit = _unit_of_weights(quantizer, weight.original)
            params.append(weight.original)
        params = [param for param in params if param not in known]
        known.update(params)
        if params:
            groups.append((unit, params))
    return groups


def _unit_of_weights(quantizer: WeightQuantizer, weight: torch.Tensor) -> float:
    scale, _ = quantizer.scale_and_zero_point(weight)
    used = scale.expand_as(weight)[weight != 0]
    share = min(1.0, (2**FULL_BITS - 1) / (2**quantizer.bit_width - 1))
    return share * used.median().item() if len(used) else 0.0
