"""Files that run code when they are unpickled: each trap touches a file, the canary."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Call:
    """Unpickles to ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Built:
    """Unpickles to an object of this class, and only then calls."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: dict[str, Any]):
        os.system(*state["arguments"])


# Each takes a shell command and the same in Python.
TRAPS = {
    "os.system": lambda shell, python: Call(os.system, shell),
    "subprocess.Popen": lambda shell, python: Call(subprocess.Popen.wait, _Popen(shell)),
    "eval": lambda shell, python: Call(eval, python),
    "exec": lambda shell, python: Call(exec, python),
    "deep inside": lambda shell, python: [{"a": ({"b": Call(os.system, shell)},)}],
    "a key": lambda shell, python: {Call(os.system, shell): 1},
    "numpy.reconstruct": lambda shell, python: np.array([Call(os.system, shell)], dtype=object),
    "a tensor's type": lambda shell, python: Call(
        torch._tensor._rebuild_from_type_v2, os.system, int, (shell,), {}
    ),
    "__setstate__": lambda shell, python: Built(shell),
    "an import": lambda shell, python: sys.modules["agm_trap"].Trap(),
}
CONTAINERS = ("pickle", "zip", "legacy", "tar")


class _Popen(Call):
    def __init__(self, shell: str):
        super().__init__(subprocess.Popen, ["sh", "-c", shell])


def trap(name: str, canary: Path) -> bytes:
    """The pickle of a state dict with a trap in it. The import's module lies in canary's folder."""
    python = f"open({str(canary)!r}, 'w').close()"
    (canary.parent / "agm_trap.py").write_text(f"{python}\nclass Trap: pass\n")
    module = types.ModuleType("agm_trap")
    module.Trap = type("Trap", (), {"__module__": "agm_trap"})
    sys.modules["agm_trap"] = module  # pickle asks for it; nobody else may find it there
    try:
        content = TRAPS[name](f"touch '{canary}'", python)
        return pickle.dumps({"state_dict": {"conv1.weight": content}}, protocol=2)
    finally:
        del sys.modules["agm_trap"]


def contained(pickled: bytes, container: str) -> bytes:
    """The file that torch.load would look for a pickle in."""
    if container == "pickle":
        return pickled
    if container == "legacy":
        head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
        parts = [pickle.dumps(part, protocol=2) for part in head]
        return b"".join([*parts, pickled, pickle.dumps([], protocol=2)])
    buffer = io.BytesIO()
    if container == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                member = tarfile.TarInfo(name)
                member.size = len(pickled)
                tar.addfile(member, io.BytesIO(pickled))
        return buffer.getvalue()
    torch.save({}, plain := io.BytesIO())
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickled if name.endswith("data.pkl") else source.read(name))
    return buffer.getvalue()
