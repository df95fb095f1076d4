"""Fake quantization: the grid, its gradients, observed ranges."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from agm import AgmError
from baselines.errors import ConfigError
from baselines.quantization.policy import QuantizationConfig
from baselines.quantization.quantizers import (
    ActivationQuantizer,
    WeightQuantizer,
    _sample,
    fake_quantize,
    integer_range,
    observing,
    scale_and_zero_point,
    unquantized,
    weights_quantized_once,
)
from tests.baselines import raw, same_state
from tests.baselines.strategies import (
    activations,
    bit_widths,
    channels,
    estimators,
    grids,
    schemes,
)
from tests.strategies import rng, seeds


@pytest.mark.parametrize(
    "shape",
    [
        (64, 256, 7, 7), (16, 1024, 7, 7), (64, 64, 14, 14), (16, 144, 56, 56), (16, 480, 14, 14),
        (64, 64, 32, 32), (3, 5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [2**14, 2**16])
def test_a_sample_looks_at_every_place_and_channel(shape, size):
    values = _sample(torch.arange(math.prod(shape), dtype=torch.float64).view(shape), size).long()
    assert min(size, math.prod(shape)) // 2 <= len(values) <= 2 * size
    pixels = math.prod(shape[2:])
    assert len((values % pixels).unique()) == pixels
    assert len((values // pixels % shape[1]).unique()) == shape[1]


STES = st.sampled_from(["identity", "clipped"])


def levels(row, bits, scheme):
    """The values that a channel's weights may take."""
    low, high = min(row.min(), 0.0), max(row.max(), 0.0)
    if scheme == "symmetric":
        n = 2 ** (bits - 1) - 1
        return max(-low, high) / n * np.arange(-n, n + 1)
    n = 2**bits - 1
    step = (high - low) / n
    if step == 0:
        return np.zeros(1)
    return step * (np.arange(n + 1) - min(max(round(-low / step), 0), n))


def column(x):
    return x[:, None]


# fake_quantize


@given(grids(n=3), STES)
def test_each_value_goes_to_its_level(grid, ste):
    x, q, scale, zero, (qmin, qmax) = grid
    got = fake_quantize(x, column(scale), column(zero), qmin, qmax, ste=ste)
    for i, j in np.ndindex(*q.shape):
        level = min(max(int(q[i, j]), qmin), qmax) - int(zero[i])
        assert got[i, j].item() == np.float32(level) * np.float32(scale[i].item())


@given(grids())
def test_as_torch_per_tensor(grid):
    x, _, scale, zero, (qmin, qmax) = grid
    got = fake_quantize(x, scale[0], zero[0], qmin, qmax)
    want = torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero), qmin, qmax)
    assert torch.equal(got, want)


@given(grids(n=3))
def test_as_torch_per_channel(grid):
    x, _, scale, zero, (qmin, qmax) = grid
    got = fake_quantize(x, column(scale), column(zero), qmin, qmax)
    want = torch.fake_quantize_per_channel_affine(x, scale, zero.int(), 0, qmin, qmax)
    assert torch.equal(got, want)


@given(grids(), seeds)
def test_idempotent(grid, seed):
    _, _, scale, zero, (qmin, qmax) = grid
    x = 4 * (qmax - qmin) * scale * torch.randn(100, generator=rng(seed))  # ties and all
    once = fake_quantize(x, scale, zero, qmin, qmax)
    assert torch.equal(fake_quantize(once, scale, zero, qmin, qmax), once)
    assert len(once.unique()) <= qmax - qmin + 1


@given(grids(), seeds)
def test_half_a_step_inside_the_range_and_its_end_outside(grid, seed):
    _, _, scale, zero, (qmin, qmax) = grid
    low, high = (scale * (q - zero) for q in (qmin, qmax))
    x = low + (high - low) * (2 * torch.rand(100, generator=rng(seed)) - 0.5)
    got = fake_quantize(x, scale, zero, qmin, qmax)
    inside = (low <= x) & (x <= high)
    error = (got.double() - x.double()).abs()[inside]
    assert (error <= scale.double() / 2 + 1e-6 * x.abs()[inside]).all()
    assert (got[x > high] == high).all()
    assert (got[x < low] == low).all()


@given(grids(n=2))
def test_zero_is_exact(grid):
    x, _, scale, zero, (qmin, qmax) = grid
    got = fake_quantize(torch.zeros_like(x), column(scale), column(zero), qmin, qmax)
    assert (got == 0).all()


