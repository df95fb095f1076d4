"""A whole run: from a teacher to its quantized network, measured, checkpointed, resumable."""

import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from numbers import Integral
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor, fx, nn

from agm import DiversityProbe, Hook
from baselines import methods
from baselines.defaults import torch_defaults
from baselines.errors import CheckpointError, ConfigError
from baselines.quantization import checkpoint
from baselines.quantization.copying import image_channels
from baselines.quantization.export import Exported, export_onnx
from baselines.quantization.policy import BitPolicy, QuantizationConfig
from baselines.quantization.quantizers import check_choice
from baselines.training.parallel import ALONE, Ranks
from baselines.training.recipe import Recipe
from baselines.training.trainer import GLOBAL_RNG, Trainer

METHODS = {
    found.name: import_module(f"{methods.__name__}.{found.name}")
    for found in iter_modules(methods.__path__)
}
RECIPES = ("quick", "paper")
RECORDS = 20


class Interrupted(Exception):
    """The caller asked to stop; the run's checkpoint, if it has one, is saved."""


@dataclass
class Result:
    """What a run leaves.

    Attributes:
        model: the quantized network in eval mode.
        config, policy: how it is quantized; ``print(policy)`` is a table.
        history: one dict a record: ``step``, the losses, and where measured ``accuracy`` and the
            diversity probe's figures. The first accuracy is that straight after quantization.
        images: synthetic images of the last generator, (64, C, s, s), normalised as the teacher's.
        seconds: of training, without evaluation and probes; steps_per_s likewise.
        recipe, precision: what was used.
    """

    model: fx.GraphModule
    config: QuantizationConfig
    policy: BitPolicy
    history: list[dict[str, float]]
    images: Tensor
    seconds: float
    steps_per_s: float
    recipe: Recipe
    precision: str
    accuracies: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.accuracies = [row["accuracy"] for row in self.history if "accuracy" in row]

    def save(self, path: str | Path) -> None:
        """Write the quantized network; :func:`baselines.load_quantized` reads it."""
        checkpoint.save_quantized(self.model, path)

    def export_onnx(self, path: str | Path, *, arithmetic: str = "integer") -> Exported:
        """Write it as an ONNX file that runs in integers; what comes back prints as a table.

        See :func:`baselines.export_onnx`, which is given this run's images.
        """
        return export_onnx(self.model, path, self.images, arithmetic=arithmetic)


