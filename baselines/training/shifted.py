"""Images shifted, so that nothing is learned from where exactly they are."""

import torch
import torch.nn.functional as F
from torch import Tensor


def draw_shift(size: int, rng: torch.Generator) -> tuple[int, int]:
    """Rows and columns to shift images of ``size`` pixels by, up to an eighth of it.

    Args:
        rng: on the CPU, so that no step waits for the device.
    """
    rows, columns = torch.randint(-(size // 8), size // 8 + 1, (2,), generator=rng).tolist()
    return rows, columns


def shifted(images: Tensor, rows: int, columns: int) -> Tensor:
    """The images, (N, C, s, s), all shifted alike, their edges reflected; differentiable."""
    size, most = images.shape[-1], images.shape[-1] // 8
    if rows or columns:
        padded = F.pad(images, (most,) * 4, mode="reflect")
        images = padded.narrow(2, most + rows, size).narrow(3, most + columns, size)
    return images.contiguous(memory_format=torch.channels_last)