@given(grids(n=2), STES, seeds)
def test_straight_through_gradient(grid, ste, seed):
    x, q, scale, zero, (qmin, qmax) = grid
    upstream = torch.randn(x.shape, generator=rng(seed))
    x.requires_grad_()
    out = fake_quantize(x, column(scale), column(zero), qmin, qmax, ste=ste)
    (got,) = torch.autograd.grad(out, x, upstream)
    for i, j in np.ndindex(*q.shape):
        passes = ste == "identity" or qmin <= q[i, j] <= qmax
        assert got[i, j].item() == (upstream[i, j].item() if passes else 0)
    if ste == "clipped":
        want = torch.fake_quantize_per_channel_affine(x, scale, zero.int(), 0, qmin, qmax)
        assert torch.equal(got, *torch.autograd.grad(want, x, upstream))


@given(grids(n=2), seeds)
def test_gradient_of_a_step(grid, seed):
    """As Esser et al. write it: the rounding error inside, the bound's level outside."""
    x, _, scale, zero, (qmin, qmax) = grid
    x, scale, zero = x[0].double(), scale[0].double().requires_grad_(), zero[0].double()
    upstream = torch.randn(x.shape, generator=rng(seed)).double()
    out = fake_quantize(x, scale, zero, qmin, qmax, ste="clipped")
    (got,) = torch.autograd.grad(out, scale, upstream)
    want = 0.0
    for value, weight in zip(x.tolist(), upstream.tolist(), strict=True):
        steps = value / scale.item()
        assume(abs(steps - math.floor(steps) - 0.5) > 1e-6)
        level = round(steps) + zero.item()
        slope = (
            round(steps) - steps
            if qmin <= level <= qmax
            else ((qmin if level < qmin else qmax) - zero.item())
        )
        want += weight * slope
    assert got.item() == pytest.approx(want, rel=1e-6, abs=1e-6)
    frozen = fake_quantize(x.requires_grad_(), scale.detach(), zero, qmin, qmax, ste="clipped")
    assert torch.equal(frozen, out)


@given(grids(n=2), STES, st.booleans())
def test_bfloat16_stays_bfloat16(grid, ste, per_channel):
    x, _, scale, zero, (qmin, qmax) = grid
    scale, zero = (column(scale), column(zero)) if per_channel else (scale[0], zero[0])
    x = x.bfloat16().requires_grad_()
    got = fake_quantize(x, scale, zero, qmin, qmax, ste=ste)
    (grad,) = torch.autograd.grad(got.float().sum(), x)
    assert got.dtype == grad.dtype == torch.bfloat16
    assert torch.equal(got, fake_quantize(x.float(), scale, zero, qmin, qmax).bfloat16())


@given(grids(1), st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
def test_every_dtype_is_rounded_as_float64_would_round_it(grid, dtype):
    x, _, scale, zero_point, limits = grid
    x = x.to(dtype)
    before = raw(x)
    got = fake_quantize(x, scale.to(torch.float32), zero_point, *limits)
    assert raw(x) == before
    wide = x.double() / scale.double()
    assume((wide - wide.floor() - 0.5).abs().min() > 1e-4)  # ties fall where rounding takes them
    steps = (wide.round() + zero_point).clamp(*limits) - zero_point
    assert torch.equal(got, (steps.to(torch.promote_types(dtype, torch.float32)) * scale).to(dtype))


@pytest.mark.parametrize("ste", ["identity", "clipped"])
def test_not_a_number_stays_one(ste):
    x = torch.tensor([1.0, torch.nan])
    got = fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), 0, 7, ste=ste)
    assert got.isnan().tolist() == [False, True]


# Ranges


@given(bit_widths, st.booleans())
def test_integers_of_a_bit_width(bits, signed):
    assert integer_range(bits, "asymmetric", signed=signed) == (0, 2**bits - 1)
    low, high = integer_range(bits, "symmetric", signed=signed)
    assert low == (-high if signed else 0)
    assert high - low + 1 == 2**bits - signed


