"""Shifted images, against numpy."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.training.shifted import draw_shift, shifted
from tests.baselines import images
from tests.strategies import rng, seeds


@given(st.integers(1, 5), st.sampled_from([4, 8, 12, 32]), seeds)
def test_shifts(n, size, seed):
    x = images(n, size=size, seed=seed % 100)
    rows, columns = draw_shift(size, rng(seed))
    most = size // 8
    assert max(abs(rows), abs(columns)) <= most
    wide = np.pad(x.numpy(), ((0, 0), (0, 0), (most, most), (most, most)), mode="reflect")
    top, left = most + rows, most + columns
    want = wide[..., top : top + size, left : left + size]
    assert (shifted(x, rows, columns).numpy() == want).all()


def test_all_shifts_are_drawn():
    drawn = [draw_shift(16, rng(seed)) for seed in range(200)]
    assert {rows for rows, _ in drawn} == {columns for _, columns in drawn} == {*range(-2, 3)}


def test_the_gradient_goes_where_the_pixels_came_from():
    x = images(2, size=8).requires_grad_()
    upstream = torch.zeros(2, 3, 8, 8)
    upstream[0, 1, 2, 3] = upstream[1, 1, 2, 3] = 1
    shifted(x, 1, -1).backward(upstream)
    assert x.grad.nonzero().tolist() == [[0, 1, 3, 2], [1, 1, 3, 2]]
