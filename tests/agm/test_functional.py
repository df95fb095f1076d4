"""agm.functional against mpmath and literal loops."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mpf
from torch import Tensor

from agm import AgmError, functional
from agm.functional import (
    DISCREPANCIES,
    expected_margin,
    interpolate,
    margin_and_slope,
    regions,
    sampled_margin,
)
from tests.agm import (
    LOOPS,
    discrepancy_loop,
    eps,
    logit_error,
    margin,
    margin_variance,
    same_bits,
    values,
)
from tests.strategies import (
    FULL,
    HALF,
    dtypes,
    full_dtypes,
    half_dtypes,
    logit_pairs,
    margins,
    means,
    mixtures,
    rng,
    seeds,
    stds,
    unit,
)

SOFTMAX = ("kl_divergence", "js_divergence", "total_variation")
SYMMETRIC = ("logit_l1", "logit_l2", "js_divergence", "total_variation")
BOUND = {"js_divergence": math.log(2), "total_variation": 1.0}

names = st.sampled_from(sorted(LOOPS))


def derivatives(d: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    """d E / d (d, mean, std), one a sample."""
    inputs = [x.expand_as(d).clone().requires_grad_() for x in (d, mean, std)]
    return torch.autograd.grad(expected_margin(*inputs).sum(), inputs)


def gate(d: float, mean: float, std: float) -> mpf:
    return mpmath.ncdf((mpf(mean) - mpf(d)) / mpf(std))


def density(d: float, mean: float, std: float) -> mpf:
    return mpmath.npdf((mpf(mean) - mpf(d)) / mpf(std))


# Gaussian margin, in expectation


@pytest.mark.parametrize("dtype", FULL)
@given(data=st.data())
def test_expected_margin_is_mpmath(dtype, data):
    d, mean, std = data.draw(margins(dtype))
    got, want = expected_margin(d, mean, std), values(margin, d, mean, std)
    assert got.dtype == dtype
    # Tail: density < 0.4 with some 4 roundings in it, times std. Hinge: two roundings of a value.
    assert ((got - want).abs() <= eps(dtype) * (4 * float(std) + 2 * want)).all()
    assert (got >= 0).all()


@pytest.mark.parametrize("dtype", FULL)
@given(data=st.data())
def test_far_tail_keeps_relative_precision(dtype, data):
    d, mean, std = data.draw(margins(dtype, low=-12, high=0))
    got, want = expected_margin(d, mean, std), values(margin, d, mean, std)
    # Two ill-conditioned steps: exp(-z^2 / 2) magnifies z's relative error by z^2, and
    # 1 - z * mills is off by an eps, against a value of 1 / (2 + z^2).
    z = (float(mean) - d.double()) / float(std)
    error = 8 * eps(dtype) * (2 + z * z)
    assert ((got - want).abs() <= error * want).all()
    phi = values(gate, d, mean, std)
    assert ((-derivatives(d, mean, std)[0].double() - phi).abs() <= error * phi).all()


@given(margins(), st.floats(0, 1e3))
def test_non_increasing_in_d(triple, step):
    d, mean, std = triple
    error = 8 * eps(d.dtype) * (std + (mean - d).abs() + step)  # of either value
    assert (expected_margin(d + step, mean, std) <= expected_margin(d, mean, std) + error).all()


@given(margins(), st.floats(0, 1e3), unit)
def test_convex_in_d(triple, step, t):
    a, mean, std = triple
    b = a + step
    low, middle, high = (expected_margin(x, mean, std) for x in (a, (1 - t) * a + t * b, b))
    # Slope in [-1, 0]: an abscissa's rounding moves a value by no more than itself.
    error = 8 * eps(a.dtype) * (std + mean.abs() + a.abs() + b.abs())
    assert (middle <= (1 - t) * low + t * high + error).all()


@pytest.mark.parametrize("dtype", FULL)
@given(data=st.data())
def test_gradient_is_minus_phi(dtype, data):
    triple = data.draw(margins(dtype))
    by_d, by_mean, by_std = derivatives(*triple)
    phi = values(gate, *triple)
    # z carries two roundings, and z * density(z) < 0.25, z^2 * density(z) < 0.3.
    assert torch.allclose(by_d.double(), -phi, rtol=0, atol=4 * eps(dtype))
    assert torch.allclose(by_mean.double(), phi, rtol=0, atol=4 * eps(dtype))
    assert torch.allclose(by_std.double(), values(density, *triple), rtol=0, atol=4 * eps(dtype))
    assert (by_d <= 0).all()
    assert (by_d >= -1).all()


@pytest.mark.parametrize("dtype", FULL)
@given(data=st.data())
def test_margin_and_slope_are_the_margin_and_its_derivative(dtype, data):
    d, mean, std = data.draw(margins(dtype))
    d = d.clone().requires_grad_()
    got, slope = margin_and_slope(d, mean, std)
    (by_d,) = torch.autograd.grad(got.sum(), d)
    phi = values(gate, d.detach(), mean, std)
    assert torch.allclose(slope.double(), phi, rtol=0, atol=4 * eps(dtype))
    assert same_bits(by_d, -slope.expand_as(d))
    error = 8 * eps(dtype) * (std + mean.abs() + d.detach().abs())
    assert ((got - expected_margin(d, mean, std)).abs() <= error).all()


def test_margin_and_slope_of_an_infinite_discrepancy():
    d = torch.tensor([torch.inf, 0.5], requires_grad=True)
    got, slope = margin_and_slope(d, torch.tensor(0.5), torch.tensor(0.25))
    got.sum().backward()
    assert got[0] == slope[0] == d.grad[0] == 0


@given(means, stds(), full_dtypes)
def test_gradient_is_a_half_at_the_mean(mean, std, dtype):
    mean, std = torch.tensor([mean], dtype=dtype), torch.tensor([std], dtype=dtype)
    by_d, by_mean, by_std = derivatives(mean, mean, std)
    assert (by_d.item(), by_mean.item()) == (-0.5, 0.5)
    assert by_std.item() == pytest.approx(1 / math.sqrt(2 * math.pi), rel=4 * eps(dtype))


@given(margins(), st.sets(st.integers(0, 2), min_size=1))
def test_gradient_of_some_arguments_is_as_among_all(triple, chosen):
    want = derivatives(*triple)
    leaves = [
        v.expand_as(triple[0]).clone().requires_grad_(i in chosen) for i, v in enumerate(triple)
    ]
    expected_margin(*leaves).sum().backward()
    for i, leaf in enumerate(leaves):
        assert same_bits(leaf.grad, want[i]) if i in chosen else leaf.grad is None


@given(margins())
def test_between_the_hinge_and_the_hinge_plus_04_std(triple):
    d, mean, std = triple
    hinge, got = (mean - d).clamp(min=0), expected_margin(d, mean, std)
    rounding = 2 * eps(d.dtype) * (hinge + std)
    assert (got >= hinge - rounding).all()  # Jensen
    assert (got <= hinge + std / math.sqrt(2 * math.pi) + rounding).all()


@given(margins(), dtypes)
def test_zero_std_is_the_hinge(triple, dtype):
    d, mean, _ = (x.to(dtype) for x in triple)
    d = torch.cat([d, mean[None]])
    wide = torch.promote_types(dtype, torch.float32)
    want = np.maximum(mean.to(wide).numpy() - d.to(wide).numpy(), 0)
    got = expected_margin(d, mean, 0.0)
    assert same_bits(got, torch.from_numpy(want).to(dtype))
    by_d, by_mean, by_std = derivatives(d, mean, torch.zeros((), dtype=dtype))
    sign = np.sign(mean.to(wide).numpy() - d.to(wide).numpy())
    assert by_d.tolist() == (-(sign + 1) / 2).tolist()
    assert by_mean.tolist() == ((sign + 1) / 2).tolist()
    assert by_std.isfinite().all()


@pytest.mark.parametrize("dtype", FULL)
def test_a_vanishing_std_is_the_hinge(dtype):
    d = torch.tensor([0.0, 0.25, 0.5, 0.75, 3.0], dtype=dtype)
    for std in (torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal / 8, 1e-30):
        got = expected_margin(d, 0.5, std)
        assert torch.allclose(got, (0.5 - d).clamp(min=0), rtol=0, atol=std)
        assert derivatives(d, d.new_tensor(0.5), d.new_tensor(std))[0].tolist() == [
            -1.0,
            -1.0,
            -0.5,
            0.0,
            0.0,
        ]


@given(margins(), st.floats(-1e3, 1e3))
def test_only_the_excess_matters(triple, shift):
    d, mean, std = triple
    moved = expected_margin(d + shift, mean + shift, std)
    # Each of the two sums rounds once; the slope is at most 1.
    error = 4 * eps(d.dtype) * (d.abs() + mean.abs() + abs(shift) + std)
    assert ((moved - expected_margin(d, mean, std)).abs() <= error).all()


@given(margins(low=-30), st.integers(-20, 20))  # further out the values are subnormal
def test_scales_with_its_units(triple, power):
    d, mean, std = triple
    k = 2.0**power  # exact, so the law is exact too
    assert same_bits(expected_margin(k * d, k * mean, k * std), k * expected_margin(d, mean, std))


@given(margins(dtype=torch.float32), st.sampled_from(range(3)))
def test_nan_stays_nan_and_stays_where_it_is(triple, position):
    arguments = [x.expand(len(triple[0])).clone() for x in triple]
    arguments[position][0] = torch.nan
    got = expected_margin(*arguments)
    assert got[0].isnan()
    assert got[1:].isfinite().all()
    noise = torch.zeros(len(got))
    assert sampled_margin(*arguments, noise)[0].isnan()


@given(means, st.just(0.0) | stds(), full_dtypes)
def test_infinite_discrepancy_costs_nothing(mean, std, dtype):
    d = torch.tensor([math.inf], dtype=dtype)
    mean, std = torch.tensor(mean, dtype=dtype), torch.tensor(std, dtype=dtype)
    assert expected_margin(d, mean, std).item() == 0
    assert [g.item() for g in derivatives(d, mean, std)] == [0, 0, 0]
    assert sampled_margin(d, mean, std, torch.zeros(1)).item() == 0


@given(margins(), half_dtypes)
def test_half_precision_is_the_rounded_float32(triple, dtype):
    half = [x.to(dtype) for x in triple]
    want = expected_margin(*(x.float() for x in half))
    assert same_bits(expected_margin(*half), want.to(dtype))
    noise = torch.linspace(-2, 2, len(half[0]))
    want = sampled_margin(*(x.float() for x in half), noise)
    assert same_bits(sampled_margin(*half, noise), want.to(dtype))
    assert derivatives(*half)[0].dtype == dtype


@given(margins())
def test_numbers_and_tensors_are_alike(triple):
    d, mean, std = triple
    want = expected_margin(d, mean, std)
    assert same_bits(expected_margin(d, float(mean), float(std)), want)
    assert same_bits(expected_margin(d, mean.expand_as(d), std.expand_as(d)), want)
    mean, std = mean.clone().requires_grad_(), std.clone().requires_grad_()
    by_mean, by_std = torch.autograd.grad(expected_margin(d, mean, std).sum(), (mean, std))
    _, each_mean, each_std = derivatives(d, mean.detach(), std.detach())
    assert torch.allclose(by_mean, each_mean.sum(), rtol=1e-14)  # a sum of at most 9 of one sign
    assert torch.allclose(by_std, each_std.sum(), rtol=1e-14)


@given(seeds)
def test_gradcheck_of_both_orders(seed):
    g = rng(seed)
    d = torch.rand(3, generator=g, dtype=torch.float64, requires_grad=True)
    mean = torch.rand(3, generator=g, dtype=torch.float64, requires_grad=True)
    std = (0.3 + torch.rand((), generator=g, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(expected_margin, (d, mean, std))
    assert torch.autograd.gradgradcheck(expected_margin, (d, mean, std))


@given(margins(), st.integers(1, 4))
def test_vmap_is_the_batched_call(triple, rows):
    d, mean, std = triple
    d = torch.stack([d + i for i in range(rows)])
    per_row = mean + torch.arange(rows)
    got = torch.func.vmap(expected_margin, in_dims=(0, 0, None))(d, per_row, std)
    assert same_bits(
        got, torch.stack([expected_margin(d[i], per_row[i], std) for i in range(rows)])
    )

    def total(*arguments):
        return expected_margin(*arguments).sum()

    slopes = torch.func.vmap(torch.func.grad(total), in_dims=(0, 0, None))(d, per_row, std)
    for i in range(rows):
        want = -values(gate, d[i], per_row[i], std)
        assert torch.allclose(slopes[i], want, rtol=0, atol=4 * eps(d.dtype))


def test_compiled_in_one_graph():
    d = torch.linspace(-1, 2, 7, requires_grad=True)
    noise = torch.linspace(-2, 2, 7)

    def both(d: Tensor) -> Tensor:
        return expected_margin(d, 0.5, 0.25) + sampled_margin(d, 0.5, 0.25, noise)

    got, want = torch.compile(both, fullgraph=True)(d), both(d)
    tolerance = {"rtol": 4 * eps(d.dtype), "atol": 4 * eps(d.dtype)}  # fused differently
    assert torch.allclose(got, want, **tolerance)
    (slope,), (expected,) = (torch.autograd.grad(x.sum(), d) for x in (got, want))
    assert torch.allclose(slope, expected, **tolerance)


# Gaussian margin, sampled


@given(margins(), seeds)
def test_sampled_margin_is_the_hinge_of_each_draw(triple, seed):
    d, mean, std = triple
    noise = torch.randn(d.shape, generator=rng(seed), dtype=d.dtype)
    leaf = d.clone().requires_grad_()
    got = sampled_margin(leaf, mean, std, noise)
    m = mean.numpy() + std.numpy() * noise.numpy()
    assert np.array_equal(got.detach().numpy(), np.maximum(m - d.numpy(), 0))
    got.sum().backward()
    assert leaf.grad.tolist() == [
        -1.0 if a > b else 0.0 for a, b in zip(m, d.tolist(), strict=True)
    ]


@given(st.floats(-2, 40), means, stds(), seeds)
def test_sampled_mean_is_expected(z, mean, std, seed):
    n = 20_000
    d = torch.full((n,), mean - z * std, dtype=torch.float64)
    noise = torch.randn(n, generator=rng(seed), dtype=torch.float64)
    got = sampled_margin(d, mean, std, noise).mean().item()
    error = math.sqrt(margin_variance(d[0].item(), mean, std) / n)
    assert abs(got - expected_margin(d[:1], mean, std).item()) <= 5 * error


# Discrepancies


@pytest.mark.parametrize("name", LOOPS)
@given(data=st.data(), dtype=full_dtypes)
def test_discrepancy_is_its_loop(name, data, dtype):
    t, s = data.draw(logit_pairs(dtype))
    got, want = DISCREPANCIES[name](t, s), discrepancy_loop(name, t, s)
    assert got.dtype == dtype
    assert got.shape == t.shape[:1]
    if name in SOFTMAX:
        assert torch.allclose(got.double(), want, rtol=4 * eps(dtype), atol=logit_error(t, s))
    else:  # a sum of C non-negative terms
        assert torch.allclose(got.double(), want, rtol=(t.shape[1] + 4) * eps(dtype), atol=0)


@pytest.mark.parametrize("name", LOOPS)
@given(data=st.data(), dtype=dtypes)
def test_discrepancy_is_non_negative_bounded_and_zero_for_equals(name, data, dtype):
    t, s = data.draw(logit_pairs(dtype))
    f = getattr(functional, name)
    d = f(t, s)
    assert (d >= 0).all()
    assert (d <= BOUND.get(name, math.inf) + logit_error(t, s)).all()
    equal = f(t, t.clone())
    assert (equal >= 0).all()
    # log((p + p) / 2) rounds to something else than log p: only there is the 0 not exact.
    assert (equal <= (logit_error(t) if name == "js_divergence" else 0)).all()


@pytest.mark.parametrize("name", SYMMETRIC)
@given(data=st.data(), dtype=full_dtypes)
def test_symmetric_discrepancy(name, data, dtype):
    t, s = data.draw(logit_pairs(dtype))
    f = DISCREPANCIES[name]
    assert torch.allclose(f(t, s), f(s, t), rtol=4 * eps(dtype), atol=0)


@pytest.mark.parametrize("name", SOFTMAX)
@given(data=st.data(), shifts=st.tuples(st.floats(-100, 100), st.floats(-100, 100)))
def test_softmax_ignores_a_constant(name, data, shifts):
    t, s = data.draw(logit_pairs())
    f = DISCREPANCIES[name]
    moved = (t + shifts[0], s + shifts[1])
    assert torch.allclose(f(*moved), f(t, s), rtol=0, atol=2 * logit_error(t, s, *moved))


@given(logit_pairs(), st.data())
def test_logit_l2_gradient_is_zero_where_equal(pair, data):
    t, s = (x.clone() for x in pair)
    equal = data.draw(st.integers(0, len(t) - 1))
    s[equal] = t[equal]
    t.requires_grad_(), s.requires_grad_()
    for by, sign in zip(
        torch.autograd.grad(functional.logit_l2(t, s).sum(), (t, s)), (1, -1), strict=True
    ):
        assert (by[equal] == 0).all()
        for i in range(len(t)):
            difference = (t - s)[i].detach().numpy()
            size = np.linalg.norm(difference)
            if size:
                want = sign * difference / (size * math.sqrt(t.shape[1]))
                assert np.allclose(by[i].numpy(), want, rtol=1e-12)  # a norm and two divisions


@pytest.mark.parametrize("name", LOOPS)
@given(seed=seeds)
def test_discrepancy_gradcheck(name, seed):
    t, s = torch.randn(2, 3, 4, generator=rng(seed), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(DISCREPANCIES[name], (t, s), atol=1e-4)


@given(names, st.data(), half_dtypes)
def test_half_discrepancy_is_the_rounded_float32(name, data, dtype):
    t, s = data.draw(logit_pairs(dtype))
    f = DISCREPANCIES[name]
    assert same_bits(f(t, s), f(t.float(), s.float()).to(dtype))


@pytest.mark.parametrize("name", LOOPS)
@given(data=st.data())
def test_nan_logits_give_nan_for_their_sample(name, data):
    t, s = (x.clone() for x in data.draw(logit_pairs()))
    t[0, -1] = torch.nan
    d = DISCREPANCIES[name](t, s)
    assert d[0].isnan()
    assert d[1:].isfinite().all()


# Interpolation


@given(dtypes.flatmap(mixtures))
def test_interpolation_is_the_literal_loop(mixture):
    x, permutation, weight = mixture
    before = [a.clone() for a in mixture]
    got = interpolate(x, permutation, weight)
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    for i, j in enumerate(permutation.tolist()):
        a, b, w = x[i].double(), x[j].double(), weight[i].item()
        # The difference, the product and the sum round once each.
        error = 2 * eps(x.dtype) * (a.abs() + b.abs())
        assert ((got[i].double() - ((1 - w) * a + w * b)).abs() <= error).all()
    assert all(same_bits(a, b) for a, b in zip(mixture, before, strict=True))
    assert got.data_ptr() != x.data_ptr()


@given(dtypes.flatmap(mixtures))
def test_interpolation_stays_between_its_ends(mixture):
    x, permutation, weight = mixture
    got, other = interpolate(x, permutation, weight), x[permutation]
    assert (got >= torch.minimum(x, other)).all()
    assert (got <= torch.maximum(x, other)).all()
    for w, end in ((0, x), (1, other)):
        assert same_bits(got[weight == w], end[weight == w])
        assert same_bits(interpolate(x, permutation, torch.full_like(weight, w)), end)


@given(seeds, dtypes)
def test_interpolation_keeps_channels_last(seed, dtype):
    x = torch.randn(5, 3, 4, 2, generator=rng(seed)).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    permutation, weight = torch.randperm(5, generator=rng(seed)), torch.full((5,), 0.3)
    got = interpolate(last, permutation, weight)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert same_bits(got, interpolate(x, permutation, weight))
    assert interpolate(x, permutation, weight).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_permutation_of_any_integer_dtype(dtype):
    permutation = torch.tensor([2, 0, 1], dtype=dtype)
    x = torch.arange(6.0).view(3, 2)
    assert interpolate(x, permutation, torch.ones(3)).tolist() == [[4, 5], [0, 1], [2, 3]]


@given(dtypes.flatmap(mixtures), seeds)
def test_a_weight_a_pixel_is_the_literal_loop(mixture, seed):
    x, permutation, _ = mixture
    if x.ndim < 3:
        x = x.reshape(len(x), 1, -1)
    weight = torch.rand(len(x), 1, *x.shape[2:], generator=rng(seed)).to(x.dtype)
    got = interpolate(x, permutation, weight)
    for channel in range(x.shape[1]):
        for i, j in enumerate(permutation.tolist()):
            a, b = x[i, channel].double(), x[j, channel].double()
            w = weight[i, 0].double()
            error = 2 * eps(x.dtype) * (a.abs() + b.abs())
            assert ((got[i, channel].double() - ((1 - w) * a + w * b)).abs() <= error).all()


@given(st.lists(st.integers(1, 5), max_size=3), st.integers(1, 4), seeds)
def test_regions_are_the_literal_loop(size, n, seed):
    share = torch.rand(n, generator=rng(seed), dtype=torch.float64)
    centre = torch.rand(n, len(size), generator=rng(seed + 1), dtype=torch.float64)
    got = regions(share, centre, size)
    assert got.shape == (n, 1, *size)
    assert got.dtype == share.dtype
    side = share.tolist() if len(size) < 2 else [u ** (1 / len(size)) for u in share.tolist()]
    for i in range(n):
        for at in itertools.product(*map(range, size)):
            far = [
                abs((place + 0.5) / pixels - middle)
                for place, pixels, middle in zip(at, size, centre[i].tolist(), strict=True)
            ]
            assert got[i, 0][at].item() == all(2 * f < side[i] for f in far)


def test_a_region_covers_its_share_where_it_is_not_cut_off():
    share, middle = torch.linspace(0, 1, 101), torch.full((101, 2), 0.5)
    covered = regions(share, middle, (200, 200)).flatten(1).mean(1)
    assert torch.allclose(covered, share, rtol=0, atol=0.02)
    corner = regions(share, torch.zeros(101, 2), (200, 200)).flatten(1).mean(1)
    assert torch.allclose(corner, share / 4, rtol=0, atol=0.02)


@given(mixtures(torch.float64))
def test_interpolation_gradient(mixture):
    x, permutation, weight = mixture
    x = x.clone().requires_grad_()
    interpolate(x, permutation, weight).sum().backward()
    want = 1 - weight
    for i, j in enumerate(permutation.tolist()):
        want[j] += weight[i]
    want = want.view(-1, *(1,) * (x.ndim - 1)).expand_as(x)
    assert torch.allclose(x.grad, want, rtol=0, atol=4 * eps(x.dtype))  # sums of at most 2


# Errors

X, PERMUTATION, WEIGHT = torch.zeros(3, 2), torch.arange(3), torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "received"),
    [
        (lambda: interpolate(torch.zeros(0, 2), PERMUTATION, WEIGHT), r"\(0, 2\)"),
        (lambda: interpolate(torch.zeros(()), PERMUTATION, WEIGHT), r"\(\)"),
        (lambda: interpolate(X, torch.arange(4), WEIGHT), r"permutation .*\(3,\).*\(4,\)"),
        (lambda: interpolate(X, PERMUTATION[:, None], WEIGHT), r"permutation .*\(3, 1\)"),
        (lambda: interpolate(X, PERMUTATION, torch.zeros(2)), r"weight .*\(3,\).*\(2,\)"),
        (lambda: interpolate(X, PERMUTATION, torch.tensor(0.5)), r"weight .*\(\)"),
        (lambda: interpolate(X, PERMUTATION, WEIGHT[:, None]), r"weight .*\(3, 1\)"),
        (
            lambda: interpolate(torch.zeros(3, 2, 4), PERMUTATION, torch.zeros(3, 2, 4)),
            r"weight .*\(3,\).*\(3, 1, 4\).*\(3, 2, 4\)",
        ),
        (lambda: interpolate(X[..., None], PERMUTATION[1:], torch.zeros(3, 1, 1)), "permutation"),
        (lambda: regions(WEIGHT, torch.zeros(3, 1), (4, 4)), r"\(N, 2\).*\(3,\).*\(3, 1\)"),
        (lambda: regions(WEIGHT[:, None], torch.zeros(3, 2), (4, 4)), r"\(3, 1\)"),
        (lambda: interpolate(X.long(), PERMUTATION, WEIGHT), "int64"),
        (lambda: sampled_margin(WEIGHT, 0.5, 0.1, torch.zeros(4)), r"noise .*\(3,\).*\(4,\)"),
        (lambda: sampled_margin(WEIGHT, 0.5, 0.1, torch.tensor(1.0)), r"noise .*\(\)"),
        (
            lambda: sampled_margin(WEIGHT.long(), 0.5, 0.1, WEIGHT),
            "floating point, got torch.int64",
        ),
        (lambda: expected_margin(WEIGHT.long(), 0.5, 0.1), "floating point, got torch.int64"),
        (lambda: functional.resolve_discrepancy("l3"), "'l3'.*logit_l1.*total_variation"),
        (lambda: functional.resolve_discrepancy(None), "None"),
    ],
)
def test_bad_argument_is_a_named_error(call, received):
    with pytest.raises(AgmError, match=received) as caught:
        call()
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize(
    ("teacher", "student", "received"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4), r"teacher \(3, 2\), student \(3, 4\)"),
        (torch.zeros(3, 2), torch.zeros(1, 2), r"teacher \(3, 2\), student \(1, 2\)"),
        (torch.zeros(0, 2), torch.zeros(0, 2), r"\(0, 2\)"),
        (torch.zeros(2, 0), torch.zeros(2, 0), r"\(2, 0\)"),
        (torch.zeros(3), torch.zeros(3), r"\(3,\)"),
        (torch.zeros(3, 2, 1), torch.zeros(3, 2, 1), r"\(3, 2, 1\)"),
        (torch.zeros(3, 2).long(), torch.zeros(3, 2), "int64 and torch.float32"),
        (torch.zeros(3, 2), torch.zeros(3, 2).int(), "float32 and torch.int32"),
    ],
)
def test_bad_logits_are_a_named_error(name, teacher, student, received):
    with pytest.raises(AgmError, match=received) as caught:
        getattr(functional, name)(teacher, student)
    assert isinstance(caught.value, ValueError)


def test_half_types_mix_to_float32():
    t, s = torch.ones(2, 3, dtype=HALF[0]), torch.zeros(2, 3, dtype=HALF[1])
    assert functional.logit_l1(t, s).dtype == torch.float32
