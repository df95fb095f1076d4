"""frozen_parameters: flags, gradients, and tensors that parametrizations compute."""

import copy
from contextlib import nullcontext

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from agm import AGM, frozen_parameters
from tests.agm import bits, classifier, eps, same_bits
from tests.strategies import rng, seeds


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.booleans())
def test_flags_come_back_even_after_an_exception(flags, fails):
    net = classifier()
    parameters = list(net.parameters())
    for p, flag in zip(parameters, flags, strict=True):
        p.requires_grad_(flag)
    before = bits(net)
    try:
        with frozen_parameters(net) as inside:
            assert inside is net
            assert not any(p.requires_grad for p in parameters)
            if fails:
                raise KeyError("on purpose")
    except KeyError:
        assert fails
    assert bits(net) == before
    assert [p.requires_grad for p in parameters] == flags


@given(seeds)
def test_frozen_network_passes_the_input_gradient_only(seed):
    net, x = classifier(), torch.randn(2, 3, 4, 4, generator=rng(seed))
    (want,) = torch.autograd.grad(net(x.requires_grad_()).square().sum(), x)
    with frozen_parameters(net):
        loss = net(x).square().sum()
    loss.backward()  # outside, when the flags are back
    # One and the same graph but for the weights' branches; kernels may sum in another order.
    assert torch.allclose(x.grad, want, rtol=64 * eps(x.dtype), atol=64 * eps(x.dtype))
    assert all(p.grad is None for p in net.parameters())


def test_frozen_parameters_nest():
    net = classifier()
    with frozen_parameters(net):
        with frozen_parameters(net[0]):
            pass
        assert not any(p.requires_grad for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight / 2


def parametrized(seed=1):
    net = classifier(seed)
    for layer in (net[0], net[5]):
        parametrize.register_parametrization(layer, "weight", Halved())
    return net


def student_gradients(student, wrap):
    """What a whole step with AGM, inside wrap(), leaves in the student's gradients."""
    teacher, images = classifier(0), torch.randn(4, 3, 4, 4, generator=rng(0)).requires_grad_()
    hook = AGM(alternate=False, interval=1)
    with wrap():
        term = hook.generator_loss(
            images=images,
            teacher_logits=teacher(images),
            student=student,
            other_terms=images.square().mean(),
        )
        term.backward()
        assert all(p.grad is None for p in student.parameters())
        student(images.detach()).square().sum().backward()
    return [images.grad, *(p.grad for p in student.parameters())]


def test_parametrizations_may_be_cached_around_a_whole_step():
    want = student_gradients(parametrized(), nullcontext)
    got = student_gradients(parametrized(), parametrize.cached)
    assert all(g is not None for g in got)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_frozen_parametrizations_are_constants_and_come_back():
    net = parametrized()
    before, weight = bits(net), net[0].weight
    kinds = [type(m) for m in net.modules()]
    with frozen_parameters(net), frozen_parameters(net[0]):
        assert same_bits(net[0].weight, weight.detach())
        assert not net[0].weight.requires_grad
        assert set(net.state_dict()) == set(parametrized().state_dict())
    assert bits(net) == before
    assert kinds == [type(m) for m in net.modules()]
    assert net[0].weight.requires_grad
    with torch.no_grad():
        net[0].parametrizations.weight.original.fill_(3)
    assert (net[0].weight == 1.5).all()


def test_a_copy_made_while_frozen_is_parametrized_too():
    net = parametrized()
    with frozen_parameters(net):
        copied = copy.deepcopy(net)
    with torch.no_grad():
        copied[0].parametrizations.weight.original.fill_(3)
    assert (copied[0].weight == 1.5).all()


def test_what_is_cached_inside_is_seen_nowhere_else():
    net = parametrized()
    with parametrize.cached():
        with frozen_parameters(net):
            inside = net[0].weight
            assert net[0].weight is inside
        outside = net[0].weight
        assert outside.requires_grad
        assert not inside.requires_grad
        with frozen_parameters(net):
            assert not net[0].weight.requires_grad
        assert net[0].weight is outside
