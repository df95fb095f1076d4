"""Temporal diversity: does the generator still move, and do its images differ?"""

import sys
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agm.errors import AgmValueError, check_state
from agm.functional import at_least_float32
from agm.networks import Network, without_wrapper


class DiversityProbe:
    """Watch a generator through fixed latents.

    Each call runs the generator on the same latents and compares with the call before:

    * ``image_movement``, ``feature_movement``: mean over samples of ||now - before|| / ||before||.
      Near 0 the generator stagnates. NaN in the first call.
    * ``batch_similarity``: mean cosine similarity of the features of two different samples, each
      centred on no mean, in [-1, 1]. Near 1 the batch is homogeneous.
    * ``snapshot_similarity``: mean cosine similarity of a sample's features with *other* samples'
      features of the call before. NaN in the first call.
    * ``gradient_norm``: of the generator's parameters as they are; NaN if it has none.

    Features are what the linear layer that the teacher runs last receives (its output if it has
    none, or one that runs at every place, not once a sample). Nothing is left behind: training
    modes, a module's buffers and torch's RNGs are as before the call. What the networks draw in
    their forwards is the same in every call; their own hooks run. Of DistributedDataParallel the
    module inside is asked, so that one rank may probe alone.

    Args:
        generator: a module or any callable, ``generator(*latents) -> images``; what another
            callable than a module changes, such as the buffers of one inside, stays changed.
        latents: its arguments, a tensor or a tuple, of which tensors are copied; of N >= 2 samples.
        teacher: images (N, ...) -> logits (N, C), a module.

    Source: what Luo et al., IEEE TCSVT 2024, doi 10.1109/TCSVT.2024.3399311, observe; the figures
    are this project's.

    Example:
        >>> probe = DiversityProbe(generator, (latents, labels), teacher)
        >>> row = probe()     # every k steps
    """

    def __init__(
        self,
        generator: Network,
        latents: Tensor | tuple[Any, ...],
        teacher: nn.Module,
    ) -> None:
        self.generator, self.teacher = without_wrapper(generator), without_wrapper(teacher)
        given = latents if isinstance(latents, tuple) else (latents,)
        self.latents = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in given)
        self.images: Tensor | None = None
        self.features: Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Measure once.

        Returns:
            The figures of the class's description by name, without units.

        Raises:
            AgmValueError: the generator gave fewer than 2 images; nothing has changed.
        """
        images, features = self._observe()
        if images.shape[0] < 2:
            raise AgmValueError(f"need at least 2 latents to compare, got {images.shape[0]}")
        nan = images.new_full((), torch.nan)
        row = {
            "image_movement": nan,
            "feature_movement": nan,
            "batch_similarity": _similarity(features, features),
            "snapshot_similarity": nan,
            "gradient_norm": self._gradient_norm(nan),
        }
        if self.images is not None and self.features is not None:
            row["image_movement"] = _movement(images, self.images)
            row["feature_movement"] = _movement(features, self.features)
            row["snapshot_similarity"] = _similarity(features, self.features)
        self.images, self.features = images, features
        return dict(zip(row, torch.stack(list(row.values())).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The latents, and the images and features of the last call."""
        return {"latents": self.latents, "images": self.images, "features": self.features}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where :meth:`state_dict` was taken, on the device of this probe's latents.

        Raises:
            AgmValueError: ``state`` lacks something; nothing has changed.
        """
        check_state(self, state, "latents", "images", "features")
        device = next((x.device for x in self.latents if isinstance(x, Tensor)), None)
        self.latents = tuple(x.to(device) if isinstance(x, Tensor) else x for x in state["latents"])
        self.images, self.features = state["images"], state["features"]

    def _observe(self) -> tuple[Tensor, Tensor]:
        """Images and features in float32, all state put back."""
        seen: list[Tensor] = []
        linears = [m for m in self.teacher.modules() if isinstance(m, nn.Linear)]
        tensors = [t for t in self.latents if isinstance(t, Tensor)]
        for network in (self.generator, self.teacher):
            tensors += network.parameters() if isinstance(network, nn.Module) else ()
        devices = {t.device.index for t in tensors if t.is_cuda}
        with torch.random.fork_rng(devices=list(devices)), ExitStack() as stack:
            rngs = [torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)]
            for rng in rngs:
                rng.manual_seed(0)  # noise is as fixed as the latents are
            for linear in linears:
                handle = linear.register_forward_pre_hook(
                    lambda _module, inputs, named: seen.append([*inputs, *named.values()][0]),
                    with_kwargs=True,
                )
                stack.callback(handle.remove)
            if "torch._dynamo" in sys.modules:  # what is compiled does not see new hooks
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            images = _on_copied_buffers(self.generator, *self.latents)
            logits = _on_copied_buffers(self.teacher, images)
            features = seen.pop() if seen else logits
            if len(features) != len(images) or features.ndim > 2:  # at every place, not a sample's
                features = logits
            # Clones: a generator may write to what it returned.
            return images.float().clone(), features.flatten(1).float().clone()

    def _gradient_norm(self, nan: Tensor) -> Tensor:
        parameters = self.generator.parameters() if isinstance(self.generator, nn.Module) else ()
        gradients = [at_least_float32(p.grad) for p in parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).to(nan) if gradients else nan


def _on_copied_buffers(network: Network, *inputs: Any) -> Tensor:
    """``network(*inputs)``; what BatchNorm would keep of it is thrown away."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    # Not functional_call, which takes neither scripted nor parallel networks, nor modules with two
    # names.
    own = [(m._buffers, name, b) for m in modules for name, b in m._buffers.items()]
    copies = {id(buffer): buffer.clone() for _, _, buffer in own if buffer is not None}
    try:
        for buffers, name, buffer in own:
            buffers[name] = copies.get(id(buffer))
        return network(*inputs)
    finally:
        for buffers, name, buffer in own:
            buffers[name] = buffer


def _movement(now: Tensor, before: Tensor) -> Tensor:
    """Mean over samples of the relative Euclidean distance."""
    before = before.to(now)
    distance, length = (x.reshape(len(now), -1).norm(dim=1) for x in (now - before, before))
    return (distance / length.clamp(min=1e-12)).mean()


def _similarity(now: Tensor, before: Tensor) -> Tensor:
    """Mean cosine similarity over pairs of different samples, (N, D) x (N, D) -> ()."""
    now, before = F.normalize(now, dim=1), F.normalize(before.to(now), dim=1)
    n = len(now)
    of_all = (now.sum(0) * before.sum(0)).sum()  # over all pairs, a sample's with itself among them
    return (of_all - (now * before).sum()) / (n * (n - 1))
