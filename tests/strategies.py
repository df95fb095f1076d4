"""Hypothesis strategies. Scalars are drawn as floats; tensors from a drawn seed and shape."""

import torch
from hypothesis import strategies as st
from torch import Tensor

FULL = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)

seeds = st.integers(0, 2**31 - 1)
full_dtypes = st.sampled_from(FULL)
half_dtypes = st.sampled_from(HALF)
dtypes = st.sampled_from(FULL + HALF)
unit = st.floats(0, 1)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    """10 ** U(low, high)."""
    return st.floats(low, high).map(lambda x: 10.0**x)


def stds(low: float = -4, high: float = 4) -> st.SearchStrategy[float]:
    return log_uniform(low, high)


means = st.floats(-1e3, 1e3)


@st.composite
def margins(
    draw: st.DrawFn, dtype: torch.dtype = torch.float64, low: float = -40, high: float = 40
) -> tuple[Tensor, Tensor, Tensor]:
    """(discrepancies (N,), mean (), std ()), z = (mean - d) / std in about [low, high]."""
    zs = draw(st.lists(st.floats(low, high), min_size=1, max_size=9))
    mean, std = draw(means), draw(stds())
    d = mean - std * torch.tensor(zs, dtype=torch.float64)
    return d.to(dtype), torch.tensor(mean, dtype=dtype), torch.tensor(std, dtype=dtype)


@st.composite
def logit_pairs(
    draw: st.DrawFn, dtype: torch.dtype = torch.float64, max_scale: float = 100
) -> tuple[Tensor, Tensor]:
    """(teacher, student) logits (N, C): from nearly equal to unrelated, flat to one-hot."""
    n, c = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    g = rng(draw(seeds))
    scale, gap = draw(st.floats(1e-3, max_scale)), draw(log_uniform(-6, 1))
    teacher = scale * torch.randn(n, c, generator=g, dtype=torch.float64)
    student = teacher + scale * gap * torch.randn(n, c, generator=g, dtype=torch.float64)
    return teacher.to(dtype), student.to(dtype)


@st.composite
def image_batches(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, ...) with N from 1 to 7 and up to three more dimensions, values up to some 1e3."""
    shape = draw(st.lists(st.integers(1, 4), max_size=3))
    g, n = rng(draw(seeds)), draw(st.integers(1, 7))
    images = torch.randn(n, *shape, generator=g, dtype=torch.float64)
    return (draw(log_uniform(-3, 2.5)) * images).to(dtype)


@st.composite
def mixtures(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(images (N, ...), permutation (N,), weights (N,)), the ends 0 and 1 among the weights."""
    images = draw(image_batches(dtype))
    n = len(images)
    permutation = torch.tensor(draw(st.permutations(range(n))))
    weights = draw(st.lists(st.sampled_from([0.0, 1.0]) | unit, min_size=n, max_size=n))
    return images, permutation, torch.tensor(weights, dtype=torch.float64).to(dtype)
