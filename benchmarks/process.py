"""Signals that let a step end, and one run a folder."""

import contextlib
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from benchmarks.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Stop:
    """SIGINT and SIGTERM: the first lets the step end, the second ends the program at once.

    The first is answered on stderr, since a step with its evaluation may take a while.
    """

    ANSWER = (
        b"\nstopping after this step; once more ends the program at once, and what came since the "
        b"last checkpoint is lost\n"
    )

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self) -> bool:
        return self.received is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        os.write(2, self.ANSWER)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Refuse a second run in one folder, or ``wait`` for the first to leave.

    The lock of a dead process is gone with it. Where the system or the folder has no locks, a
    warning says so, and nothing is refused.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder}: {error.strerror}; choose another --out"
        ) from error
    with file:
        try:
            _lock(file, wait)
        except BlockingIOError as error:
            raise UsageError(
                f"another run is working in {folder}; wait for it or choose another --out"
            ) from error
        except OSError as error:  # network and synced folders
            warnings.warn(
                f"{folder} cannot be locked ({error.strerror or error}); start no second run in it",
                stacklevel=3,
            )
        yield


def _lock(file: IO[str], wait: bool) -> None:
    if fcntl is None:
        raise OSError("this system has no fcntl")
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
