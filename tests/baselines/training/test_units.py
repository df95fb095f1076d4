"""Rates in steps of quantization."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given

from baselines.methods import gdfq
from baselines.quantization.policy import QuantizationConfig
from baselines.quantization.quantizers import quantizers
from baselines.quantization.student import build_student
from baselines.quantization.tracing import traced
from baselines.training.units import in_units
from tests.baselines import Tiny
from tests.baselines.strategies import bit_widths
from tests.baselines.training.test_layers import Deep
from tests.baselines.training.test_trainer import make, train
from tests.strategies import log_uniform


def student(net, weight_bits=3, act_bits=3, **config):
    given = {"learned_steps": True, "ste": "clipped", "fold_batch_norm": True, **config}
    return build_student(traced(net, (3, 8, 8)), QuantizationConfig(weight_bits, act_bits, **given))


def units(net):
    return {id(param): unit for unit, params in in_units(net) for param in params}


@pytest.mark.parametrize("net", [Tiny, Deep])
@pytest.mark.parametrize("fold", [True, False])
def test_every_parameter_once(net, fold):
    net = student(net(), fold_batch_norm=fold)
    held = [param for _, params in in_units(net) for param in params]
    assert len(held) == len(set(held))
    assert set(held) == set(net.parameters())


@given(bit_widths, bit_widths, log_uniform(-6, 6))
def test_units_are_steps(weight_bits, act_bits, factor):
    net = Tiny()
    with torch.no_grad():
        net.conv1.weight *= factor
        net.conv1.weight[0] = 0  # which has no step
    made = student(net, weight_bits, act_bits, fold_batch_norm=False)
    conv = made.conv1.conv
    quantizer, weight = conv.parametrizations.weight[0], conv.parametrizations.weight.original
    scale, _ = quantizer.scale_and_zero_point(weight)
    levels = quantizer(weight.detach()) / scale
    assert (levels - levels.round()).abs().max() < 1e-3
    scales = sorted(scale.flatten()[1:].tolist())
    unit = units(made)[id(weight)]
    if weight_bits > 4:
        unit *= (2**weight_bits - 1) / 15
    slack = 1 + 1e-6
    assert scales[0] <= unit * slack
    assert unit <= scales[-1] * slack
    assert sum(scale <= unit * slack for scale in scales) >= len(scales) / 2
    assert sum(scale * slack >= unit for scale in scales) >= len(scales) / 2
    for quantizer in quantizers(made):
        if hasattr(quantizer, "log_gain"):
            assert units(made)[id(quantizer.log_gain)] == 1 / (2**quantizer.bit_width - 1)
    assert units(made)[id(made.conv1.norm.weight)] == 1 / (2**act_bits - 1)


def test_a_layer_of_zeros_has_no_rate():
    net = Tiny()
    torch.nn.init.zeros_(net.fc.weight)
    made = student(net)
    assert units(made)[id(made.fc.parametrizations.weight.original)] == 0


@pytest.mark.parametrize("weight_bits", [2, 5, 8])
def test_the_first_update_of_adam_is_the_rate_times_the_unit(weight_bits):
    trainer = make(
        student_optimizer="adam", student_lr=0.01, schedule="constant",
        config={"weight_bits": weight_bits, "ste": "clipped", "learned_steps": True},
    )  # fmt: skip
    train(trainer, trainer.recipe.warmup_steps)
    expected = units(trainer.student)
    before = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
    train(trainer, 1)
    moved = 0
    for name, param in trainer.student.named_parameters():
        most = (param - before[name]).abs().max().item()
        if param.grad.abs().max() > 1e-5:  # against Adam's eps of 1e-8
            assert most == pytest.approx(0.01 * expected[id(param)], rel=0.02), name
            moved += 1
    assert moved > 4


def test_published_rates_are_as_they_are():
    net = student(Tiny())
    _, sgd = gdfq.paper(32)[1].optimizers(net, net)
    assert [group["lr"] for group in sgd.param_groups] == [1e-4]
    plan = replace(gdfq.paper(32)[1], student_optimizer="adam")
    _, adam = plan.optimizers(net, net)
    assert {group["lr"] for group in adam.param_groups} == {1e-4 * u for u, _ in in_units(net)}
