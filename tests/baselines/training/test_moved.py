"""Mirrored and shifted images, against numpy."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.training.moved import draw_moves, moved
from tests.baselines import images
from tests.strategies import rng, seeds


@given(st.integers(1, 5), st.sampled_from([4, 8, 12, 32]), seeds)
def test_moves(n, size, seed):
    x = images(n, size=size, seed=seed % 100)
    moves = draw_moves(n, size, rng(seed))
    mirror, rows, columns = moves
    most = size // 8
    assert max(abs(rows), abs(columns)) <= most
    got = moved(x, moves).numpy()
    for image, flag, out in zip(x.numpy(), mirror.tolist(), got, strict=True):
        image = image[..., ::-1] if flag else image
        wide = np.pad(image, ((0, 0), (most, most), (most, most)), mode="reflect")
        top, left = most + rows, most + columns
        assert (out == wide[:, top : top + size, left : left + size]).all()


def test_all_moves_are_drawn():
    drawn = [draw_moves(8, 16, rng(seed)) for seed in range(200)]
    assert {rows for _, rows, _ in drawn} == {columns for *_, columns in drawn} == {*range(-2, 3)}
    share = torch.stack([mirror for mirror, *_ in drawn]).float().mean()
    assert 0.45 < share < 0.55


def test_the_gradient_goes_where_the_pixels_came_from():
    x = images(2, size=8).requires_grad_()
    upstream = torch.zeros(2, 3, 8, 8)
    upstream[0, 1, 2, 3] = upstream[1, 1, 2, 3] = 1
    moved(x, (torch.tensor([True, False]), 1, -1)).backward(upstream)
    assert x.grad.nonzero().tolist() == [[0, 1, 3, 5], [1, 1, 3, 2]]
