"""A batch shared by two processes (gloo) against the same batch in one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from agm import AGM, AgmError
from baselines import Interrupted, quantize
from baselines.errors import CheckpointError, ConfigError, NonFiniteLossError
from baselines.training.bn_stats import batch_norm_statistics, normalising_layers
from baselines.training.parallel import ALONE, Ranks, bytes_per_step
from baselines.training.trainer import Trainer
from tests.baselines import Tiny, fill, images, same_state
from tests.baselines.training.test_trainer import SMALL, make
from tests.ranks import on_ranks

STEPS = 7


def on(folder: Path, function: Callable[..., Any], *args: Any, size: int = 2) -> list[Any]:
    """What ``function(ranks, *args)`` gives in each of ``size`` processes."""
    return on_ranks(folder, _with_ranks, function, *args, size=size)


def _with_ranks(rank: int, size: int, function: Callable[..., Any], *args: Any) -> Any:
    return function(Ranks(rank, size), *args)


def trainer(
    ranks: Ranks, method: str, hooks: str, *, frozen: bool = False, batch_size: int = 8
) -> Trainer:
    made = make(method, hooks, ranks=ranks, batch_size=batch_size, student_lr=1e-2)
    if frozen:
        for module in made.generator.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    return made


# Gradients


def gradients(ranks: Ranks, method: str) -> list[list[torch.Tensor]]:
    """Of three steps before and three after the warm-up, BatchNorms in eval mode."""
    made, found = trainer(ranks, method, "none", frozen=True, batch_size=64), []
    for _ in range(6):
        made.step()
        networks = (made.generator, made.student)
        found.append(
            [p.grad.clone() for n in networks for p in n.parameters() if p.grad is not None]
        )
    return found


# AdaDFQ's least entropy is that of a rank's part.
@pytest.mark.parametrize("method", ["gdfq", "qimera"])
def test_gradients_are_those_of_the_whole_batch(method, tmp_path):
    alone = gradients(ALONE, method)
    for shared in on(tmp_path, gradients, method):
        for want, got in zip(alone, shared, strict=True):
            scale = max(w.abs().max() for w in want)
            for a, b in zip(want, got, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-3, atol=float(1e-5 * scale))


def moments(ranks: Ranks, x: torch.Tensor) -> tuple[float, torch.Tensor]:
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)]
    network = fill(nn.Sequential(*layers), 0).double()
    part = ranks.part(x).requires_grad_()
    with batch_norm_statistics(normalising_layers(network)) as statistics:
        network(part)
    loss = statistics.loss(ranks)
    loss.backward()
    return loss.item(), part.grad / ranks.size  # as averaging makes of it


@pytest.mark.parametrize("size", [2, 3])
def test_bns_is_that_of_the_whole_batch(size, tmp_path):
    # A channel far from 0, and parts that differ from one another.
    spread, level = torch.tensor([1.0, 5.0, 0.1]), torch.tensor([0.0, 1.0, 300.0])
    x = images(12).double() * spread[:, None, None] + level[:, None, None]
    x += torch.arange(12)[:, None, None, None]
    loss, gradient = moments(ALONE, x)
    found = on(tmp_path, moments, x, size=size)
    for got, _ in found:
        assert got == pytest.approx(loss, rel=1e-10)
    shared = torch.cat([part for _, part in found])
    torch.testing.assert_close(shared, gradient, rtol=1e-7, atol=1e-10)


# A run


def run(ranks: Ranks, method: str, hooks: str) -> tuple[Any, Any]:
    made = trainer(ranks, method, hooks)
    terms = [{k: v.item() for k, v in made.step().items()} for _ in range(STEPS)]
    return made.state_dict(), terms


@pytest.mark.parametrize("method", SMALL)
def test_all_ranks_are_in_the_same_state(method, tmp_path):
    (state, terms), *others = on(tmp_path, run, method, "both")
    assert {"turn", "running"} <= state["hooks"][0].keys()
    assert state["hooks"][0]["running"].keys() == {"mean", "variance", "weight"}
    for other, their_terms in others:
        assert same_state(state, other)
        assert terms == their_terms


def test_three_ranks_cannot_share_eight_images():
    with pytest.raises(ConfigError, match=r"a batch of 8 .* by 3 ranks; choose"):
        make(batch_size=8, ranks=Ranks(0, 3))


class NotFinite:
    """A method that gives one rank's part a loss that is not finite."""

    def __init__(self, rank: int) -> None:
        self.rank, self.calls, self.method = rank, 0, SMALL["gdfq"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["method"], name)

    def generator_terms(self, **given: Any) -> dict[str, torch.Tensor]:
        terms = self.method.generator_terms(**given)
        self.calls += 1
        if self.calls == 2 and self.rank == 1:
            terms["ce"] = terms["ce"] * torch.inf
        return terms


