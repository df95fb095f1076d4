"""What a generated image must look like: the mean and deviation of a network's inputs."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from baselines.errors import ConfigError
from baselines.quantization.graph import BATCH_NORMS, run_order

# An estimated deviation within this factor of 1, with a mean within 1, is taken for standardised.
NEAR = 1.6
PROBE = 100.0  # how bright; between images of [0, 1] and of 16 bits, for rounding's sake


class InRange(nn.Module):
    """mean + std * generator(latents), the generator's images being standardised per channel.

    Args:
        mean, std: (C,), of the images that the teacher was trained on, as it takes them.
    """

    def __init__(self, generator: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.generator = generator
        self.sample = generator.sample
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", std[:, None, None], persistent=False)

    def forward(self, *latents: Tensor) -> Tensor:
        return torch.addcmul(self.mean, self.std, self.generator(*latents))


def input_range(
    network: fx.GraphModule,
    mean: Sequence[float] | float | None,
    std: Sequence[float] | float | None,
) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (C,), as given, else as the network's first BatchNorm tells them.

    Raises:
        ConfigError: one without the other, not one or C numbers, not finite, a deviation <= 0.
    """
    channels = network.meta["image_shape"][0]
    if (mean is None) != (std is None):
        raise ConfigError("give both input_mean and input_std, or neither")
    if mean is None or std is None:
        return _estimated(network)
    found = []
    for name, value in (("input_mean", mean), ("input_std", std)):
        try:
            tensor = torch.as_tensor(value, dtype=torch.float32, device="cpu").flatten()
        except (TypeError, ValueError, OverflowError, RuntimeError):
            tensor = torch.full((1,), torch.nan)
        if len(tensor) not in (1, channels) or not tensor.isfinite().all():
            raise ConfigError(
                f"{name} must be a finite number, or {channels}, one a channel; got {value!r}"
            )
        found.append(tensor.expand(channels))
    if (found[1] <= 0).any():
        raise ConfigError(f"input_std must be > 0, got {std!r}")
    return found[0], found[1]


@torch.no_grad()
def _estimated(network: fx.GraphModule) -> tuple[Tensor, Tensor]:
    """One level and one deviation for all channels; (0, 1) where they are near to that.

    What enters the first BatchNorm is, as a rule, an affine function of the image: the trained
    means tell the level, the trained variances, against those of smooth noise, the deviation.
    """
    shape = network.meta["image_shape"]
    standard = torch.zeros(shape[0]), torch.ones(shape[0])
    norm = next((m for m in run_order(network) if isinstance(m, BATCH_NORMS)), None)
    if norm is None or norm.running_mean is None or _untrained(norm):
        return standard
    black = _before(network, norm, torch.zeros(1, *shape))
    white = _before(network, norm, torch.full((1, *shape), PROBE))
    scale = (white - black).abs().max()
    for times in (-1, 2):
        change = _before(network, norm, torch.full((1, *shape), times * PROBE)) - black
        if not scale > 0 or (change - times * (white - black)).abs().max() > 1e-3 * scale:
            return standard  # not affine: nothing to be told
    spread = norm.running_var.clamp(min=1e-12).sqrt()
    gain, offset = (
        v.mean((0, *range(2, v.ndim))) / spread for v in ((white - black) / PROBE, black)
    )
    level = float((gain * (norm.running_mean / spread - offset)).sum() / gain.square().sum())
    # Less what padding makes of a constant image.
    noise = (_before(network, norm, PROBE * _smooth_noise(shape)) - black) / PROBE
    moment = noise.var((0, *range(2, noise.ndim)), correction=0)
    ratio = (norm.running_var / moment.clamp(min=1e-30)).median()
    deviation = float(ratio.sqrt())
    usable = math.isfinite(level) and math.isfinite(deviation) and deviation > 0
    if not usable or (1 / NEAR <= deviation <= NEAR and abs(level) <= 1):
        return standard
    warnings.warn(
        f"the network's first BatchNorm says that its inputs have a mean of about {level:.3g} and "
        f"a deviation of about {deviation:.3g}, and images are generated so; give input_mean and "
        "input_std if you know better",
        stacklevel=4,
    )
    return torch.full((shape[0],), level), torch.full((shape[0],), deviation)


def _untrained(norm: nn.Module) -> bool:
    return bool((norm.running_mean == 0).all() and (norm.running_var == 1).all())


def _before(network: fx.GraphModule, norm: nn.Module, images: Tensor) -> Tensor:
    """What enters ``norm``, for these images."""
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    try:
        network(images)
    finally:
        handle.remove()
    return seen[0]


def _smooth_noise(shape: tuple[int, int, int], n: int = 16) -> Tensor:
    """n grey images of standardised noise; amplitudes fall as 1 / frequency, as photographs' do."""
    _, h, w = shape
    noise = torch.randn(n, 1, h, w, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w)[None]
    frequency = (rows.square() + columns.square()).sqrt().clamp(min=1 / max(h, w))
    smooth = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(h, w))
    return ((smooth - smooth.mean()) / smooth.std()).expand(n, *shape)
