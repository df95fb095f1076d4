"""Hypothesis strategies for quantizers and losses."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import log_uniform, rng, seeds

bit_widths = st.integers(2, 8)
schemes = st.sampled_from(["asymmetric", "symmetric"])
estimators = st.sampled_from(["max", "percentile", "mse"])
KINDS = ("signed", "positive", "negative", "constant", "shifted", "zero")


@st.composite
def channels(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, min_size: int = 1) -> Tensor:
    """Weights (C, K), float64; channels of all kinds and magnitudes."""
    g, k = rng(draw(seeds)), draw(st.integers(1, 12))
    rows = []
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=min_size, max_size=5)):
        row = draw(log_uniform(-6, 6)) * torch.randn(k, generator=g, dtype=torch.float64)
        rows.append(
            {
                "signed": row,
                "positive": row.abs(),
                "negative": -row.abs(),
                "constant": row[:1].expand(k),
                "shifted": row + 10 * row.abs().max(),
                "zero": 0 * row,
            }[kind]
        )
    return torch.stack(rows)


@st.composite
def grids(
    draw: st.DrawFn, n: int = 1
) -> tuple[Tensor, np.ndarray, Tensor, Tensor, tuple[int, int]]:
    """(x (n, K), q (n, K), scale (n,), zero_point (n,), (qmin, qmax)), float32.

    x lies around scale * (q - zero_point), at most 0.45 steps away; q may lie outside the range.
    """
    top = 2 ** draw(bit_widths) - 1
    qmin, qmax = draw(st.sampled_from([(0, top), (-(top // 2), top // 2)]))
    zeros = [draw(st.integers(qmin, qmax)) for _ in range(n)]
    scale = torch.tensor([draw(log_uniform(-4, 4)) for _ in range(n)])
    g = np.random.default_rng(draw(seeds))
    q = g.integers(qmin - top, qmax + top, size=(n, 16), endpoint=True)
    steps = q - np.array(zeros)[:, None] + g.uniform(-0.45, 0.45, size=q.shape)
    x = torch.from_numpy(steps * scale.double().numpy()[:, None]).float()
    return x, q, scale, torch.tensor(zeros, dtype=torch.float32), (qmin, qmax)


@st.composite
def activations(draw: st.DrawFn, max_batches: int = 1) -> list[Tensor]:
    """Batches after a ReLU, float32: half of the values are 0, or all of them."""
    g = rng(draw(seeds))
    factors = st.just(0.0) | log_uniform(-4, 4)
    return [
        draw(factors) * torch.randn(2, 3, 4, generator=g).relu()
        for _ in range(draw(st.integers(1, max_batches)))
    ]


@st.composite
def logit_batches(draw: st.DrawFn, max_scale: float = 30) -> Tensor:
    """(N, C) float32, from flat to one-hot, C >= 2."""
    n, c = draw(st.integers(1, 6)), draw(st.integers(2, 12))
    scale = draw(st.just(0.0) | st.floats(1e-3, max_scale))
    return scale * torch.randn(n, c, generator=rng(draw(seeds)))
