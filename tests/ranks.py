"""A function in several processes of torch.distributed, over gloo."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(folder: Path, function: Callable[..., Any], *args: Any, size: int = 2) -> list[Any]:
    """What ``function(rank, size, *args)`` gives in each of ``size`` processes."""
    name = f"{function.__name__}-{time.monotonic_ns()}"
    mp.spawn(_call, (size, folder / name, function, args), nprocs=size)
    return [torch.load(folder / f"{name}.{rank}", weights_only=False) for rank in range(size)]


def _call(rank: int, size: int, place: Path, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size)
    torch.save(function(rank, size, *args), f"{place}.{rank}")
    dist.barrier()  # a rank that leaves closes the others' connections
    dist.destroy_process_group()
    # DDP's reducer keeps gloo's threads alive after the group; an interpreter that is torn down
    # under them aborts now and then.
    os._exit(0)
