"""A grid's cells side by side: in processes of this machine, or in those that torchrun started.

Whoever works on a cell holds a lock on its claim, which is gone with the process however it ends.
"""

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor

from benchmarks import progress
from benchmarks.errors import UsageError
from benchmarks.report import Cell

# How soon, in seconds, a process sees what another one did.
POLL = 0.2

Run = Callable[[Cell], Cell]


def one_thread() -> None:
    """One CPU thread a process, so that results do not depend on how many run side by side.

    OMP_NUM_THREADS=N, which PyTorch reads, makes it N.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)


def number_of_jobs(asked: int | None, cells: int, device: str) -> int:
    """How many cells to run at once: as many as asked for, or as fit, and no more than there are.

    Args:
        asked: None or -1 for one a GPU, or as many as the CPU's cores have room for.
        device: ``"cuda"`` stands for all GPUs, ``"cuda:1"`` for that one.

    Raises:
        UsageError: ``asked`` is 0 or below -1.
    """
    if asked is not None and asked < 1 and asked != -1:
        raise UsageError(f"--jobs must be at least 1, or -1 for all cores or GPUs; got {asked}")
    room = 1
    if device == "cuda":
        room = torch.cuda.device_count()
    elif device == "cpu":
        room = cpu_count() // torch.get_num_threads()
    return max(1, min(room if asked in (None, -1) else asked, cells))


def claimed(folder: Path, cell: Cell, *, blocking: bool = True) -> Any:
    """A context with a cell to oneself; without ``blocking`` it raises Timeout if it is taken.

    Across machines it needs a file system whose locks all of them see, as NFS 4's are. Where there
    are none, of which :func:`benchmarks.process.locked` warns, ``blocking`` claims hold nothing.
    """
    folder.mkdir(exist_ok=True)
    try:
        return FileLock(folder / cell["name"]).acquire(blocking=blocking)
    except Timeout:
        raise
    except OSError as error:
        if blocking:
            return contextlib.nullcontext()
        raise UsageError(
            f"{folder} has no locks ({error.strerror or error}), by which ranks share cells out; "
            "choose an --out that has, or --parallel batch"
        ) from error


def shared(cells: Sequence[Cell], folder: Path, stop: Callable[[], bool]) -> Iterator[Cell]:
    """Every cell in turn as its claim is to be had, until all have been: another rank may have
    finished it, or may have died in it. The claim is held until the next one is asked for.
    """
    waiting = deque(cells)
    while waiting and not stop():
        for cell in [waiting.popleft() for _ in range(len(waiting))]:
            if stop():
                return
            try:
                with claimed(folder, cell, blocking=False):
                    yield cell
            except Timeout:
                waiting.append(cell)
        time.sleep(POLL)


def side_by_side(
    cells: Sequence[Cell],
    jobs: int,
    make: Callable[[int, Callable[[], bool]], Run],
    stop: Callable[[], bool],
    watch: Callable[[dict[str, str]], None] = lambda steps: None,
) -> Iterator[tuple[Cell, Callable[[], Cell]]]:
    """Cells as they end, each with a call that gives its row or raises its error.

    A process that is killed takes its cell with it and no other: each job has a pool of its own,
    since loky ends all processes of a pool in which one died.

    Args:
        make: (job's number, whether to stop) -> a cell's run; called in the job's process.
        stop: once it is true every process ends its step, saves, and raises what its run raises.
        watch: told now and then which cells run, and their steps.
    """
    pools: dict[int, ProcessPoolExecutor] = {}
    running: dict[Future[Cell], tuple[int, Cell]] = {}
    waiting, free = deque(cells), list(range(jobs))
    with tempfile.TemporaryDirectory(prefix="agm-") as folder:
        told, notes = Path(folder, "stop"), [Path(folder, str(job)) for job in range(jobs)]
        try:
            while running or (waiting and not stop()):
                while waiting and free and not stop():
                    job, cell = free.pop(0), waiting.popleft()
                    if job not in pools:
                        begin = (os.getpid(), notes[job], partial(make, job, told.exists))
                        pools[job] = ProcessPoolExecutor(1, initializer=_begin, initargs=begin)
                    notes[job].unlink(missing_ok=True)
                    running[pools[job].submit(_work, cell)] = job, cell
                if stop():
                    told.touch()
                for future in wait(running, POLL, FIRST_COMPLETED).done:
                    job, cell = running.pop(future)
                    if isinstance(future.exception(), BrokenExecutor):
                        pools.pop(job).shutdown(kill_workers=True)
                    free.append(job)
                    yield cell, future.result
                watch({cell["name"]: _text(notes[job]) for job, cell in running.values()})
        finally:
            told.touch()
            wait(running)
            for pool in pools.values():
                pool.shutdown(kill_workers=True)


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):  # not written yet
        return path.read_text()
    return ""


def _begin(parent: int, note: Path, make: Callable[[], Run]) -> None:
    """In a job's process: it hears of signals, and of their end, from ``parent`` alone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which a terminal sends to all at once
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    one_thread()
    progress.is_job(note)
    _JOB["make"] = make


def _work(cell: Cell) -> Cell:
    if "run" not in _JOB:  # not in _begin, where an error would lose its name
        _JOB["run"] = _JOB["make"]()
    return _JOB["run"](cell)


_JOB: dict[str, Any] = {}


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    os._exit(1)
