"""torch's defaults as they come, whatever the caller has set."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_users = 0
_callers_dtype = torch.float32


@contextmanager
def torch_defaults() -> Iterator[None]:
    """float32 and the CPU for new tensors, no inference mode and no autocast.

    All is computed as if the caller had set none of them, and they come back; also a decorator.
    Threads may overlap inside.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_float32())
        yield


@contextmanager
def _float32() -> Iterator[None]:
    """The default dtype is the process's: the first to come sets it, the last to go restores it."""
    global _users, _callers_dtype
    with _lock:
        if not _users:
            _callers_dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                torch.set_default_dtype(_callers_dtype)