def quantize(
    teacher: nn.Module,
    *,
    method: str = "gdfq",
    weight_bits: int = 3,
    act_bits: int = 3,
    hooks: Sequence[Hook] = (),
    image_size: int = 32,
    in_channels: int | None = None,
    recipe: str = "quick",
    steps: int | None = None,
    batch_size: int | None = None,
    activations: str | None = None,
    scheme: str = "asymmetric",
    edge_bits: int | None = None,
    input_mean: Sequence[float] | float | None = None,
    input_std: Sequence[float] | float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "auto",
    ranks: Ranks = ALONE,
    evaluate: Callable[[nn.Module], float | Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    records: int = RECORDS,
    checkpoint_path: str | Path | None = None,
    checkpoint_every: int = 200,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int, dict[str, Tensor]], None] = lambda step, terms: None,
    on_policy: Callable[[BitPolicy], None] = lambda policy: None,
) -> Result:
    """Quantize a trained classifier without data.

    ``paper`` trains as the methods' papers say (80,000 steps) and quantizes what comes out of
    ReLUs, with the exceptions that the ``paper`` functions of the methods' files name. ``quick`` is
    ours, for two CPU cores: every tensor that a Conv or Linear reads is quantized, with 8 bits for
    the image, averages and the last layers' input and ``act_bits`` for the rest; the activations'
    steps are learned (Esser et al., ICLR 2020), every third layer of the student follows the
    teacher's, images of 32 pixels and more are shifted, and from 50 classes on the label enters the
    generator's BatchNorms (but Qimera's). Rates are in steps of quantization, statistics in units
    of their layer, and large images start from a small grid, so that it suits other networks than
    it was tuned on (all chosen in ``benchmarks/evidence/results/ablation.md``).

    Args:
        teacher: images (N, C, s, s) -> logits, with BatchNorm, Conv, Linear and ReLU; untouched.
        method: a name in ``METHODS``: ``"gdfq"``, ``"qimera"``, ``"adadfq"``.
        weight_bits, act_bits: 2 to 8.
        hooks: a list of add-ons, e.g. ``[AGM()]``; each run needs its own.
        image_size: s, a multiple of 4.
        in_channels: C, of the images (default: that of the first convolution that runs, which is
            wrong for a network that repeats grey images to three channels inside).
        recipe: ``"quick"`` or ``"paper"``.
        steps, batch_size: in place of the recipe's; the proportions of the schedule stay.
        activations: which are quantized, in place of the recipe's: ``"inputs"`` (``quick``), all
            that weighted layers read, or ``"relu"`` (``paper``), what comes out of ReLUs.
        scheme, edge_bits: see :class:`baselines.quantization.policy.QuantizationConfig`.
        input_mean, input_std: see :class:`baselines.training.trainer.Trainer`.
        seed, device, precision, ranks: see :class:`baselines.training.trainer.Trainer`. Every rank
            calls this with the same arguments; rank 0 alone reads and writes checkpoints.
        evaluate: quantized network -> accuracy, or several figures by name, ``"accuracy"`` one of
            them, which history takes. Called straight after quantization, then every so often, and
            after the last step. Never used for training or selection: ``model`` is that of the
            last step.
        eval_every: steps between two calls of ``evaluate``, >= 1 (default: at every record).
        records: how often history is written, evenly over the run.
        checkpoint_path, checkpoint_every, resume: where and how often (every so many steps, >= 1)
            to save the run, and whether to go on from there, or from the start if there is none;
            the result is then bit-identical to an unbroken run with hooks of the same settings, as
            their reprs tell them.
        stop: asked after every step; True saves and raises :class:`Interrupted`, but for the last.
        on_step, on_policy: told the step, counted from 0, and its losses, and the policy before
            training.

    Raises:
        BaselineError: see :mod:`baselines.errors`; always before the first step, or with the
            weights of the step before.
        Interrupted: ``stop`` said so.
    """
    checkpoint_every = _whole("checkpoint_every", checkpoint_every, least=1)
    records = _whole("records", records, least=1)
    eval_every = None if eval_every is None else _whole("eval_every", eval_every, least=1)
    image_size, seed = _whole("image_size", image_size), _whole("seed", seed)
    in_channels = None if in_channels is None else _whole("in_channels", in_channels, least=1)
    calls = {"stop": stop, "on_step": on_step, "on_policy": on_policy}
    calls |= {} if evaluate is None else {"evaluate": evaluate}
    for name, call in calls.items():
        if not callable(call):
            raise ConfigError(f"{name} must be a function, got {call!r}")
    if checkpoint_path is None and resume:
        raise ConfigError("resume needs checkpoint_path, the file to go on from")
    if checkpoint_path is not None:
        (checkpoint.check_place if resume else checkpoint.check_own)(checkpoint_path)
    trainer = make_trainer(
        teacher,
        method=method,
        weight_bits=weight_bits,
        act_bits=act_bits,
        hooks=hooks,
        image_size=image_size,
        in_channels=in_channels,
        recipe=recipe,
        steps=steps,
        batch_size=batch_size,
        activations=activations,
        scheme=scheme,
        edge_bits=edge_bits,
        input_mean=input_mean,
        input_std=input_std,
        seed=seed,
        device=device,
        precision=precision,
        ranks=ranks,
    )
    plan, config = trainer.recipe, trainer.config
    on_policy(trainer.policy)
    run = _Run(trainer, evaluate, eval_every, records)
    identity = {
        "method": method,
        "plan": vars(plan),
        "config": vars(config),
        "seed": seed,
        "image_size": image_size,
        "input": [trainer.input_mean.tolist(), trainer.input_std.tolist()],
        "in_channels": in_channels,
        "precision": trainer.precision,
        "device": trainer.device.type,  # whose random numbers are others
        "teacher": checkpoint.fingerprint(trainer.teacher),  # its code, too
        "records": records,
        "ranks": ranks.size,
        "hooks": [_described(hook) for hook in trainer.hooks],
        "eval_every": eval_every,
    }
    if resume and checkpoint_path is not None:
        state = ranks.first(partial(checkpoint.load_newest, checkpoint_path))
        if state is not None:
            run.load_state_dict(state, identity)
    while trainer.step_count < plan.steps:
        on_step(trainer.step_count, run.advance())
        stopping = ranks.any(stop(), trainer.device)
        due = trainer.step_count % checkpoint_every == 0
        if checkpoint_path is not None and (stopping or due):
            ranks.first(partial(run.save, checkpoint_path, identity))
        if stopping and trainer.step_count < plan.steps:
            raise Interrupted(f"stopped after step {trainer.step_count} of {plan.steps}")
    return Result(
        model=trainer.student.requires_grad_(False).eval(),
        config=config,
        policy=trainer.policy,
        history=run.history,
        images=trainer.sample_images(64),
        seconds=run.seconds,
        steps_per_s=plan.steps / run.seconds,
        recipe=plan,
        precision=trainer.precision,
    )


def make_trainer(
    teacher: nn.Module,
    *,
    method: str,
    weight_bits: int,
    act_bits: int,
    hooks: Sequence[Hook] = (),
    image_size: int = 32,
    in_channels: int | None = None,
    recipe: str = "quick",
    steps: int | None = None,
    batch_size: int | None = None,
    activations: str | None = None,
    scheme: str = "asymmetric",
    edge_bits: int | None = None,
    **where: Any,
) -> Trainer:
    """The trainer that :func:`quantize` runs, all arguments checked; see there."""
    check_choice("method", method, METHODS)
    check_choice("recipe", recipe, RECIPES)
    image_size = _whole("image_size", image_size)
    where["seed"] = _whole("seed", where.get("seed", 0))
    weight_bits, act_bits, edge_bits = map(_python, (weight_bits, act_bits, edge_bits))
    losses, base = getattr(METHODS[method], recipe)(image_size)
    lengths = {"steps": steps, "batch_size": batch_size}
    changes: dict[str, Any] = {
        name: _whole(name, value, least=1) for name, value in lengths.items() if value is not None
    }
    changes |= {} if activations is None else {"activations": activations}
    plan = replace(base, **changes)
    config = plan.config(weight_bits, act_bits, scheme=scheme, edge_bits=edge_bits)
    if in_channels is None:
        in_channels = image_channels(teacher, image_size) or 3
    in_channels = _whole("in_channels", in_channels, least=1)
    shape = (in_channels, image_size, image_size)
    return Trainer(
        teacher, method=losses, recipe=plan, config=config, image_shape=shape, hooks=hooks, **where
    )


