"""What made a figure."""

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def provenance(device: str) -> dict[str, Any]:
    """``versions``, with the commit of this program, and ``machine``, as a report states them."""
    packages = {"torch": torch.__version__}
    for name in ("torchvision", "numpy", "timm", "onnxruntime", "openvino"):  # imported yet or not
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        "versions": {"python": platform.python_version(), "commit": _commit()} | packages,
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if "cuda" in device else None,
        },
    }


def _commit() -> str | None:
    """12 digits, ``-dirty`` if some code is not committed (results may be), None without git."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parents[1]
        try:
            run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
        except OSError:  # not installed
            return ""
        return run.stdout.strip() if run.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", "*.py")
    return f"{commit}-dirty" if commit and changed else commit or None
