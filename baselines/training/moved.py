"""Images mirrored and shifted, so that nothing is learned from where exactly they are."""

import torch
import torch.nn.functional as F
from torch import Tensor

Moves = tuple[Tensor, int, int]


def draw_moves(n: int, size: int, rng: torch.Generator) -> Moves:
    """Which of n images to mirror, (n,) bool, and by how much to shift all: rows, columns.

    Args:
        rng: on the CPU, so that no step waits for the device.
    """
    mirror = torch.rand(n, generator=rng) < 0.5
    rows, columns = torch.randint(-(size // 8), size // 8 + 1, (2,), generator=rng).tolist()
    return mirror, rows, columns


def moved(images: Tensor, moves: Moves) -> Tensor:
    """The images, (N, C, s, s), mirrored and shifted, their edges reflected; differentiable."""
    mirror, rows, columns = moves
    size, most = images.shape[-1], images.shape[-1] // 8
    mirror = mirror.to(images.device, non_blocking=True)[:, None, None, None]
    images = torch.where(mirror, images.flip(3), images)
    if rows or columns:
        padded = F.pad(images, (most,) * 4, mode="reflect")
        images = padded.narrow(2, most + rows, size).narrow(3, most + columns, size)
    return images.contiguous(memory_format=torch.channels_last)
