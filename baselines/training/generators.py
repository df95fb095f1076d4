"""Image generators: a latent to an image, by nearest-neighbour upsamplings."""

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.errors import ConfigError


class Decoder(nn.Module):
    """(N, latent_dim) -> (N, channels, s, s), each channel of the batch standardised.

    linear to width x (s/4)^2 -> BN -> x2 -> conv -> BN -> LeakyReLU -> x2 -> conv, half as wide
    -> BN -> LeakyReLU -> conv -> tanh -> BN without affine. The BNs after convolutions have the
    published eps of 0.8.

    Args:
        num_classes: with a number, the BNs' affine parameters are one set per class.
        width: of the first convolution (default 128, the published one).
        largest_start: with a number, the linear layer's grid is halved until its side is no larger
            (or odd), and as many times x2 -> conv -> BN -> LeakyReLU come before the rest: what is
            near in an image then starts alike. None (default) as published.
    """

    def __init__(
        self,
        latent_dim: int,
        image_size: int,
        channels: int,
        *,
        width: int = 128,
        num_classes: int | None = None,
        largest_start: int | None = None,
    ) -> None:
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise ConfigError(f"image_size must be a multiple of 4, got {image_size}")
        start, doublings = image_size // 4, 0
        while largest_start is not None and start > largest_start and start % 2 == 0:
            start, doublings = start // 2, doublings + 1
        self.start = (width, start, start)
        self.linear = nn.Linear(latent_dim, width * start**2)
        self.norm0 = ClassNorm(width, 1e-5, num_classes)
        self.earlier = nn.ModuleList(
            UpsampledConv2d(width, width, 3, padding=1) for _ in range(doublings)
        )
        self.earlier_norms = nn.ModuleList(
            ClassNorm(width, 0.8, num_classes) for _ in range(doublings)
        )
        self.conv1 = UpsampledConv2d(width, width, 3, padding=1)
        self.norm1 = ClassNorm(width, 0.8, num_classes)
        self.conv2 = UpsampledConv2d(width, width // 2, 3, padding=1)
        self.norm2 = ClassNorm(width // 2, 0.8, num_classes)
        self.conv3 = nn.Conv2d(width // 2, channels, 3, padding=1)
        self.standardise = nn.BatchNorm2d(channels, affine=False)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.linear(latents).view(-1, *self.start)
        x = self.norm0(x, labels)
        for conv, norm in zip(self.earlier, self.earlier_norms, strict=True):
            x = F.leaky_relu(norm(conv(x), labels), 0.2, inplace=True)
        x = F.leaky_relu(self.norm1(self.conv1(x), labels), 0.2, inplace=True)
        x = F.leaky_relu(self.norm2(self.conv2(x), labels), 0.2, inplace=True)
        return self.standardise(torch.tanh(self.conv3(x)))


class ClassNorm(nn.Module):
    """BatchNorm whose affine parameters are shared, or (``num_classes``) one set per class."""

    def __init__(self, channels: int, eps: float, num_classes: int | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=eps, affine=num_classes is None)
        if num_classes is not None:
            self.gain = nn.Embedding(num_classes, channels)
            self.shift = nn.Embedding(num_classes, channels)
            nn.init.ones_(self.gain.weight)
            nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        x = self.norm(x)
        if self.norm.affine:
            return x
        # In x's dtype and in one operation: under autocast several times faster, both ways.
        gain, shift = (of(labels).to(x.dtype)[..., None, None] for of in (self.gain, self.shift))
        return torch.addcmul(shift, x, gain)


class UpsampledConv2d(nn.Conv2d):
    """A 3 x 3 convolution, padding 1, of the image upsampled x2 (nearest neighbour)."""

    def forward(self, x: Tensor) -> Tensor:
        return upsampled_convolution(x, self.weight, self.bias)


def upsampled_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv2d(upsample(x), weight, bias, padding=1), from 2.25 times fewer multiply-adds.

    A 3 x 3 window of the upsampled image holds only 2 x 2 different pixels, so each of the four
    phases (row and column of the output, modulo 2) is a 2 x 2 convolution of x with sums of the
    weights: (a, b + c) for an even place and (a + b, c) for an odd one, in each direction.

    Args:
        x: (N, I, h, w); weight: (O, I, 3, 3); bias: (O,). Returns (N, O, 2h, 2w).
    """
    for dim in (2, 3):  # (O, I, 3, 3) -> (2, 2, O, I, 2, 2), a phase and a tap a direction
        a, b, c = weight.unbind(dim - 4)
        weight = torch.stack([torch.stack([a, b + c], dim - 4), torch.stack([a + b, c], dim - 4)])
    kernel = weight.transpose(0, 1).flatten(0, 2).contiguous(memory_format=torch.channels_last)
    return _Interleave.apply(F.conv2d(x, kernel, bias.repeat(4), padding=1))


class _Interleave(torch.autograd.Function):
    """(N, 4 O, h + 1, w + 1) -> (N, O, 2h, 2w); (2i + p, 2j + q) is (i + p, j + q) of a phase."""

    @staticmethod
    def forward(ctx: Any, phases: Tensor) -> Tensor:
        n, channels, h, w = phases.shape
        images = torch.empty(
            (n, channels // 4, 2 * (h - 1), 2 * (w - 1)),
            dtype=phases.dtype, device=phases.device, memory_format=torch.channels_last,
        )  # fmt: skip
        for image, phase in _places(images, phases):
            image.copy_(phase)
        return images

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        n, channels, h, w = grad.shape
        phases = torch.empty(
            (n, 4 * channels, h // 2 + 1, w // 2 + 1),
            dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last,
        ).zero_()  # fmt: skip
        for image, phase in _places(grad, phases):
            phase.copy_(image)
        return phases


def _places(images: Tensor, phases: Tensor) -> list[tuple[Tensor, Tensor]]:
    h, w = images.shape[2] // 2, images.shape[3] // 2
    return [
        (images[:, :, p::2, q::2], phase[:, :, p : p + h, q : q + w])
        for (p, q), phase in zip(product((0, 1), (0, 1)), phases.chunk(4, 1), strict=True)
    ]


class LabelledGenerator(nn.Module):
    """(z, y) -> images: z * embedding(y) on small images, class-conditional BNs on large ones.

    Args:
        many_classes: from this number on, class-conditional BNs on small images, too.
        latent_dim, width, largest_start: of the :class:`Decoder`.
    """

    def __init__(
        self, num_classes: int, image_size: int, channels: int, *, latent_dim: int, width: int,
        many_classes: int | None = None, largest_start: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes, self.latent_dim = num_classes, latent_dim
        many = many_classes is not None and num_classes >= many_classes
        conditional = num_classes if image_size > 64 or many else None
        self.embedding = None if conditional else nn.Embedding(num_classes, latent_dim)
        self.decoder = Decoder(
            latent_dim, image_size, channels, width=width, num_classes=conditional,
            largest_start=largest_start,
        )  # fmt: skip

    def sample(self, n: int, rng: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The inputs (z, y) for n images, and their labels y, (n,) integers."""
        z = torch.randn(n, self.latent_dim, generator=rng, device=rng.device)
        labels = torch.randint(self.num_classes, (n,), generator=rng, device=rng.device)
        return (z, labels), labels

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        if self.embedding is None:
            return self.decoder(z, labels)
        return self.decoder(z * self.embedding(labels))
