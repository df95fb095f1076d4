"""What a person runs. A program imports this first, which ends it where something is missing."""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

# The extra "bench" of pyproject.toml.
NEEDED = (
    "torch", "torchvision", "numpy", "sklearn", "tqdm", "matplotlib", "scipy", "PIL", "joblib",
    "filelock",
)  # fmt: skip


def _refusal() -> str:
    if sys.version_info < (3, 10):  # noqa: UP036 - which pip alone would have refused
        have = ".".join(map(str, sys.version_info[:3]))
        return f"Python 3.10 or newer is needed, this is {have}: make a virtual environment of one"
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not missing:
        return ""
    folder = Path(__file__).resolve().parents[1]
    return f"{', '.join(missing)} not installed: run `pip install -e '.[bench]'` in {folder}"


if _why := _refusal():
    print(f"{Path(sys.argv[0]).name}: error: {_why}", file=sys.stderr)
    raise SystemExit(2)
if (_program := Path(sys.argv[0]).resolve()).is_relative_to(Path(__file__).resolve().parent):
    # Python puts the program's folder first, whose names would hide what a user's network imports.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _program.parent]
    for _name in ("stdout", "stderr"):
        if getattr(sys, _name) is None:  # closed
            setattr(sys, _name, open(os.devnull, "w"))  # noqa: SIM115 - for the whole program
        getattr(sys, _name).reconfigure(errors="replace")  # some write no arrows
    # Ctrl-C while the libraries are imported, some seconds, ends a program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
