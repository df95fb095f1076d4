"""Tests of baselines. Here: tiny networks, a module bit by bit, losses written out in floats."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.strategies import rng


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Weights and BatchNorm statistics as if trained, from the seed alone; in eval mode."""
    g = rng(seed)
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=g)
        if value.ndim > 1:
            noise /= math.sqrt(value[0].numel())
        elif name.endswith(("weight", "running_var")):
            noise = 0.5 + torch.rand(value.shape, generator=g)
        else:
            noise *= 0.3
        value.copy_(noise)
    return module.eval()


def settle(network: nn.Module, size: int, *, channels: int = 3, shift: float = 0.0) -> nn.Module:
    """BatchNorm statistics of random images for random weights, and lively gains; in eval mode.

    With shifts of 0, deep random networks are chaotic: 0.9 % of noise on the image moves the logits
    of MobileNetV2 by 22 %. With 1, and a last layer whose terms do not cancel, they are as steady
    as trained ones.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.constant_(module.bias, shift)
    with torch.no_grad():
        network.train()(images(32, size, seed=1, channels=channels))
        if shift:
            last = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)][-1]
            last.weight.abs_()
    return network.eval()


class Tiny(nn.Module):
    """A residual classifier, (N, channels, s, s) -> (N, classes)."""

    def __init__(self, seed: int = 0, *, classes: int = 4, channels: int = 3, width: int = 4):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)
        fill(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        x = F.relu(x + self.bn1(self.conv1(x)))
        return self.fc(x.mean((2, 3)))


class Head(nn.Module):
    """anything -> conv -> BatchNorm -> ReLU -> linear."""

    def __init__(self, anything: Any = None, conv: Any = None, norm: Any = None):
        super().__init__()
        self.anything = anything if anything is not None else nn.Identity()
        self.conv = conv if conv is not None else nn.Conv2d(3, 4, 3, padding=1)
        self.norm = norm if norm is not None else nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        fill(self, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.conv(self.anything(x)))).mean((2, 3)))


def images(n: int = 8, size: int = 8, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, size, size, generator=rng(seed))


def raw(tensor: Tensor | None) -> bytes | None:
    if tensor is None:
        return None
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def bits(*modules: nn.Module) -> list[Any]:
    """All that a module is: types, modes, hooks, parameters, flags, gradients, buffers."""
    state: list[Any] = []
    for module in modules:
        for m in module.modules():
            state.append(
                (type(m).__name__, m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            )
        for name, p in module.named_parameters():
            state.append((name, raw(p), p.requires_grad, raw(p.grad)))
        state += [(name, raw(b)) for name, b in module.named_buffers()]
    return state


def weights(*modules: nn.Module) -> list[bytes | None]:
    """The parameters alone."""
    return [raw(p) for module in modules for p in module.parameters()]


def same_state(a: Any, b: Any) -> bool:
    """Equality of nested containers, tensors bit by bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a.dtype, a.shape, raw(a)) == (b.dtype, b.shape, raw(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def probabilities(row: Sequence[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [p / sum(powers) for p in powers]


def entropy_of(row: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities(row) if p > 0)


def cross_entropy_of(rows: Sequence[Sequence[float]], targets: Sequence[Any]) -> float:
    """Mean over the batch; a target is a class or a probability a class."""
    losses = []
    for row, target in zip(rows, targets, strict=True):
        p = probabilities(row)
        if isinstance(target, int):
            target = [float(k == target) for k in range(len(row))]
        losses.append(-sum(t * math.log(q) for t, q in zip(target, p, strict=True) if t))
    return sum(losses) / len(losses)


def kl_of(p_row: Sequence[float], q_row: Sequence[float], temperature: float) -> float:
    """KL(softmax(P / T) || softmax(Q / T))."""
    p = probabilities([x / temperature for x in p_row])
    q = probabilities([x / temperature for x in q_row])
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
