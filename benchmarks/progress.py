"""What a grid shows on stderr while it runs.

On a terminal a bar for the grid and below it the run of now, or the names of those side by side;
elsewhere, as in a log, a line for each cell that has ended.
"""

import contextlib
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from tqdm import tqdm

# In a job's process: the file that its run's step is written to, for the grid's process to show.
_JOB: dict[str, Path] = {}


def is_job(note: Path) -> None:
    """From now on this process shows nothing itself and writes its run's step to ``note``."""
    _JOB["note"] = note
    tqdm.set_lock(threading.RLock())  # else one for all processes, which a killed job leaks


def shown() -> bool:
    """Whether this process has a terminal to itself: not a job, nor torchrun's second rank."""
    return sys.stderr.isatty() and not _JOB and os.environ.get("RANK", "0") == "0"


def of_run(steps: int, name: str) -> tqdm:
    """The bar of a run, gone when it ends."""
    if _JOB:
        note = _Note(_JOB["note"])
        return tqdm(total=steps, file=note, bar_format="{n_fmt}/{total_fmt}", mininterval=0.5)
    return tqdm(
        total=steps, desc=name, unit="step", leave=False, dynamic_ncols=True, mininterval=0.5,
        disable=not shown(),
    )  # fmt: skip


def tell(line: str) -> None:
    """A line on stderr, above the bars."""
    tqdm.write(line, file=sys.stderr)


class OfGrid:
    """The bar of a grid, to be closed.

    Args:
        cells: how many there are.
        done: of them, before.
        quiet: neither bar nor lines, as on all ranks but one.
    """

    def __init__(self, cells: int, done: int, *, quiet: bool = False) -> None:
        self.cells, self.done, self.quiet = cells, done, quiet
        hidden = quiet or done == cells or not shown()
        settings: dict[str, Any] = {"dynamic_ncols": True, "disable": hidden}
        self.bar = tqdm(total=cells, initial=done, desc="runs", unit="run", **settings)
        self.line: tqdm | None = None

    def ended(self, name: str, how: str) -> None:
        """A cell has, with success or not."""
        self.done += 1
        self.bar.update()
        if self.bar.disable and not self.quiet:
            tell(f"[{self.done}/{self.cells}] {name}: {how}")

    def running(self, steps: dict[str, str]) -> None:
        """The cells that run side by side, and how far each is, where a job has told it."""
        if self.bar.disable:
            return
        if self.line is None:
            self.line = tqdm(bar_format="{desc}", leave=False)
        text = ", ".join(f"{name} {step}".rstrip() for name, step in steps.items())
        width = shutil.get_terminal_size().columns - 1
        self.line.set_description_str(text if len(text) <= width else f"{text[: width - 3]}...")
        self.bar.refresh()  # its clock

    def close(self) -> None:
        if self.line is not None:
            self.line.close()
        self.bar.close()


class _Note:
    """A file for a bar of tqdm, which holds its newest state."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str) -> None:
        if text := text.strip():
            with contextlib.suppress(OSError):  # a full disk is for the run's files to complain of
                self.path.write_text(text)

    def flush(self) -> None:
        pass
