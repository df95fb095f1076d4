"""How far the student's layers are from the teacher's, on the same images.

distance = mean over layers of E[(s - t)^2] / E[var t], s and t being what a layer of either gives,
its BatchNorm included, and var t the batch's variance of each channel of the teacher's. After
feature distillation (Romero et al., "FitNets", ICLR 2015); the layers and the unit are ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from baselines.quantization.batch_norms import normalised_convolutions
from baselines.quantization.placement import weighted_nodes
from baselines.training.bn_stats import channel_moments

EVERY = 3  # layers, counted from the last: as good as all of them, at a third of the cost


class Layers:
    """The layers in which teacher and student are compared.

    Args:
        teacher: of :func:`baselines.quantization.batch_norms.with_folded_norms`.
        student: of :func:`baselines.quantization.student.build_student`.

    Attributes:
        names: of the layers; the network's last one, whose outputs the logits are, is not among
            them, and a network of one layer has none.
    """

    def __init__(self, teacher: fx.GraphModule, student: fx.GraphModule) -> None:
        # Whose BatchNorm stands by itself in the teacher, and not in the student.
        apart = {str(conv.target) for conv, _ in normalised_convolutions(teacher)}
        names = dict.fromkeys(str(node.target) for node in weighted_nodes(student)[:-1])
        self.names = [name for name in names if name not in apart][::-EVERY]
        self.modules = [
            (teacher.get_submodule(name), student.get_submodule(name)) for name in self.names
        ]
        self.given: dict[nn.Module, Tensor] = {}

    @contextmanager
    def collected(self) -> Iterator[None]:
        """While inside, what the layers give is kept, each time anew; all is let go on leaving."""
        teachers, students = zip(*self.modules, strict=True) if self.modules else ((), ())
        handles = [module.register_forward_hook(self._keep) for module in teachers]
        handles += [module.register_forward_hook(self._keep_learning) for module in students]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.given = {}

    def _keep(self, module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.given[module] = output

    def _keep_learning(self, module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():  # else a hook looks at the student, which does not learn so
            self.given[module] = output

    def distance(self) -> Tensor:
        """Of what both networks gave last; float32, scalar, with the student's graph alone.

        0 where a layer of the teacher gives each channel the same value, but for rounding.
        """
        terms = []
        for of_teacher, of_student in self.modules:
            t, s = self.given[of_teacher].detach(), self.given[of_student]
            # A linear layer's channels come last, also behind several dimensions.
            rows = t.flatten(0, -2) if isinstance(of_teacher, nn.Linear) else t
            mean, variance = channel_moments(rows)
            # What a constant's variance may be for rounding; the moments' own is below 1e-30.
            rounding = (64 * torch.finfo(mean.dtype).eps * mean).square().mean() + 1e-30
            spread = variance.mean()
            spread = torch.where(spread > rounding, spread, torch.inf)
            error = (s - t).square().sum(dtype=torch.promote_types(s.dtype, torch.float32))
            terms.append(error / (spread * s.numel()))
        return torch.stack(terms).mean()
