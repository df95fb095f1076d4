"""One run over several processes of torch.distributed, each with its part of every batch.

All draw the whole batch's latents from one seed and keep their part; gradients are averaged, so all
take the same step. A method's and a hook's losses are means over the rank's part, whose average is
that of the whole batch; AdaDFQ's least entropy, the layers' spread and AGM's margin and weight are
the part's own (the margin's and the weight's running averages are averaged in turn). BNS compares
the moments of the whole batch, and ranges are observed on all of it. The generator's BatchNorms
normalise the whole batch on CUDA (SyncBatchNorm, which PyTorch has for no CPU) and each part by
itself on the CPU, where their running statistics are averaged.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from agm import AgmError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that share a run, and which of them this one is; alone by default.

    Args:
        rank: this one, in [0, size).
        size: how many there are; with more than one, torch.distributed's default group.
    """

    rank: int = 0
    size: int = 1

    def part(self, batch: Tensor) -> Tensor:
        """This rank's samples of a batch whose length ``size`` divides."""
        return batch.chunk(self.size)[self.rank]

    def whole(self, part: Tensor) -> Tensor:
        """The batch of which every rank has a part; without a graph."""
        if self.size == 1:
            return part
        own = part.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return torch.cat(parts)

    @torch.no_grad()
    def average_(self, tensors: Iterable[Tensor | None]) -> None:
        """Put the mean over the ranks into each floating tensor, by one collective."""
        own = [t for t in tensors if t is not None and t.is_floating_point()]
        if self.size == 1 or not own:
            return
        flat = _mean(torch.cat([t.flatten() for t in own]), self.size)
        for tensor, mean in zip(own, flat.split([t.numel() for t in own]), strict=True):
            tensor.copy_(mean.view(tensor.shape))

    def moments(self, parts: list[Tensor]) -> list[Tensor]:
        """Means and biased variances of the whole batch from those of this rank's part.

        Args:
            parts: mean, variance, mean, variance, ..., each (C,).
        """
        if self.size == 1:
            return parts
        # Second moments add up where variances do not; in float64 nothing cancels.
        means, variances = torch.cat(parts[::2]).double(), torch.cat(parts[1::2]).double()
        mean, second = _Mean.apply(torch.cat([means, variances + means**2]), self.size).chunk(2)
        widths = [len(part) for part in parts[::2]]
        pairs = zip(mean.split(widths), (second - mean**2).split(widths), strict=True)
        return [value.to(parts[0].dtype) for pair in pairs for value in pair]

    def average_state(self, owner: Any) -> None:
        """Average what a hook's ``state_dict`` holds under ``"running"``, see :class:`agm.Hook`."""
        state = owner.state_dict() if self.size > 1 else {}
        if running := state.get("running"):
            self.average_(running.values())
            owner.load_state_dict(state)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` is set on some rank."""
        if self.size == 1:
            return flag
        return bool(_mean(torch.tensor(float(flag), device=device), self.size) > 0)

    def first(self, call: Callable[[], T]) -> T:
        """What ``call`` gives on rank 0, which alone calls it; an AgmError is raised on all."""
        if self.size == 1:
            return call()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = call()
            except AgmError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


ALONE = Ranks()


@contextmanager
def connected() -> Iterator[Ranks]:
    """The ranks that torchrun started, this one on its own GPU if there are any; or alone."""
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group()
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def running_statistics(network: nn.Module) -> list[Tensor]:
    """The running means and variances of a network's BatchNorms."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]


def bytes_per_step(generator: nn.Module, student: nn.Module, channels: int) -> int:
    """What a rank hands to all-reduce in a step, but for the few numbers of losses and hooks.

    Both networks' gradients and the generator's running statistics in float32, BNS's moments in
    float64. A ring sends and receives 2 (N - 1) / N times as much on each of N ranks.

    Args:
        channels: of the teacher's BatchNorms, together.
    """
    averaged = [
        *generator.parameters(), *student.parameters(), *running_statistics(generator)
    ]  # fmt: skip
    return sum(t.numel() * t.element_size() for t in averaged) + 2 * channels * 8


def _mean(x: Tensor, size: int) -> Tensor:
    dist.all_reduce(x)
    return x.div_(size)


class _Mean(torch.autograd.Function):
    """The mean over the ranks, of which each goes on to compute the same loss.

    The gradient passes as it is: averaged over the ranks with all others, it is that of the loss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        return _mean(x.clone(), size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