@given(channels(), bit_widths, schemes, st.booleans())
def test_steps_and_zero_points(w, bits, scheme, signed):
    low, high = w.amin(1), w.amax(1)
    scale, zero = scale_and_zero_point(low, high, bits, scheme, signed=signed)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    for a, b, s, z in zip(low.tolist(), high.tolist(), scale.tolist(), zero.tolist(), strict=True):
        a, b = min(a, 0), max(b, 0)
        if scheme == "symmetric":
            n = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
            assert (z, s) == (0, pytest.approx(max(-a, b) / n if a or b else 1, rel=1e-12))
        else:
            n = 2**bits - 1
            assert s == pytest.approx((b - a) / n if a or b else 1, rel=1e-12)
            assert z in range(n + 1)
            assert -z * s == pytest.approx(a, abs=0.5001 * s)


def test_a_range_below_the_smallest_normal_number():
    for value in (1e-45, 1e-40, 1.2e-38):
        row = torch.tensor([[value, 0, -value]])
        for scheme in ("asymmetric", "symmetric"):
            assert WeightQuantizer(2, scheme)(row).abs().max() <= 2 * value


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_the_smallest_normal_number_is_a_step(scheme):
    tiny = torch.tensor(torch.finfo(torch.float32).tiny)
    scale, _ = scale_and_zero_point(torch.zeros(()), 3 * tiny, 2, scheme, signed=False)
    assert scale == tiny


# Weights


@given(channels(), bit_widths, schemes)
def test_weights_go_to_the_nearest_level(w, bits, scheme):
    got = WeightQuantizer(bits, scheme)(w)
    for row, out in zip(w.numpy(), got.numpy(), strict=True):
        allowed = levels(row, bits, scheme)
        tolerance = 1e-12 * np.abs(row).max()
        for x, y in zip(row, out, strict=True):
            assert np.abs(allowed - y).min() <= tolerance
            assert abs(y - x) <= np.abs(allowed - x).min() + tolerance
        assert len(set(out)) <= 2**bits - (scheme == "symmetric")
        assert set(out[row == 0]) <= {0.0}


@given(channels(kinds=("constant", "zero")), bit_widths, schemes)
def test_constant_channels_are_exact(w, bits, scheme):
    got = WeightQuantizer(bits, scheme)(w)
    assert torch.allclose(got, w, rtol=1e-14, atol=0)


@given(channels(min_size=2), bit_widths, schemes)
def test_channels_are_independent(w, bits, scheme):
    q, w = WeightQuantizer(bits, scheme), w.float()
    alone = torch.cat([q(row[None]) for row in w])
    assert torch.equal(q(w), alone)
    assert torch.equal(q(w[:, :, None, None].expand(-1, -1, 2, 3))[..., 1, 2], alone)


@given(channels(), bit_widths, schemes, st.integers(-20, 20))
def test_scaling_a_channel_scales_its_quantization(w, bits, scheme, power):
    q = WeightQuantizer(bits, scheme)
    assert torch.equal(q(2.0**power * w), 2.0**power * q(w))


@given(channels(), bit_widths)
def test_symmetric_weights_are_odd_and_use_no_more_than_half(w, bits):
    q, n = WeightQuantizer(bits, "symmetric"), 2 ** (bits - 1) - 1
    got = q(w)
    assert torch.equal(q(-w), -got)
    top = w.abs().amax(1, keepdim=True)
    steps = got * n / torch.where(top > 0, top, 1)
    assert torch.allclose(steps, steps.round(), atol=1e-9)
    assert (steps.abs() <= n + 1e-9).all()


@given(channels(), bit_widths, schemes, seeds)
def test_weights_pass_their_whole_gradient(w, bits, scheme, seed):
    upstream = torch.randn(w.shape, generator=rng(seed), dtype=w.dtype)
    w.requires_grad_()
    (got,) = torch.autograd.grad(WeightQuantizer(bits, scheme)(w), w, upstream)
    assert torch.equal(got, upstream)


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_bfloat16_weights_stay_bfloat16(scheme):
    w = torch.randn(4, 3, 3, 3, generator=rng(0)).bfloat16()
    got = WeightQuantizer(3, scheme)(w)
    assert got.dtype == torch.bfloat16
    assert max(len(row.unique()) for row in got) <= 8


# Activations


def quantizer(
    bits=3, estimator="max", ste="identity", scheme="asymmetric", nonnegative=True, **how
):
    return ActivationQuantizer(
        bits, scheme=scheme, ste=ste, range_estimator=estimator, nonnegative=nonnegative, **how
    )


def observe(q, *batches):
    with observing(q):
        return [q(x) for x in batches]


def top_of(q):
    """The largest value that it can represent."""
    return q(torch.tensor(1e30)).item()


