"""The layers' distance, against a literal loop."""

import pytest
import torch
from torch import nn

from baselines.quantization.batch_norms import with_folded_norms
from baselines.quantization.policy import QuantizationConfig
from baselines.quantization.quantizers import observing, unquantized
from baselines.quantization.student import build_student
from baselines.quantization.tracing import traced
from baselines.training.layers import EVERY, Layers
from tests.baselines import Head, Tiny, fill, images


class Deep(nn.Module):
    """Nine convolutions, one of them without, one after a BatchNorm, and one of no gain."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(9))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(9))
        self.fc = nn.Linear(6, 5)
        fill(self, 0)
        with torch.no_grad():
            self.norms[8].weight[0] = 0  # which the teacher cannot fold

    def forward(self, x):
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv(x) if i == 2 else conv(norm(x)) if i == 5 else norm(conv(x))
            x = x.relu()
        return self.fc(x.mean((2, 3)))


def both(net, fold):
    network = traced(net, (3, 8, 8))
    config = QuantizationConfig(3, 3, ste="clipped", fold_batch_norm=fold, learned_steps=True)
    student = build_student(network, config)
    with torch.no_grad(), observing(student):
        student(images(16))
    return with_folded_norms(network).requires_grad_(False), student


@pytest.mark.parametrize("fold", [True, False])
def test_distance(fold):
    teacher, student = both(Deep(), fold)
    layers, x = Layers(teacher, student), images(16, seed=1)
    assert layers.names == ["convs.7", "convs.4", "convs.1"]  # convs.8 is told apart
    kept = {}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda m, i, o, key=(of, name): kept.__setitem__(key, o)
        )
        for of, network in (("t", teacher), ("s", student)) for name in layers.names
    ]  # fmt: skip
    with layers.collected():
        teacher(images(4, seed=2))  # forgotten
        teacher(x.requires_grad_())
        student(x)
        got = layers.distance()
    terms = []
    for name in layers.names:
        t, s = (kept[of, name].detach().double().transpose(0, 1).flatten(1) for of in "ts")
        errors = [float(((a - b) ** 2).mean()) for a, b in zip(s, t, strict=True)]
        spreads = [float(b.var(correction=0)) for b in t]
        terms.append(sum(errors) / sum(spreads))
    assert got.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert got > 0.01
    got.backward()
    grads = {n: p.grad for n, p in student.named_parameters()}
    assert grads["convs.0.parametrizations.weight.original" if fold else
                 "convs.0.conv.parametrizations.weight.original"].abs().sum() > 0  # fmt: skip
    assert grads["fc.parametrizations.weight.original"] is None
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks for n in (teacher, student) for m in n.modules())
    assert not layers.given


@pytest.mark.parametrize("fold", [True, False])
def test_a_student_that_is_not_rounded_is_at_no_distance(fold):
    teacher, student = both(Deep(), fold)
    layers, x = Layers(teacher, student), images(16, seed=1)
    with layers.collected(), unquantized(student):
        teacher(x)
        student(x)
        assert layers.distance() < 1e-8


def test_a_convolution_that_two_batch_norms_follow_is_not_compared():
    # The student's is one with both of them, the teacher's with the first alone.
    first = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    net = Head(first, norm=nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    teacher, student = both(net, True)
    layers, x = Layers(teacher, student), images(16, seed=1)
    assert layers.names == ["anything.0"]
    with layers.collected(), unquantized(student):
        assert torch.allclose(teacher(x), student(x), atol=1e-5)
        assert layers.distance() < 1e-8


class Pointwise(nn.Module):
    """A layer of one pixel, as a convolution or as a linear one on channels that come last."""

    def __init__(self, linear):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(7, 5)
        self.norm = nn.BatchNorm2d(6)
        self.point = nn.Linear(6, 7) if linear else nn.Conv2d(6, 7, 1)
        fill(self, 0)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        if isinstance(self.point, nn.Linear):
            return self.fc(self.point(x.permute(0, 2, 3, 1)).relu().mean((1, 2)))
        return self.fc(self.point(x).relu().mean((2, 3)))


def test_a_linear_layers_channels_are_its_last_dimension():
    conv, linear = Pointwise(False), Pointwise(True)
    linear.load_state_dict(
        {k: v.flatten(1) if k == "point.weight" else v for k, v in conv.state_dict().items()}
    )
    found, x = [], images(16, seed=1)
    for net in (conv, linear):
        teacher, student = both(net, True)
        layers = Layers(teacher, student)
        assert layers.names[0] == "point"
        with layers.collected():
            teacher(x)
            student(x)
            found.append(layers.distance().item())
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("constant", [0, 0.7, -30])
def test_a_layer_that_gives_a_constant_counts_nothing(constant):
    net = Tiny()
    with torch.no_grad():
        net.bn1.bias.fill_(constant)
        net.bn1.running_mean.zero_()
        net.conv1.weight.zero_()
    teacher, student = both(net, True)
    layers = Layers(teacher, student)
    assert EVERY > 1
    assert layers.names == ["conv1"]
    with layers.collected():
        teacher(images(8))
        with torch.no_grad():
            student.get_submodule("conv1").bias += 1
        student(images(8) * 2)
        distance = layers.distance()
    assert distance == 0
    distance.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
