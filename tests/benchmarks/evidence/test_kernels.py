"""The joined kernels compute what the operations do that they stand in for."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from agm import AGM
from baselines import METHODS
from baselines.quantization import quantizers
from baselines.quantization.batch_norms import NormalisedConv
from baselines.quantization.quantizers import WeightQuantizer
from baselines.training import bn_stats
from baselines.training.bn_stats import channel_moments
from baselines.training.generators import UpsampledConv2d
from baselines.training.trainer import Trainer
from tests.baselines import Tiny, fill
from tests.strategies import rng

pytest.importorskip("triton", reason="comes with torch's builds for CUDA")
from benchmarks.evidence.kernels import _taken, fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton interprets, see conftest.py
FORMATS = [torch.contiguous_format, torch.channels_last]


def noise(*shape, seed=0, memory_format=torch.contiguous_format):
    x = 2 * torch.randn(shape, generator=rng(seed))
    return x.to(DEVICE, memory_format=memory_format)


def both_ways(compute, *inputs):
    """What ``compute`` gives, and its gradients, plain and joined."""
    found = []
    for kernels in (nullcontext(), fused()):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        with kernels:
            outputs = compute(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = sum((noise(*y.shape, seed=i) * y).sum() for i, y in enumerate(outputs))
            loss.backward()
        found.append([*(y.detach() for y in outputs), *(x.grad for x in leaves)])
    return zip(*found, strict=True)


def test_what_the_kernels_take():
    for memory_format in FORMATS:
        x = noise(4, 5, 6, 6, memory_format=memory_format)
        assert _taken(x)
        assert not any(map(_taken, (x.double(), x.mT, x[..., ::2], x.transpose(0, 1))))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("ste", ["identity", "clipped"])
def test_activations(memory_format, positive, ste):
    x = noise(4, 5, 6, 6, memory_format=memory_format)
    x, zero_point = (x.abs(), 0) if positive else (x, 3)
    x[0, 0, 0] = torch.tensor([0.5, 1.5, 2.5, 6.5, 7.5, 100.0]) * 0.37  # ties, and outside

    def compute(x, scale):
        quantizer = {"ste": ste, "nonnegative": positive}
        return quantizers.fake_quantize(x, scale, zero_point, 0, 7, **quantizer)

    scale = torch.tensor(0.37, device=DEVICE)
    if ste == "identity":
        pairs = both_ways(lambda x: compute(x, scale), x)
    else:
        pairs = both_ways(compute, x, scale)
    for i, (plain, joined) in enumerate(pairs):
        if i < 2:
            assert torch.equal(joined, plain)
        torch.testing.assert_close(joined, plain, rtol=1e-5, atol=1e-4)


def test_what_is_not_a_number_stays_so():
    x, scale = (
        torch.tensor([1.0, torch.nan, torch.inf], device=DEVICE),
        torch.ones((), device=DEVICE),
    )
    with fused():
        quantized = quantizers.fake_quantize(x, scale, 0, 0, 7, ste="clipped")
    assert quantized.tolist() == pytest.approx([1, torch.nan, 7], nan_ok=True)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (5, 7, 3, 3), (6, 2, 5), (10, 64)])
def test_weights(shape, bits):
    for memory_format in FORMATS[: 1 + (len(shape) == 4)]:
        w = noise(*shape, memory_format=memory_format)
        w[0], w[1], w[2] = 0, w[1].abs(), -w[2].abs()
        for plain, joined in both_ways(WeightQuantizer(bits, "asymmetric"), w):
            # On a GPU, torch divides by a number by multiplying with its reciprocal.
            torch.testing.assert_close(joined, plain, rtol=1e-6 * (DEVICE == "cuda"), atol=0)


@pytest.mark.parametrize("scheme", [("symmetric",), ("asymmetric", 2)])
def test_other_weights_are_quantized_as_before(scheme):
    for plain, joined in both_ways(WeightQuantizer(3, *scheme), noise(4, 6, 3, 3)):
        assert torch.equal(joined, plain)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("bias", "affine"), [(False, True), (True, True), (False, False)])
def test_a_convolution_with_its_norm(memory_format, bias, affine):
    conv = nn.Conv2d(5, 7, 3, padding=1, bias=bias)
    network = fill(NormalisedConv(conv, nn.BatchNorm2d(7, affine=affine)), seed=1)
    network = network.to(DEVICE, memory_format=memory_format)
    names = [name for name, _ in network.named_parameters()]

    def compute(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(network, given, (x,))

    x = noise(2, 5, 6, 6, memory_format=memory_format)
    for plain, joined in both_ways(compute, x, *network.parameters()):
        torch.testing.assert_close(
            joined, plain, rtol=1e-2 if DEVICE == "cuda" else 1e-4, atol=1e-3
        )


@pytest.mark.parametrize("shape", [(4, 5, 6, 6), (4, 5, 7), (9, 5)])
def test_moments(shape):
    for memory_format in FORMATS[: 1 + (len(shape) == 4)]:
        x = noise(*shape, memory_format=memory_format) + 1
        for plain, joined in both_ways(channel_moments, x):
            torch.testing.assert_close(joined, plain, rtol=1e-4, atol=1e-4)


def test_upsampling():
    layer = fill(UpsampledConv2d(6, 4, 3, padding=1), seed=2).to(DEVICE)

    def compute(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    x, parameters = noise(2, 6, 5, 5), layer.parameters()
    for plain, joined in both_ways(compute, x, *parameters):
        torch.testing.assert_close(
            joined, plain, rtol=1e-2 if DEVICE == "cuda" else 1e-4, atol=1e-2
        )


def test_all_is_as_before_outside():
    def now():
        moments = vars(bn_stats._ChannelMoments).get("apply")
        return WeightQuantizer._quantized, NormalisedConv.forward, quantizers.fake_quantize, moments

    before = now()
    with fused():
        assert all(a is not b for a, b in zip(now(), before, strict=True))
    assert now() == before


@pytest.mark.parametrize("recipe", ["quick", "paper"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_step(method, recipe):
    losses, plan = getattr(METHODS[method], recipe)(8)
    plan = replace(plan, steps=8, batch_size=6, warmup=0.25, observe=0.125)
    runs = []
    for kernels in (nullcontext(), fused()):
        with kernels:
            trainer = Trainer(
                Tiny(), method=losses, recipe=plan, config=plan.config(3, 3),
                image_shape=(3, 8, 8), hooks=[AGM()], device=DEVICE, precision="fp32",
            )  # fmt: skip
            runs.append([{k: v.item() for k, v in trainer.step().items()} for _ in range(5)])
    for plain, joined in zip(*runs, strict=True):
        assert joined == pytest.approx(plain, rel=1e-3, abs=1e-4)
