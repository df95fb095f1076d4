"""Folded teachers against the teachers themselves; joined convolutions against the two layers."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from baselines.quantization.batch_norms import FoldedConv, NormalisedConv, with_folded_norms
from baselines.quantization.tracing import traced
from baselines.training.bn_stats import batch_norm_statistics, normalising_layers
from tests.baselines import Tiny, bits, fill, images


class Block(nn.Module):
    """conv -> BatchNorm, and then ``tail``."""

    def __init__(self, tail, dim=2, *, affine=True, bias=False):
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](3, 6, 3, bias=bias)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim - 1](6, affine=affine)
        self.relu, self.relu_in_place = nn.ReLU(), nn.ReLU6(inplace=True)
        self.tail = tail
        fill(self, 1)

    def forward(self, x):
        return self.tail(self, self.norm(self.conv(x))).flatten(1)


def written_and_read(net, y):
    positive = F.relu(y, inplace=True)
    return positive + y


def read_and_written(net, y):
    return y + net.relu_in_place(y)


FOLDED = {
    "module": lambda net, y: net.relu(y),
    "module in place": lambda net, y: net.relu_in_place(y),
    "function": lambda net, y: F.relu(y),
    "function in place": lambda net, y: F.relu(y, inplace=True),
    "function in place by position": lambda net, y: F.relu6(y, True),
    "sum": lambda net, y: y + 1.0,
    "two readers": lambda net, y: net.relu(y) + y,
    "two readers, by function": lambda net, y: F.relu(y) + y,
    "method in place": lambda net, y: y.relu_(),
    "unknown writer": lambda net, y: y.mul_(2.0),
    "view of it": lambda net, y: F.relu(y.view(y.shape[0], -1), inplace=True),
    "written and read": written_and_read,
    "read and written": read_and_written,
}


def answers(network, x):
    """Logits, BNS, and the gradient of both towards the images."""
    x = x.clone().requires_grad_()
    published, relative = (normalising_layers(network, relative=r) for r in (False, True))
    with batch_norm_statistics(published) as one, batch_norm_statistics(relative) as other:
        logits = network(x)
    loss = one.loss() + other.loss()
    (logits.square().mean() + loss).backward()
    return logits.detach(), loss.detach(), x.grad


def folded_copy(network, x):
    return with_folded_norms(traced(network, tuple(x.shape[1:]), x.dtype))


def assert_same(network, x, **tolerance):
    folded = folded_copy(network, x).requires_grad_(False)
    for got, want in zip(answers(folded, x), answers(network, x), strict=True):
        assert torch.allclose(got, want, **tolerance)
    return sum(isinstance(m, FoldedConv) for m in folded.modules())


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_folded_teacher_gives_logits_statistics_and_gradients(dim, bias, affine):
    net = Block(FOLDED["module"], dim, affine=affine, bias=bias).double()
    x = torch.randn(4, 3, *(6,) * dim, dtype=torch.float64)
    assert assert_same(net, x, rtol=1e-9) == 1


@pytest.mark.parametrize("tail", FOLDED.values(), ids=FOLDED)
def test_whatever_reads_the_batch_norm(tail):
    assert assert_same(Block(tail).double(), images().double(), rtol=1e-9) == 1


@pytest.mark.parametrize(
    ("make", "folded"),
    [
        (lambda: Tiny(), 2),
        (lambda: torchvision.models.resnet18(num_classes=5), 20),
        (lambda: torchvision.models.mobilenet_v2(num_classes=5), 52),
        (lambda: torchvision.models.vgg11_bn(num_classes=5), 8),
        (
            lambda: nn.Sequential(
                nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
            ),
            1,
        ),
    ],
    ids=["tiny", "resnet", "mobilenet", "vgg", "a norm of its own"],
)
def test_networks(make, folded):
    net = fill(make(), 0).double()
    assert assert_same(net, images(4, 32).double(), rtol=1e-7, atol=1e-12) == folded


def test_a_batch_norm_of_two_convolutions_is_left():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            fill(self, 2)

        def forward(self, x):
            x = F.relu(self.norm(self.a(x)))
            return F.relu(self.norm(self.b(x))).flatten(1)

    assert assert_same(Both().double(), images().double(), rtol=1e-9) == 0


@pytest.mark.parametrize(("gain", "shift"), [(0.0, 0.0), (1e-12, 0.0), (-0.003, 1.0)])
def test_a_channel_that_its_shift_drowns_is_left(gain, shift):
    net = Block(FOLDED["module"])
    with torch.no_grad():
        net.norm.weight[2], net.norm.bias[2] = gain, shift
    assert assert_same(net.double(), images().double(), rtol=1e-9) == 0


def test_a_channel_of_small_gain_is_folded_in_single_precision():
    net = Block(FOLDED["module"])
    with torch.no_grad():
        net.norm.weight[2], net.norm.bias[2] = -1e-9, 1e-7
    assert assert_same(net, images(), rtol=2e-4, atol=1e-6) == 1


def test_a_network_in_training_mode_is_folded_as_in_eval_mode():
    net = Tiny()
    want = net(images())
    folded = folded_copy(net.train(), images())
    assert torch.allclose(folded(images()), want, atol=1e-6)
    assert not any(m.training for m in folded.modules())


def test_the_original_is_untouched_and_unshared():
    net = Block(FOLDED["module in place"])
    before = bits(net)
    folded = folded_copy(net, images())
    with torch.no_grad():
        for value in folded.state_dict().values():
            value.add_(1)
    assert bits(net) == before


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_normalised_convolution_has_the_values_and_gradients_of_the_two(dim, bias, affine):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](4, 6, 3, groups=2, padding=1, bias=bias)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim - 1](6, affine=affine)
    pair = fill(nn.Sequential(conv, norm), 3).double().eval()
    x = torch.randn(2, 4, *(5,) * dim, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 6, *(5,) * dim, dtype=torch.float64)
    inputs = [x, *pair.parameters()]
    joined = NormalisedConv(conv, norm)(x)
    assert torch.allclose(joined, pair(x), rtol=1e-10, atol=1e-12)
    got, want = (torch.autograd.grad(y, inputs, cotangent) for y in (joined, pair(x)))
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, rtol=1e-9, atol=1e-11)