def _whole(name: str, value: Any, least: int = 0) -> int:
    """``value`` as Python's own integer, which is at least ``least``."""
    whole = _python(value)
    if not isinstance(whole, int) or not least <= whole < 2**63:
        raise ConfigError(f"{name} must be a whole number >= {least}, got {value!r}")
    return whole


def _python(value: Any) -> Any:
    """An integer of whatever library as Python's own, and anything else as it is."""
    return int(value) if isinstance(value, Integral) else value


def _described(hook: Hook) -> str:
    """What tells one hook from another: its own repr, but for addresses in it, or its class."""
    own = type(hook).__repr__ is not object.__repr__
    return checkpoint.without_addresses(repr(hook)) if own else type(hook).__name__


class _Run:
    """A trainer, its history and its clock."""

    def __init__(
        self,
        trainer: Trainer,
        evaluate: Callable[[nn.Module], float | Mapping[str, float]] | None,
        eval_every: int | None,
        records: int,
    ) -> None:
        self.trainer, self.evaluate = trainer, evaluate
        steps = trainer.recipe.steps
        self.record_at = {round(steps * (i + 1) / records) for i in range(records)}
        warmup = trainer.recipe.warmup_steps
        often = self.record_at if eval_every is None else range(0, steps, eval_every)
        self.evaluate_at = {warmup, steps, *(step for step in often if step > warmup)}
        latents = trainer.sample_latents(64, trainer.seed)
        self.probe = DiversityProbe(trainer.generator, latents, trainer.teacher)
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0

    def advance(self) -> dict[str, Tensor]:
        """One step, timed, and a record of it where one is due."""
        start = time.perf_counter()
        terms = self.trainer.step()
        if self.trainer.step_count in self.record_at:  # waits for the device: the clock is right
            row = {"step": self.trainer.step_count} | {k: v.item() for k, v in terms.items()}
        self.seconds += time.perf_counter() - start
        step = self.trainer.step_count
        if step in self.record_at:
            with GLOBAL_RNG, torch_defaults():
                figures = self.probe()
            self.history.append(row | figures)
        if self.evaluate is not None and step in self.evaluate_at:
            if not self.history or self.history[-1]["step"] != step:
                self.history.append({"step": step})
            self.history[-1] |= self._judged(self.evaluate, known=self.history[-1].keys())
        return terms

    def _judged(self, evaluate: Callable[[nn.Module], Any], known: Set[str]) -> dict[str, float]:
        """Its figures of the student, which stays as it was; ``known`` names are taken."""
        student = self.trainer.student
        before = [buffer.clone() for buffer in student.buffers()]
        figures = evaluate(student)
        student.requires_grad_(True).eval().to(self.trainer.device)
        for buffer, value in zip(student.buffers(), before, strict=True):  # in train mode they move
            buffer.copy_(value)
        if any(p.dtype != torch.float32 for p in student.parameters()):
            raise ConfigError(
                "evaluate left the student in another dtype than float32; let it change a copy, "
                "copy.deepcopy(model)"
            )
        given = figures if isinstance(figures, Mapping) else {"accuracy": figures}
        try:
            named = {name: float(value) for name, value in given.items()}
        except (TypeError, ValueError):
            named = {}
        if "accuracy" not in named or named.keys() & known:
            raise ConfigError(
                "evaluate must return an accuracy, or figures by name, 'accuracy' one of them and "
                f"none of {', '.join(known)}; got {figures!r}"
            )
        return named

    def save(self, path: str | Path, identity: dict[str, Any]) -> None:
        checkpoint.save(path, self.state_dict(identity), keep_previous=True)

    def state_dict(self, identity: dict[str, Any]) -> dict[str, Any]:
        return {
            "identity": identity,
            "trainer": self.trainer.state_dict(),
            "probe": self.probe.state_dict(),
            "history": self.history,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any], identity: dict[str, Any]) -> None:
        theirs = state.get("identity", {})
        differing = [k for k in identity if theirs.get(k) != identity[k]]
        if differing:
            raise CheckpointError(
                f"the checkpoint is of another run: {', '.join(differing)} differ; repeat the "
                "command that it was made with, or start anew in another folder"
            )
        self.trainer.load_state_dict(state["trainer"])
        self.probe.load_state_dict(state["probe"])
        self.history, self.seconds = state["history"], state["seconds"]