def refused(ranks: Ranks) -> tuple[str, int]:
    made = make(NotFinite(ranks.rank), ranks=ranks, batch_size=8)
    made.step()
    with pytest.raises(NonFiniteLossError) as caught:
        made.step()
    return str(caught.value), made.step_count


def test_a_loss_that_is_not_finite_on_one_rank_is_refused_on_all(tmp_path):
    (message, step), other = on(tmp_path, refused)
    assert other == (message, step)
    assert "step 1" in message


# Checkpoints


def quantized(ranks: Ranks, path: str | None, stop_at: int | None, resume: bool) -> Any:
    """A run, stopped on one rank's word."""
    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        return steps == stop_at and ranks.rank == 1

    try:
        result = quantize(
            Tiny(), weight_bits=4, act_bits=4, hooks=[AGM()], image_size=8, steps=STEPS,
            batch_size=8, precision="fp32", ranks=ranks, records=3, checkpoint_path=path,
            resume=resume, stop=stop, checkpoint_every=2,
        )  # fmt: skip
    except Interrupted as stopped:
        return str(stopped)
    return result.model.state_dict(), result.history, result.images


def test_a_stopped_run_goes_on_bit_by_bit(tmp_path):
    path = str(tmp_path / "run")
    whole = on(tmp_path, quantized, None, None, False)
    assert on(tmp_path, quantized, path, 3, False) == [f"stopped after step 3 of {STEPS}"] * 2
    resumed = on(tmp_path, quantized, path, None, True)
    assert same_state(resumed[0], whole[0])
    assert same_state(resumed[1], whole[1])
    with pytest.raises(CheckpointError, match="ranks differ"):
        quantized(ALONE, path, None, True)


def refusals(ranks: Ranks, path: str) -> list[str]:
    found = []
    for call in (lambda: ranks.first(lambda: "from rank 0"), lambda: broken(ranks, path)):
        try:
            found.append(call())
        except AgmError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def broken(ranks: Ranks, path: str) -> str:
    quantized(ranks, path, None, True)
    return "went on"


def test_a_checkpoint_that_rank_0_cannot_read_is_refused_on_all(tmp_path):
    path = tmp_path / "run"
    path.write_bytes(b"rubbish")
    (given, error), other = on(tmp_path, refusals, str(path))
    assert other == [given, error]
    assert given == "from rank 0"
    assert error.startswith("CheckpointError: ")


# What is communicated


def counted(ranks: Ranks) -> tuple[int, int]:
    made, sent, real = trainer(ranks, "gdfq", "none"), [], dist.all_reduce
    for _ in range(4):
        made.step()

    def all_reduce(x: torch.Tensor, *args: Any) -> None:
        sent.append(x.numel() * x.element_size())
        real(x, *args)

    dist.all_reduce = all_reduce
    made.step()
    channels = sum(len(layer.trained) // 2 for layer in made.layers)
    return sum(sent), bytes_per_step(made.generator, made.student, channels)


def test_bytes_of_a_step(tmp_path):
    for sent, told in on(tmp_path, counted):
        assert 0 <= sent - told <= 16  # the four losses


def test_alone_nothing_is_communicated():
    batch = images(4)
    assert torch.equal(ALONE.part(batch), batch)
    assert ALONE.whole(batch) is batch
    parts = [torch.ones(3), torch.ones(3)]
    assert ALONE.moments(parts) is parts
    assert ALONE.any(True, batch.device)
    assert not ALONE.any(False, batch.device)
    assert ALONE.first(lambda: 3) == 3
