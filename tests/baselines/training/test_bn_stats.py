"""The BatchNorm-statistics loss against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from agm import AgmError
from baselines.errors import UnsupportedLayerError
from baselines.training.bn_stats import batch_norm_statistics, normalising_layers
from tests.baselines import Tiny, bits, fill, images
from tests.strategies import rng, seeds


def net(seed=0):
    """Convolution and linear layers of one pixel, so that numpy can follow."""
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5, affine=False)]
    layers += [nn.Flatten(), nn.Linear(20, 4), nn.BatchNorm1d(4)]
    return fill(nn.Sequential(*layers), seed).double()


def normalise(x, norm):
    mean, var = norm.running_mean.numpy(), norm.running_var.numpy()
    gain = 1 if norm.weight is None else norm.weight.detach().numpy()
    shift = 0 if norm.bias is None else norm.bias.detach().numpy()
    return (x - mean) / np.sqrt(var + norm.eps) * gain + shift


def distance(rows, norm, relative=False):
    """(samples, channels): squared errors of mean and biased variance, channel by channel."""
    unit = norm.running_var.mean().item() + norm.eps if relative else 1
    mean_errors, variance_errors = [], []
    for c in range(rows.shape[1]):
        values = rows[:, c]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        mean_errors.append((mean - norm.running_mean[c].item()) ** 2 / unit)
        variance_errors.append((variance - norm.running_var[c].item()) ** 2 / unit**2)
    return np.mean(mean_errors) + np.mean(variance_errors)


def oracle(network, x, relative):
    norm0, conv, norm1, _, linear, norm2 = network
    n = len(x)
    pixels = x.numpy().transpose(0, 2, 3, 1).reshape(-1, 3)
    losses = [distance(pixels, norm0, relative)]
    pixels = normalise(pixels, norm0) @ conv.weight.detach().numpy()[:, :, 0, 0].T
    pixels += conv.bias.detach().numpy()
    losses.append(distance(pixels, norm1, relative))
    features = normalise(pixels, norm1).reshape(n, 4, 5).transpose(0, 2, 1).reshape(n, 20)
    features = features @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
    losses.append(distance(features, norm2, relative))
    return np.mean(losses)


@given(seeds, st.integers(1, 4), st.booleans())
def test_as_numpy(seed, n, relative):
    network = net(seed % 97)
    x = torch.randn(n, 3, 2, 2, generator=rng(seed), dtype=torch.float64)
    layers = normalising_layers(network, relative=relative)
    with batch_norm_statistics(layers) as statistics:
        logits = network(x)
    assert statistics.loss().item() == pytest.approx(oracle(network, x, relative), rel=1e-12)
    assert torch.equal(logits, network(x))


@given(seeds, st.floats(0.1, 10))
def test_relative_to_the_layer_is_the_same_in_any_unit(seed, factor):
    norm, other = fill(nn.BatchNorm2d(3, eps=0), 1).eval(), nn.BatchNorm2d(3, eps=0).eval()
    other.running_mean.copy_(norm.running_mean * factor)
    other.running_var.copy_(norm.running_var * factor**2)
    x, losses = torch.randn(4, 3, 2, 2, generator=rng(seed)), {}
    for relative in (True, False):
        for net, given_x in ((norm, x), (other, x * factor)):
            with batch_norm_statistics(normalising_layers(net, relative=relative)) as statistics:
                net(given_x)
            losses.setdefault(relative, []).append(statistics.loss().item())
    assert losses[True][0] == pytest.approx(losses[True][1], rel=1e-4)
    if abs(factor - 1) > 0.1:
        assert losses[False][0] != pytest.approx(losses[False][1], rel=0.05)


def test_zero_for_the_statistics_themselves():
    x = images(4, 6)
    norm = nn.BatchNorm2d(3)
    norm.running_mean = x.mean((0, 2, 3))
    norm.running_var = x.var((0, 2, 3), correction=0)
    with batch_norm_statistics(normalising_layers(norm.eval())) as statistics:
        norm(x)
    assert statistics.loss().item() == pytest.approx(0, abs=1e-12)


def test_gradient():
    network = net()

    def loss(x):
        with batch_norm_statistics(normalising_layers(network)) as statistics:
            network(x)
        return statistics.loss()

    x = torch.randn(3, 3, 2, 2, generator=rng(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, x)


def test_bfloat16_statistics_are_summed_in_float32():
    x = (3.3 + images(64, 8)).bfloat16()
    norm = nn.BatchNorm2d(3).eval()
    with batch_norm_statistics(normalising_layers(norm)) as statistics:
        norm(x)
    assert statistics.loss().dtype == torch.float32
    wide = x.double().transpose(0, 1).flatten(1)
    want = (wide.mean(1) ** 2).mean() + ((wide.var(1, correction=0) - 1) ** 2).mean()
    assert statistics.loss().item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays(fails):
    teacher = Tiny()
    before = bits(teacher)
    try:
        with batch_norm_statistics(normalising_layers(teacher)) as statistics:
            teacher(images())
            inside = bits(teacher)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert inside != before
    assert bits(teacher) == before
    loss = statistics.loss()
    teacher(images(seed=1))
    assert torch.equal(statistics.loss(), loss)


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(3, track_running_stats=False)])
def test_without_statistics(norm):
    teacher = nn.Sequential(norm, nn.Conv2d(3, 2, 1))
    with pytest.raises(UnsupportedLayerError, match="the network has no BatchNorm") as caught:
        normalising_layers(teacher)
    assert isinstance(caught.value, AgmError)


def test_statistics_that_are_kept_count_whatever_the_flag_says():
    norm, without = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    norm.track_running_stats = False  # they are there, and normalise in eval mode
    without.running_mean = without.running_var = None
    (layer,) = normalising_layers(nn.Sequential(norm, nn.Conv2d(3, 3, 1), without))
    assert layer.module is norm


def test_batch_norms_that_never_run():
    teacher = nn.Conv2d(3, 2, 1)
    teacher.auxiliary = nn.BatchNorm2d(2)
    with batch_norm_statistics(normalising_layers(teacher)) as statistics:
        teacher(images())
    with pytest.raises(UnsupportedLayerError, match="BatchNorm"):
        statistics.loss()
