"""compare.py on a GPU, with each step replayed as a CUDA graph.

    python benchmarks/evidence/graphed.py --model resnet20 --bits 2 --with-agm --with-real ...

A step of a small network is some thousand short kernels, and Python takes longer to ask for them
than a GPU to run them. A graph asks for all at once, and several such runs share the GPU well under
CUDA's MPS; half of the kernels are joined into fewer, see kernels.py. The options are compare.py's,
and so is the loop, but for what cannot be replayed: the shifts, boxes and real images are drawn on
the device, so that a seed gives other numbers than compare.py's; and a loss that is not finite is
told of at a checkpoint, or at the end.

Side by side on one GPU, once `nvidia-cuda-mps-control -d` has started MPS, each rank the next run:

    torchrun --standalone --nproc-per-node 6 benchmarks/evidence/graphed.py --out FOLDER ...
"""

import functools
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import benchmarks  # noqa: F401 - first, since it says what is missing

# isort: split
import torch
from torch import Tensor

from agm import AGM, LinearInterpolation
from agm.functional import regions
from baselines import run
from baselines.errors import ConfigError, NonFiniteLossError
from baselines.training.trainer import Trainer
from benchmarks import command_line, compare
from benchmarks.errors import UsageError
from benchmarks.task.real_images import RealImages
from benchmarks.task.task import Task

# Steps of a kind before it is captured: they make what lasts, such as the optimizers' state.
EAGER = 3
PROGRAM = "evidence/graphed.py"


class GraphedTrainer(Trainer):
    """A trainer whose steps are graphs, one for each kind of step that the add-on's turns make.

    Steps that observe ranges run as they are, and so do the first of each kind. ``hooks`` are an
    AGM, whose boxes are drawn on the device from here on, or :class:`RealImagesOnDevice`.

    Attributes:
        capturing: False runs every step as it is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.set_stream(_stream(kwargs["device"]))
        super().__init__(*args, **kwargs)
        self.add_ons = [hook for hook in self.hooks if type(hook) is AGM]
        as_made = all(hook.alternate and hook.mix.regions for hook in self.add_ons)
        real = sum(type(hook) is RealImagesOnDevice for hook in self.hooks)
        if len(self.add_ons) + real < len(self.hooks) or not as_made:
            raise ConfigError(
                f"AGM's steps alone can be replayed, as it takes its turns by default, got "
                f"{self.hooks}: a graph would repeat what another hook drew or counted once"
            )
        self.capturing = True
        self.factor = torch.ones((), device=self.device)
        self.sound = torch.zeros((), device=self.device)  # steps before the first unsound loss
        self.seen: Counter[Any] = Counter()
        self.graphs: dict[Any, Graphed] = {}
        for optimizer in (self.generator_optimizer, self.student_optimizer):
            for group in optimizer.param_groups:
                group["capturable"] = True
        for hook in self.add_ons:
            hook.mix = BoxesOnDevice(self.seed, self.device)
        self.running: list[dict[str, Tensor]] = [{} for _ in self.hooks]

    def step(self) -> dict[str, Tensor]:
        self.factor.fill_(self.recipe.factor(self.step_count))
        kind = self._kind()
        self.seen[kind] += 1
        if not self.capturing or kind == "observing" or self.seen[kind] <= EAGER:
            terms = self._whole_step()
        else:
            if kind not in self.graphs:
                self.graphs[kind] = Graphed(self)
            terms = self.graphs[kind].replay(self)
        if self.step_count == self.recipe.steps:
            self.refuse_non_finite()
        return terms

    def _kind(self) -> Any:
        """What tells the steps apart that do other things."""
        if self.warming_up:
            observe = self.step_count >= self.recipe.warmup_steps - self.recipe.observe_steps
            return "observing" if observe else "generator"
        return tuple(
            "mix" if hook.turn % 2 else hook.loss and hook.evaluations % hook.interval == 0
            for hook in self.add_ons
        )

    def _whole_step(self) -> dict[str, Tensor]:
        """A step, after which the averages of the hooks are where they were."""
        terms = super().step()
        for hook, lasting in zip(self.hooks, self.running, strict=True):
            for name, value in getattr(hook, "running", {}).items():
                lasting.setdefault(name, torch.empty_like(value)).copy_(value)
            if lasting:
                hook.running = dict(lasting)
        return terms

    @property
    def _factor(self) -> Tensor:
        return self.factor

    def _shifted(self, images: Tensor) -> Tensor:
        return shifted_on_device(images, self.rng) if self.recipe.shift else images

    def _watch(self, terms: dict[str, Tensor]) -> None:
        values = torch.stack([term.float() for term in terms.values()])
        self.found_inf.copy_(self.found_inf.maximum(values.isfinite().logical_not().any()))
        self.sound += 1 - self.found_inf

    def refuse_non_finite(self) -> None:
        if self.found_inf.item():
            raise NonFiniteLossError(
                f"seed {self.seed}: a loss was not finite {self.sound.item():.0f} steps after the "
                f"start or the last --resume; this is step {self.step_count}"
            )


class Graphed:
    """A step as one CUDA graph, and what it counts in Python."""

    def __init__(self, trainer: GraphedTrainer) -> None:
        self.counters = [(trainer, "step_count")]
        self.counters += [
            (hook, name) for hook in trainer.add_ons for name in ("turn", "evaluations")
        ]
        self.graph = torch.cuda.CUDAGraph()
        for rng in (trainer.rng, *(getattr(h, "mix", h).rng for h in trainer.hooks)):
            self.graph.register_generator_state(rng)
        before = [getattr(owner, name) for owner, name in self.counters]
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            self.terms = trainer._whole_step()
        self.changes = []
        for (owner, name), count in zip(self.counters, before, strict=True):
            self.changes.append(getattr(owner, name) - count)
            setattr(owner, name, count)  # nothing has run yet
        self.gradients = [p.grad for p in trainer.generator.parameters()]

    def replay(self, trainer: GraphedTrainer) -> dict[str, Tensor]:
        self.graph.replay()
        for (owner, name), change in zip(self.counters, self.changes, strict=True):
            setattr(owner, name, getattr(owner, name) + change)
        for p, gradient in zip(trainer.generator.parameters(), self.gradients, strict=True):
            p.grad = gradient
        return self.terms


class BoxesOnDevice(LinearInterpolation):
    """AGM's interpolation, all of it drawn on the device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__(seed=seed, regions=True)
        self.rng = self._rng = torch.Generator(device).manual_seed(seed)

    def _permutation(self, images: Tensor) -> Tensor:
        return self._uniform(len(images)).argsort()

    def _weight(self, images: Tensor) -> Tensor:
        n, size = images.shape[0], images.shape[2:]
        return regions(self._uniform(n), self._uniform(n, len(size)), size)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.rng, device=self.rng.device)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.set_state(state["rng"].cpu())


