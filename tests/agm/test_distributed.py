"""AGM in a foreign loop under DistributedDataParallel, by the recipe of its docstring."""

import re
import textwrap

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from agm import AGM
from tests.ranks import on_ranks

RECIPE = textwrap.dedent(re.search(r"once a step::\n\n(.*?)\n\n", AGM.__doc__, re.DOTALL)[1])
N, STEPS = 16, 6


def networks():
    """Teacher, student and generator, the same in every process."""
    torch.manual_seed(0)
    classifiers = [nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval() for _ in range(2)]
    generator = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Unflatten(1, (3, 2, 2)))
    return classifiers[0].requires_grad_(False), classifiers[1], generator


def train(rank, size, steps=STEPS):
    """AGM's state, and both networks'."""
    teacher, bare, generator = networks()
    student = bare
    if size > 1:
        generator, student = map(DistributedDataParallel, (generator, bare))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (generator, student)]
    agm = AGM(interval=2)
    rng = torch.Generator().manual_seed(0)
    for _ in range(steps):
        z = torch.randn(N, 6, generator=rng).chunk(size)[rank]
        y = torch.randint(5, (N,), generator=rng).chunk(size)[rank]
        x = generator(z)
        p = teacher(x)
        lg = F.cross_entropy(p, y)
        lg = lg + agm.generator_loss(images=x, teacher_logits=p, student=bare, other_terms=lg)
        optimizers[0].zero_grad()
        lg.backward()
        optimizers[0].step()
        if size > 1:
            exec(RECIPE, {"torch": torch, "agm": agm})
        x, y = agm.student_batch(images=x.detach(), labels=y)
        optimizers[1].zero_grad()
        F.cross_entropy(student(x), y).backward()
        optimizers[1].step()
    tensors = [p.detach() for m in (generator, student) for p in m.parameters()]
    return agm.state_dict(), tensors


def test_the_recipe_is_short():
    assert 1 <= len(RECIPE.splitlines()) <= 8


def test_all_ranks_stay_the_same(tmp_path):
    (state, tensors), (other, theirs) = on_ranks(tmp_path, train)
    assert state["running"].keys() == {"mean", "variance", "weight"}
    assert state["running"] == other["running"]
    assert state["turn"] == other["turn"] == STEPS
    assert torch.equal(state["interpolation"]["rng"], other["interpolation"]["rng"])
    for a, b in zip(tensors, theirs, strict=True):
        assert torch.equal(a, b)


def test_the_mean_is_that_of_the_whole_batch(tmp_path):
    want, _ = train(0, 1, 1)
    for state, _ in on_ranks(tmp_path, train, 1):
        torch.testing.assert_close(state["running"]["mean"], want["running"]["mean"])