@given(activations(max_batches=6), bit_widths)
def test_the_range_is_a_corrected_average_of_the_maxima(batches, bits):
    q, average = quantizer(bits), 0.0
    for i, x in enumerate(batches):
        (out,) = observe(q, x)
        average = 0.9 * average + 0.1 * max(x.flatten().tolist())
        top = average / (1 - 0.9 ** (i + 1))
        assert top_of(q) == pytest.approx(top if top else 2**bits - 1, rel=1e-4)
        assert torch.equal(out, q(x))  # the batch itself is quantized with the range that it moved


@given(activations(), bit_widths)
def test_activation_levels(batches, bits):
    q, (x,) = quantizer(bits), batches
    (out,) = observe(q, x)
    step = float(x.max()) / (2**bits - 1)
    assert ((out - x).abs() <= (0.5 + 1e-3) * step).all()
    if step:
        assert (out / step - (out / step).round()).abs().max() < 1e-3
    assert len(out.unique()) <= 2**bits
    assert out.min() >= 0
    assert q(-x).abs().max() == 0


@given(activations(), bit_widths)
def test_percentile_is_that_of_numpy(batches, bits):
    q, (x,) = quantizer(bits, "percentile"), batches
    assume(x.max() > 0)
    observe(q, x)
    assert top_of(q) == pytest.approx(np.percentile(x.numpy().ravel(), 99.9), rel=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
def test_percentile_of_a_large_batch(channels_last):
    x = torch.randn(8, 16, 64, 64, generator=rng(0)).relu() * (1 + torch.arange(16)[:, None, None])
    q = quantizer(8, "percentile")
    observe(q, x.to(memory_format=torch.channels_last) if channels_last else x)
    assert top_of(q) == pytest.approx(np.percentile(x.numpy(), 99.9), rel=0.03)


@given(seeds, bit_widths, st.floats(0.5, 2))
def test_mse_range_is_near_the_best(seed, bits, heaviness):
    x = torch.randn(500, generator=rng(seed)).relu() ** heaviness

    def error(estimator):
        (out,) = observe(quantizer(bits, estimator), x)
        return float((out - x).double().square().mean())

    def error_of_clip(clip):
        step = clip / (2**bits - 1)
        return np.mean(
            (np.minimum(np.round(x.numpy() / step), 2**bits - 1) * step - x.numpy()) ** 2
        )

    best = min(error_of_clip(clip) for clip in float(x.max()) * np.linspace(0.002, 1, 500))
    assert error("mse") <= error("max") * (1 + 1e-3)
    assert error("mse") <= 1.25 * best  # a grid of 1%, and 500 values


@given(seeds, bit_widths, st.sampled_from(["gauss", "silu", "leaky"]))
def test_mse_range_of_symmetric_steps_is_near_the_best(seed, bits, kind):
    x = torch.randn(500, generator=rng(seed))
    functions = {"gauss": torch.clone, "silu": F.silu, "leaky": F.leaky_relu}
    x = functions[kind](x)
    (out,) = observe(quantizer(bits, "mse", scheme="symmetric", nonnegative=False), x)
    top = 2 ** (bits - 1) - 1

    def error_of_clip(clip):
        steps = np.clip(np.round(x.numpy() * top / clip), -top, top)
        return np.mean((steps * clip / top - x.numpy()) ** 2)

    best = min(error_of_clip(clip) for clip in float(x.abs().max()) * np.linspace(0.002, 1, 500))
    assert float((out - x).double().square().mean()) <= 1.25 * best


@pytest.mark.parametrize(("estimator", "size"), [("percentile", 2**16), ("mse", 2**14)])
def test_a_large_batch_is_judged_by_a_sample_of_known_size(estimator, size):
    x = torch.ones(5 * size)
    x[::7] = 0  # the next stride that has no divisor in common with the number of values
    q = quantizer(estimator=estimator)
    observe(q, x)
    assert not q.averages.any()
    observe(q, x[: size // 2])  # and of a small batch every value counts
    assert q.averages[1] > 0


@given(seeds)
def test_mse_range_is_a_hundredth_of_the_largest_value(seed):
    x = torch.randn(500, generator=rng(seed)).relu()
    q = quantizer(3, "mse")
    observe(q, x)
    share = 100 * top_of(q) / x.max().item()
    assert share == pytest.approx(round(share), abs=1e-3)
    assert 1 <= round(share) < 100


@given(seeds, bit_widths, estimators, schemes, st.floats(-2, 2))
def test_a_range_of_both_signs(seed, bits, estimator, scheme, shift):
    x = torch.randn(400, generator=rng(seed)) + shift
    q = quantizer(bits, estimator, scheme=scheme, nonnegative=False)
    (out,) = observe(q, x)
    qmin, qmax, zero = q.bounds()
    steps = out / q.scale
    assert (steps - steps.round()).abs().max() < 1e-3
    assert len(out.unique()) <= 2**bits
    assert qmin - zero <= steps.round().min() <= steps.round().max() <= qmax - zero
    assert q(torch.zeros(1)).item() == 0  # zero padding stays zero
    if scheme == "symmetric":
        assert zero == 0
        assert q.signed == bool(qmin < 0) == bool(q.averages[0] < 0)
    else:
        assert (qmin, qmax) == (0, 2**bits - 1)
        assert zero == round(float(-min(q.averages[0] * 10, 0) / q.scale))
    if estimator == "max":  # inside the range to within half a step
        bound = 0.5 if scheme == "symmetric" or not zero else 1.0  # and the zero point's rounding
        assert (out - x).abs().max() <= (bound + 1e-3) * q.scale


@given(seeds, bit_widths)
def test_the_mse_range_of_both_signs_is_no_worse_than_the_largest(seed, bits):
    x = torch.nn.functional.silu(3 * torch.randn(500, generator=rng(seed)))
    errors = {}
    for estimator in ("max", "mse"):
        (out,) = observe(quantizer(bits, estimator, nonnegative=False), x)
        errors[estimator] = float((out - x).square().mean())
    assert errors["mse"] <= errors["max"] * (1 + 1e-4)


def test_a_learned_step_starts_where_it_was_observed_and_moves():
    x = torch.randn(4000, generator=rng(0)).relu()
    frozen, learned = quantizer(2), quantizer(2, ste="clipped", learned_steps=True)
    observe(frozen, x)
    observe(learned, x)
    assert torch.equal(frozen(x), learned(x))
    assert not list(frozen.parameters())
    (gain,) = learned.parameters()
    optimizer = torch.optim.Adam([gain], lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        (learned(2 * x) - 2 * x).square().mean().backward()
        optimizer.step()
    assert (learned(2 * x) - 2 * x).square().mean() < (frozen(2 * x) - 2 * x).square().mean()
    assert learned.scale == learned.observed_scale * gain.exp() != frozen.scale
    other = quantizer(2, ste="clipped", learned_steps=True)
    other.load_state_dict(learned.state_dict())
    assert torch.equal(other(2 * x), learned(2 * x))


@pytest.mark.parametrize("nonnegative", [True, False])
def test_activations_pass_until_something_was_observed(nonnegative):
    q, other = quantizer(nonnegative=nonnegative), quantizer(nonnegative=nonnegative)
    x = torch.linspace(0, 0.3, 50)
    assert torch.equal(q(x), x)
    observe(q, x)
    assert len(q(x).unique()) <= 8
    assert torch.equal(other(x), x)
    other.load_state_dict(q.state_dict())
    assert torch.equal(other(x), q(x))


def test_bounds_follow_the_state():
    q, other = quantizer(nonnegative=False), quantizer(nonnegative=False)
    observe(q, torch.tensor([-1.0, 6.0]))
    assert q.bounds() == (0, 7, 1)
    other.load_state_dict(q.state_dict())
    assert other.bounds() == (0, 7, 1)
    observe(q, *[torch.tensor([-6.0, 1.0])] * 50)
    assert q.bounds() == (0, 7, 6)
    assert other.bounds() == (0, 7, 1)


def student_of_one():
    layer = torch.nn.Linear(3, 2)
    torch.nn.utils.parametrize.register_parametrization(
        layer, "weight", WeightQuantizer(3, "asymmetric")
    )
    return layer


def test_weights_are_quantized_once_and_again_outside():
    layer, x = student_of_one(), torch.ones(1, 3)
    with weights_quantized_once(layer):
        first = layer.weight
        assert layer.weight is first
        (layer(x).sum() + layer(2 * x).sum()).backward()
        with torch.no_grad():
            layer.parametrizations.weight.original.mul_(2)
        assert layer.weight is first
    assert torch.allclose(layer.weight, 2 * first)
    assert torch.equal(layer.parametrizations.weight.original.grad, torch.full((2, 3), 3.0))


def test_what_is_remembered_is_forgotten_after_an_error_too():
    layer = student_of_one()
    with pytest.raises(RuntimeError, match="shapes"), weights_quantized_once(layer):
        layer(torch.ones(1, 5))
    assert layer.parametrizations.weight[0].remembered is None
    assert layer.weight is not layer.weight


def test_unquantized_and_back():
    layer, q = student_of_one(), quantizer(2)
    net, x = torch.nn.Sequential(layer, q), torch.randn(4, 3, generator=rng(0))
    observe(net, x)
    want = net(x)
    with unquantized(net):
        latent = layer.parametrizations.weight.original
        assert torch.equal(net(x), torch.nn.functional.linear(x, latent, layer.bias))
    assert torch.equal(net(x), want)


def test_nothing_is_observed_unasked_and_no_graph_is_kept():
    q, x = quantizer(), torch.tensor([0.0, 7.0], requires_grad=True)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    q(x)
    assert same_state(dict(q.state_dict()), before)
    observe(q, x)
    assert q.scale.item() == pytest.approx(1)
    assert not any(buffer.requires_grad for buffer in q.buffers())


def test_arguments_that_are_easily_confused_go_by_name():
    one = torch.ones(())
    for call in (
        lambda: integer_range(3, "symmetric", True),
        lambda: scale_and_zero_point(-one, one, 3, "symmetric", True),
        lambda: fake_quantize(one, one, 0, 0, 7, "identity"),
        lambda: ActivationQuantizer(3, "asymmetric", "identity", "max"),
    ):
        with pytest.raises(TypeError, match="positional"):
            call()


@given(activations(max_batches=2), activations(), estimators)
def test_frozen_outside_observing(batches, later, estimator):
    q = quantizer(estimator=estimator)
    observe(q, *batches)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    out = q(later[0])
    q.train()
    assert torch.equal(q(later[0]), out)
    assert same_state(dict(q.state_dict()), before)


@given(activations(), estimators)
def test_frozen_after_an_exception(batches, estimator):
    q = quantizer(estimator=estimator)

    def fails():
        with observing(q):
            q(batches[0])
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    scale = raw(q.scale)
    q(100 * batches[0] + 1)
    assert raw(q.scale) == scale


@given(activations(max_batches=4), activations(max_batches=3), estimators)
def test_the_range_goes_on_from_its_state(first, then, estimator):
    q, twin = quantizer(estimator=estimator), quantizer(estimator=estimator)
    observe(q, *first)
    twin.load_state_dict({k: v.clone() for k, v in q.state_dict().items()})
    for a, b in zip(observe(q, *then), observe(twin, *then), strict=True):
        assert torch.equal(a, b)


@given(activations(), estimators, bit_widths)
def test_no_batch_gives_a_broken_step(batches, estimator, bits):
    q = quantizer(bits, estimator)
    (out,) = observe(q, batches[0])
    assert 0 < q.scale < torch.inf
    assert out.isfinite().all()


@given(seeds, STES)
def test_activation_gradient(seed, ste):
    q = quantizer(ste=ste)
    observe(q, torch.tensor([0.0, 7.0]))  # steps of 1, from 0 to 7
    x = 10 * torch.rand(20, generator=rng(seed))
    x.requires_grad_()
    q(x).sum().backward()
    for value, slope in zip(x.tolist(), x.grad.tolist(), strict=True):
        assert slope == (1 if ste == "identity" or value < 7.5 else 0)


# Settings


@pytest.mark.parametrize("name", ["weight_bits", "act_bits", "edge_bits"])
@pytest.mark.parametrize("value", [1, 9, 0, -3, 3.5, 3.0, True, "3", float("nan")])
def test_bits_out_of_range(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        QuantizationConfig(**{name: value})
    assert f"got {value!r}" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, AgmError)


@pytest.mark.parametrize("name", ["scheme", "ste", "range_estimator"])
@pytest.mark.parametrize("value", ["", "Max", "none", None, 3, ["max"]])
def test_unknown_choice(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        QuantizationConfig(**{name: value})
    assert repr(value) in str(caught.value)


def test_missing_bits():
    for name in ("weight_bits", "act_bits"):
        with pytest.raises(ConfigError, match=f"{name}.*None"):
            QuantizationConfig(**{name: None})