class RealImagesOnDevice(RealImages):
    """The same with images, and all that is drawn, on the device."""

    def __init__(self, task: Task, *, seed: int) -> None:
        super().__init__(task, seed=seed)
        self.images, self.labels = self.images.to(task.device), self.labels.to(task.device)
        self.rng = torch.Generator(task.device).manual_seed(seed)

    def student_batch(self, *, images: Tensor, labels: Tensor | None = None) -> Any:
        draws: dict[str, Any] = {"generator": self.rng, "device": self.rng.device}
        chosen = torch.randint(len(self.images), (len(images),), **draws)
        mirrored = torch.rand(len(images), 1, 1, 1, **draws) < 0.5
        batch = self.images[chosen]
        batch = torch.where(mirrored, batch.flip(3), batch)
        return shifted_on_device(batch, self.rng), self.labels[chosen]


def shifted_on_device(images: Tensor, rng: torch.Generator) -> Tensor:
    """:func:`baselines.training.shifted.shifted`, by offsets that are drawn on the device."""
    size, device = images.shape[-1], images.device
    most, places = size // 8, torch.arange(size, device=device)
    offsets = torch.randint(-most, most + 1, (2, 1), generator=rng, device=device)
    for dim, offset in zip((2, 3), offsets, strict=True):
        inside = (places + offset).abs()  # reflected at the first edge, then at the last
        images = images.index_select(dim, size - 1 - (size - 1 - inside).abs())
    return images.contiguous(memory_format=torch.channels_last)


@functools.cache
def _stream(device: str) -> torch.cuda.Stream:
    """Not the default one, on which nothing can be captured; one for all, as its memory is."""
    return torch.cuda.Stream(device)


class Comparison(compare.Comparison):
    """compare.py's, that reports this command, and keeps its folders to it."""

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"program": PROGRAM}

    def _command(self) -> str:
        return super()._command().replace(compare.PROGRAM, PROGRAM, 1)


def main(argv: list[str]) -> int:
    """compare.py's exit status."""
    if not torch.distributed.is_torchelastic_launched():
        argv = [*argv, "--jobs", "1"]  # in this process, whose classes are these
    try:
        args = command_line.parse(argv)
        if not args.device.startswith("cuda") or args.parallel:
            raise UsageError("graphs need --device cuda on a machine with a GPU, and no --parallel")
    except UsageError as error:
        print(f"graphed.py: error: {error}", file=sys.stderr)
        return 2
    run.Trainer, compare.RealImages = GraphedTrainer, RealImagesOnDevice  # type: ignore[misc]
    compare.Comparison = Comparison  # type: ignore[misc]
    from benchmarks.evidence.kernels import fused  # Triton, which only builds for CUDA bring

    with fused():
        return compare.main(argv)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
