"""LinearInterpolation: with the identity for labels, row i of the soft labels is
(1 - lambda_i) e_i + lambda_i e_pi(i), so the labels tell which mixture was drawn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agm import AgmError, LinearInterpolation
from tests.agm import elsewhere, eps, same_bits
from tests.strategies import dtypes, image_batches, mixtures, rng, seeds, unit

batches = dtypes.flatmap(image_batches)


def drawn(soft):
    """[(partner, its weight)] a sample, from soft labels that were the identity."""
    soft = soft.clone()
    own = soft.diagonal().clone()
    soft.fill_diagonal_(0)
    weight, partner = soft.max(1)
    alone = weight == 0  # lambda = 0, or a partner of its own: then own is 1
    assert (own[alone] == 1).all()
    return [
        (i if a else j, w)
        for i, (a, j, w) in enumerate(
            zip(alone.tolist(), partner.tolist(), weight.tolist(), strict=True)
        )
    ]


@given(batches, seeds)
def test_images_follow_the_same_mixture_as_labels(x, seed):
    before = x.clone()
    y = torch.eye(len(x), dtype=torch.float64)
    images, soft = LinearInterpolation(seed=seed)(x, y)
    assert images.dtype == x.dtype
    assert images.shape == x.shape
    assert soft.dtype == torch.float64
    for i, (j, w) in enumerate(drawn(soft)):
        want = (1 - w) * x[i].double() + w * x[j].double()
        # The difference, the product and the sum round once each.
        error = 2 * eps(x.dtype) * (x[i].double().abs() + x[j].double().abs())
        assert ((images[i].double() - want).abs() <= error).all()
    assert same_bits(x, before)
    assert torch.equal(y, torch.eye(len(x)))
    assert same_bits(LinearInterpolation(seed=seed)(x), images)  # labels do not change the draw


@given(dtypes, seeds, st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=2))
def test_regions_show_either_image_and_labels_their_share(dtype, seed, n, size):
    # Each image has a value of its own, by which its pixels are known.
    x = torch.arange(n).view(n, 1, *(1 for _ in size)).expand(n, 3, *size).to(dtype)
    images, soft = LinearInterpolation(seed=seed, regions=True)(x, torch.eye(n).double())
    assert images.dtype == dtype
    for i in range(n):
        assert (images[i] == images[i, :1]).all()  # all channels alike
        shown = images[i, 0].flatten().long().bincount(minlength=n) / images[i, 0].numel()
        assert torch.allclose(soft[i], shown.double(), rtol=0, atol=1e-6)
        assert (shown > 0).sum() <= 2
    assert same_bits(LinearInterpolation(seed=seed, regions=True)(x), images)


def test_regions_are_of_every_size_at_every_place():
    n, mix, covered = 512, LinearInterpolation(seed=0, regions=True), []
    for _ in range(8):
        _, soft = mix(torch.zeros(n, 1, 32, 32), torch.eye(n))
        covered += [w for i, (j, w) in enumerate(drawn(soft)) if i != j]
    covered = torch.tensor(covered, dtype=torch.float64)
    # E[u], of which a side u^(1/2) at a uniform place keeps what lies in [0, 1], by a fine grid.
    grid = torch.linspace(0, 1, 401, dtype=torch.float64)
    side, middle = grid.sqrt()[:, None], grid[None]
    part = (middle + side / 2).clamp(max=1) - (middle - side / 2).clamp(min=0)
    want = part.mean(1).square().mean()
    assert abs(covered.mean() - want) < 5 * covered.std() / len(covered) ** 0.5
    assert covered.max() > 0.9


def test_samples_without_pixels_are_mixed_whole():
    x, y = torch.randn(6, 5, generator=rng(0)), torch.eye(6)
    whole = LinearInterpolation(seed=2)(x, y)
    for a, b in zip(LinearInterpolation(seed=2, regions=True)(x, y), whole, strict=True):
        assert same_bits(a, b)


@given(mixtures(torch.float64), seeds)
def test_given_weights_replace_the_uniform_law(mixture, seed):
    x, _, weight = mixture
    _, soft = LinearInterpolation(seed=seed)(x, torch.eye(len(x)).double(), weight=weight)
    ends = LinearInterpolation(seed=seed)(x, weight=1)  # x[pi]
    for i, (j, w) in enumerate(drawn(soft)):
        assert w == (0 if i == j else pytest.approx(weight[i].item(), abs=eps(x.dtype)))
        assert weight[i] == 0 or torch.equal(ends[i], x[j])


@given(batches, unit, seeds)
def test_a_number_is_the_weight_of_all(x, weight, seed):
    all_alike = torch.full((len(x),), weight, dtype=torch.float64)
    want = LinearInterpolation(seed=seed)(x, weight=all_alike)
    for number in (weight, torch.tensor(weight, dtype=torch.float64)):
        assert same_bits(LinearInterpolation(seed=seed)(x, weight=number), want)


@given(batches, seeds)
def test_weight_one_permutes_and_weight_zero_does_nothing(x, seed):
    assert same_bits(LinearInterpolation(seed=seed)(x, weight=0), x)
    moved = LinearInterpolation(seed=seed)(x, weight=1.0)
    rows = [sorted(map(tuple, a.reshape(len(x), -1).tolist())) for a in (x, moved)]
    assert rows[0] == rows[1]


@given(batches, seeds)
def test_stays_within_the_batch(x, seed):
    got = LinearInterpolation(seed=seed)(x)
    assert (got >= x.amin(0)).all()
    assert (got <= x.amax(0)).all()


@given(dtypes.flatmap(lambda d: image_batches(d).map(lambda x: x[:1])), seeds)
def test_an_image_alone_stays_as_it_is(x, seed):
    got, soft = LinearInterpolation(seed=seed)(x, torch.zeros(1, dtype=torch.int64), num_classes=2)
    assert same_bits(got, x)
    assert soft.tolist() == [[1.0, 0.0]]


@given(
    image_batches(),
    st.integers(1, 9),
    st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    seeds,
)
def test_integer_labels_become_soft_labels(x, classes, dtype, seed):
    labels = torch.randint(classes, (len(x),), generator=rng(seed)).to(dtype)
    images, soft = LinearInterpolation(seed=seed)(x, labels, num_classes=classes)
    twin = torch.zeros(len(x), classes)
    for i, label in enumerate(labels.tolist()):
        twin[i, label] = 1
    again, want = LinearInterpolation(seed=seed)(x, twin)
    assert same_bits(images, again)
    assert same_bits(soft, want)
    assert ((soft >= 0) & (soft <= 1)).all()
    # lambda and 1 - lambda of the same rounding, or a 1
    assert torch.allclose(soft.sum(1), torch.ones(len(x)), rtol=0, atol=2 * eps(soft.dtype))


@given(batches, seeds, st.integers(1, 9))
def test_soft_labels_still_sum_to_one(x, seed, classes):
    y = torch.randn(len(x), classes, generator=rng(seed)).softmax(1)
    before = y.clone()
    _, soft = LinearInterpolation(seed=seed)(x, y)
    assert (soft >= 0).all()
    # Two rows that sum to 1 within an eps a class.
    assert torch.allclose(
        soft.sum(1), torch.ones(len(x)), rtol=0, atol=(classes + 2) * eps(y.dtype)
    )
    assert same_bits(y, before)


@given(seeds, dtypes, st.integers(1, 7))
def test_keeps_channels_last(seed, dtype, n):
    x = torch.randn(n, 3, 4, 5, generator=rng(seed)).to(dtype)
    last = x.to(memory_format=torch.channels_last)
    got = LinearInterpolation(seed=seed)(last)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert same_bits(got, LinearInterpolation(seed=seed)(x))


@given(image_batches(), seeds, st.integers(0, 3), st.integers(1, 3))
def test_state_dict_goes_on_exactly(x, seed, first, then):
    mix = LinearInterpolation(seed=seed)
    for _ in range(first):
        mix(x)
    state = mix.state_dict()
    other = LinearInterpolation(seed=seed + 1)
    want = [mix(x) for _ in range(then)]
    other.load_state_dict(state)
    assert all(same_bits(other(x), a) for a in want)


@given(image_batches(), seeds)
def test_global_rng_is_untouched(x, seed):
    before = torch.get_rng_state()
    LinearInterpolation(seed=seed)(x, torch.zeros(len(x)).long(), num_classes=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_and_calls_differ():
    x = torch.randn(64, 2, generator=rng(0))
    mix = LinearInterpolation(seed=0)
    first = mix(x)
    assert not torch.equal(mix(x), first)
    assert not torch.equal(LinearInterpolation(seed=1)(x), first)
    assert torch.equal(LinearInterpolation()(x), first)


def test_weights_and_partners_are_uniform():
    n, weights, partners = 512, [], []
    mix = LinearInterpolation(seed=0)
    for _ in range(8):
        _, soft = mix(torch.zeros(n, 1), torch.eye(n))
        pairs = drawn(soft)
        assert len({j for j, _ in pairs}) >= n - 1  # a permutation (a lambda of 0 hides a partner)
        weights += [w for i, (j, w) in enumerate(pairs) if i != j]
        partners += [j - i for i, (j, _) in enumerate(pairs)]
    weight = torch.tensor(weights).sort().values
    m = len(weight)
    # Kolmogorov-Smirnov: sqrt(m) D exceeds 2.2 with probability 1e-4.
    distance = (weight - (torch.arange(m) + 0.5) / m).abs().max() + 0.5 / m
    assert m**0.5 * distance < 2.2
    # Partners equally often before and after: the sign of a fair coin, 5 standard errors.
    before = sum(p < 0 for p in partners)
    assert abs(before - len(partners) / 2) < 5 * len(partners) ** 0.5 / 2


X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ((torch.zeros(0, 2),), r"\(0, 2\)"),
        ((torch.zeros(()),), r"\(\)"),
        ((X.int(),), "int32"),
        ((X, torch.zeros(2, 4)), r"\(3, C\).*\(2, 4\)"),
        ((X, torch.zeros(4, 4)), r"\(3, C\).*\(4, 4\)"),
        ((X, torch.zeros(3)), r"\(3, C\).*\(3,\)"),
        ((X, torch.zeros(3, 4, 1)), r"\(3, 4, 1\)"),
        ((X, torch.zeros(3).long()), "num_classes"),
        ((X, torch.zeros(4).long(), 5), r"\(3,\).*\(4,\)"),
        ((X, torch.zeros(2).long(), 5), r"\(3,\).*\(2,\)"),
        ((X, torch.zeros(3, 5).long(), 5), r"\(3,\).*\(3, 5\)"),
        ((X, torch.tensor([0, 5, 1]), 5), r"\[0, 5\)"),
        ((X, torch.tensor([0, -1, 1]), 5), r"\[0, 5\)"),
        ((X, torch.tensor([0, 2, 1]), -1), "-1"),
        ((X, torch.tensor([0, 2, 1]), 0), "num_classes must be a whole number >= 1, got 0"),
        ((X, None, None, torch.zeros(2)), r"weight.*\(3,\).*\(2,\)"),
        ((X, None, None, torch.zeros(3, 1)), r"weight.*\(3,\).*\(3, 1\)"),
        ((X, None, None, [0.5, 0.5, 0.5]), r"weight must be a number or a tensor, got \[0.5"),
        ((X.long(),), "int64"),
        ((X, torch.zeros(3).long(), "5"), "num_classes must be a whole number .*'5'"),
    ],
)
def test_bad_argument_is_a_named_error(arguments, received):
    names = ("images", "labels", "num_classes", "weight")
    mix = LinearInterpolation(seed=1)
    with pytest.raises(AgmError, match=received) as caught:
        mix(**dict(zip(names, arguments, strict=False)))
    assert isinstance(caught.value, ValueError)
    assert torch.equal(mix.state_dict()["rng"], rng(1).get_state())  # nothing was drawn


def test_settings_and_options_go_by_name():
    with pytest.raises(TypeError):
        LinearInterpolation(1)
    with pytest.raises(TypeError):
        LinearInterpolation()(X, X, 2)


def test_images_without_pixels_are_a_batch():
    assert LinearInterpolation()(torch.zeros(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("weight", [None, 0.25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_default_dtype_or_device_changes_nothing(dtype, weight):
    x, y = torch.randn(4, 3, generator=rng(0)).to(dtype), torch.tensor([0, 2, 1, 1])
    settings = {"num_classes": 3, "weight": weight}
    want = LinearInterpolation(seed=1)(x, y, **settings)
    with elsewhere():
        mix = LinearInterpolation(seed=1)
        mix.load_state_dict(LinearInterpolation(seed=1).state_dict())
        got = mix(x, y, **settings)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    assert got[1].dtype == torch.float32
