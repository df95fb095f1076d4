"""Tests of agm. Here: the oracles, written out sample by sample, and the tiny networks."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mpmath
import torch
from mpmath import mpf
from torch import Tensor, nn

mpmath.mp.dps = 50  # near z = -40 the textbook form cancels three digits


def margin(d: float, mean: float, std: float) -> mpf:
    """E[max(0, m - d)], m ~ N(mean, std^2), by the textbook form."""
    excess = mpf(mean) - mpf(d)
    if std == 0:
        return max(excess, mpf(0))
    z = excess / mpf(std)
    return mpf(std) * (mpmath.npdf(z) + z * mpmath.ncdf(z))


def margin_variance(d: float, mean: float, std: float) -> mpf:
    """Var[max(0, m - d)], m ~ N(mean, std^2), std > 0."""
    z = (mpf(mean) - mpf(d)) / mpf(std)
    square = mpf(std) ** 2 * ((1 + z**2) * mpmath.ncdf(z) + z * mpmath.npdf(z))
    return square - margin(d, mean, std) ** 2


def _log_softmax(row: Sequence[float]) -> list[float]:
    top = max(row)
    log_sum = math.log(sum(math.exp(x - top) for x in row))
    return [(x - top) - log_sum for x in row]  # in this order: top + log_sum would lose digits


def _kl(log_p: Sequence[float], log_q: Sequence[float]) -> float:
    return sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def _l1(t: Sequence[float], s: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(t, s, strict=True)) / len(t)


def _l2(t: Sequence[float], s: Sequence[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(t, s, strict=True)) / len(t))


def _js(t: Sequence[float], s: Sequence[float]) -> float:
    log_p, log_q = _log_softmax(t), _log_softmax(s)
    log_m = []
    for a, b in zip(log_p, log_q, strict=True):
        top = max(a, b)
        log_m.append(top + math.log((math.exp(a - top) + math.exp(b - top)) / 2))
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def _tv(t: Sequence[float], s: Sequence[float]) -> float:
    pairs = zip(_log_softmax(t), _log_softmax(s), strict=True)
    return sum(abs(math.exp(a) - math.exp(b)) for a, b in pairs) / 2


LOOPS: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "logit_l1": _l1,
    "logit_l2": _l2,
    "kl_divergence": lambda t, s: _kl(_log_softmax(t), _log_softmax(s)),
    "js_divergence": _js,
    "total_variation": _tv,
}


def discrepancy_loop(name: str, teacher: Tensor, student: Tensor) -> Tensor:
    """One discrepancy a sample, in float64."""
    rows = zip(teacher.double().tolist(), student.double().tolist(), strict=True)
    return torch.tensor([LOOPS[name](t, s) for t, s in rows], dtype=torch.float64)


def values(
    oracle: Callable[..., mpf], d: Tensor, mean: Tensor | float, std: Tensor | float
) -> Tensor:
    """``oracle`` at every d, rounded to float64."""
    return torch.tensor(
        [float(oracle(x, float(mean), float(std))) for x in d.tolist()], dtype=torch.float64
    )


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def logit_error(*logits: Tensor) -> float:
    """Absolute error of a softmax-based discrepancy: a log-probability is a difference of numbers
    as large as the logits, half an eps each, and probabilities sum to 1; 16 of them to be safe."""
    return 16 * eps(logits[0].dtype) * (1 + max(float(x.abs().max()) for x in logits))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and value, NaN equal to NaN."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and (torch.equal(a.nan_to_num(), b.nan_to_num()))
    )


def bits(*modules: nn.Module) -> list:
    """All that a module is: parameters, flags, gradients, buffers, modes."""
    state = []
    for module in modules:
        for p in module.parameters():
            grad = None if p.grad is None else p.grad.numpy().tobytes()
            state.append((p.detach().numpy().tobytes(), p.requires_grad, grad))
        state += [b.numpy().tobytes() for b in module.buffers()]
        state += [m.training for m in module.modules()]
    return state


def classifier(seed: int = 0, classes: int = 3) -> nn.Sequential:
    """A convolution with BatchNorm and a linear layer, (N, 3, H, W) -> (N, classes)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, classes),
    ).eval()


def image_generator(seed: int = 1, latent: int = 5) -> nn.Sequential:
    """(N, latent) -> (N, 3, 4, 4), in training mode."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(latent, 48), nn.Unflatten(1, (3, 4, 4)), nn.BatchNorm2d(3), nn.Tanh()
    )


@contextmanager
def elsewhere() -> Iterator[None]:
    """Another default dtype and default device, where new tensors have no values at all."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)
