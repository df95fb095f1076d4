"""Files that survive: written aside, synced, renamed; verified before anything is parsed.

A file is MAGIC, the SHA-256 of the rest, and the rest: a ``torch.save`` archive, read back with
``weights_only=True`` and nothing else.
"""

import contextlib
import copy
import errno
import glob
import hashlib
import io
import os
import re
import warnings
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, fx, nn

from baselines.defaults import torch_defaults
from baselines.errors import CheckpointError
from baselines.quantization.copying import channels_last
from baselines.quantization.graph import check_quantized
from baselines.quantization.policy import QuantizationConfig
from baselines.quantization.quantizers import unquantized
from baselines.quantization.reference import same
from baselines.quantization.student import build_student
from baselines.quantization.tracing import traced

MAGIC = b"agm checkpoint 1\n"
DIGEST_SIZE = hashlib.sha256().digest_size


def save(path: str | Path, state: dict[str, Any], *, keep_previous: bool = False) -> None:
    """Write ``state`` to ``path``, as :func:`write` does."""
    path, buffer = as_path(path), io.BytesIO()
    try:
        torch.save(state, buffer)
        payload = buffer.getbuffer()
        torch.load(io.BytesIO(payload), weights_only=True)
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))  # in a page of torch's advice
        why = f"it holds a {found[1]}" if found else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} is not written, as nobody could read it back: a checkpoint takes tensors, "
            f"numbers, text, lists, tuples and dicts, also of a hook's state_dict ({why})"
        ) from error
    digest = hashlib.sha256(payload).digest()
    write(path, MAGIC, digest, payload, keep_previous=keep_previous)


def as_path(path: Any) -> Path:
    """``path`` as one, or :class:`CheckpointError`."""
    try:
        return Path(path)
    except TypeError as error:
        raise CheckpointError(f"expected the path of a file, got {path!r}") from error


def check_own(path: str | Path) -> None:
    """:func:`check_place`, and what a run would overwrite is a run's: no other program's file, and
    no quantized network, neither there nor in the place of the checkpoint before.
    """
    check_place(path)
    path = as_path(path)
    for place in (path, previous(path)):
        try:
            with open(place, "rb") as file:
                start = file.read(len(MAGIC))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"cannot read {place}: {error.strerror or error}") from error
        if start and not start.startswith(MAGIC):
            raise CheckpointError(
                f"{str(place)!r} is no checkpoint of this program; choose another"
            )
        state = {}
        with contextlib.suppress(CheckpointError):  # a damaged one may go
            state = load(place)
        if "model" in state:
            raise CheckpointError(f"{str(place)!r} is a quantized network; choose another file")


def check_place(path: str | Path) -> None:
    """Raise :class:`CheckpointError` unless a file of this name can lie there."""
    path = as_path(path)
    try:
        if path.is_dir():
            raise CheckpointError(f"{str(path)!r} is a folder; give the name of a file in it")
        if not path.parent.is_dir():
            raise CheckpointError(f"{str(path)!r} is in no folder; make the folder first")
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be: {error.strerror or error}") from error
    if not os.access(path.parent, os.W_OK):
        raise CheckpointError(f"{str(path)!r} is in a folder that may not be written to")


def write(path: Path, *parts: bytes | memoryview, keep_previous: bool = False) -> None:
    """Write a file; a crash at any moment leaves the old one (or its copy) or the new one.

    Where the system cannot push files or folders to the disk, a warning says so, and the file is
    written as well as it can be.

    Args:
        parts: what it holds, one behind the other.
        keep_previous: keep the file that was there as ``<path>.previous``.

    Raises:
        CheckpointError: the disk is full or the folder not writable; says where the old file is.
    """
    check_place(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    outcome = "the file that was there is intact" if path.exists() else "there was none before"
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            sync(file)
        if keep_previous and path.exists():
            os.replace(path, previous(path))
            outcome += f", as {previous(path)}"
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(
            f"could not write {path}: {error.strerror or error}; {outcome}. "
            "Free some space, or choose another folder that is there"
        ) from error
    _sync_folder(path.parent)


@torch_defaults()
def load(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save` wrote.

    Raises:
        CheckpointError: missing, damaged, or not one of these files.
    """
    path = as_path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    start = len(MAGIC) + DIGEST_SIZE
    if not data.startswith(MAGIC):
        raise CheckpointError(
            f"{path} is not a checkpoint of this program, or its first bytes are damaged"
        )
    payload = memoryview(data)[start:]
    if hashlib.sha256(payload).digest() != data[len(MAGIC) : start]:
        raise CheckpointError(
            f"{path} is damaged: its checksum does not match; use another copy or start anew"
        )
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever rubbish may cause
        raise CheckpointError(
            f"{path} holds more than plain tensors, which might run code, and is refused; use a "
            "file that this program wrote"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a dict")
    return state


def load_newest(path: str | Path) -> dict[str, Any] | None:
    """The newest intact one of ``path`` and ``<path>.previous``; None if neither exists.

    A damaged newest file is named in a warning and replaced by the one before, so that the next
    save keeps that one; a temporary file of a killed run is removed.
    """
    path = as_path(path)
    for stale in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            stale.unlink()
    candidates = [p for p in (path, previous(path)) if p.exists()]
    for i, candidate in enumerate(candidates):
        try:
            state = load(candidate)
        except CheckpointError as error:
            if i == len(candidates) - 1:
                raise
            warnings.warn(f"{error}; going on from {candidates[i + 1]}", stacklevel=2)
            continue
        if candidate != path:
            with contextlib.suppress(OSError):
                os.replace(candidate, path)
        return state
    return None


def previous(path: Path) -> Path:
    """Where :func:`save` keeps the file before the newest."""
    return path.with_name(path.name + ".previous")


@torch_defaults()
def save_quantized(model: fx.GraphModule, path: str | Path) -> None:
    """Write a quantized network: its configuration, its images' shape, its state and some logits.

    Raises:
        CheckpointError: not a quantized network, or the file cannot be written; one that was there
            is intact.
    """
    check_quantized(model, CheckpointError)
    shape = tuple(model.meta["image_shape"])
    save(
        path,
        {
            "config": vars(model.meta["config"]),
            "image_shape": shape,
            "model": model.state_dict(),
            "logits": torch.cat(_float_logits(copy.deepcopy(model).cpu().float(), shape)),
        },
    )


@torch.no_grad()
def _float_logits(
    model: fx.GraphModule, image_shape: tuple[int, ...], batches: int = 2
) -> tuple[Tensor, ...]:
    """Of random batches, always the same, without rounding, which may fall otherwise elsewhere.

    Each is eight times as large as the one before: where a ReLU6 ends, it is no ReLU.
    """
    images = torch.randn(4, *image_shape, generator=torch.Generator().manual_seed(0))
    with unquantized(model.eval()):
        return tuple(model(8**i * images) for i in range(batches))


@torch_defaults()
def load_quantized(path: str | Path, architecture: nn.Module) -> fx.GraphModule:
    """Read a quantized network back, in eval mode, float32, trainable, with the same logits.

    Args:
        architecture: the full-precision network it was made from; its weights do not matter.

    Raises:
        CheckpointError: as :func:`load`, or the file is of another network: other names or shapes,
            or other logits for the same weights.
    """
    if isinstance(path, nn.Module):
        raise CheckpointError(
            "give the file first, then the network: load_quantized(path, network)"
        )
    state = load(path)
    if set(state) != {"config", "image_shape", "model", "logits"}:
        raise CheckpointError(f"{path} is not a quantized network; it holds {sorted(state)}")
    try:
        config = QuantizationConfig(**state["config"])
    except TypeError as error:
        raise CheckpointError(
            f"{path} was written by another version of this program ({error}); use that one"
        ) from error
    expected, shape = state["logits"], tuple(state["image_shape"])
    model = build_student(traced(architecture, shape), config)
    load_matching(model, state["model"], str(path))
    batches = expected.split(4)  # one of them in files of before
    for now, then in zip(_float_logits(model, shape, len(batches)), batches, strict=True):
        if then.isfinite().all() and not same(now, then):
            raise CheckpointError(
                f"{path} is of another network: the architecture has its weights' names and "
                "shapes, and gives other logits; give the one that it was made from"
            )
    # As it was trained: another memory format would round differently.
    return channels_last(model).requires_grad_(True)


def load_matching(model: nn.Module, state: dict[str, Any], source: str) -> None:
    """``load_state_dict``, with a named error and an untouched model where the two differ."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [
        f"{k}: {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own.keys() & state.keys()
        if own[k].shape != state[k].shape
    ]
    if missing or unexpected or reshaped:
        raise CheckpointError(
            f"{source} is of another network: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"other shapes {sorted(reshaped)[:3]}; give the architecture that it was made from"
        )
    model.load_state_dict(state)


def fingerprint(module: nn.Module) -> str:
    """16 hex digits of a SHA-256 over the names, dtypes, shapes and bytes of the state dict, and of
    a traced network over its layers and its code.
    """
    digest = hashlib.sha256()
    if isinstance(module, fx.GraphModule):
        digest.update(without_addresses(str(module)).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):  # an extra state
            digest.update(f"{name} {tensor!r}\n".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def without_addresses(text: str) -> str:
    """A repr without what changes from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def sync(file: IO[bytes]) -> None:
    """Push a file to the disk, or warn where the system has no such thing."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        _warn_unsynced(Path(file.name), error)


def _sync_folder(folder: Path) -> None:
    """Push a renaming to the disk, or warn: the file itself is whole and in place."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)  # which Windows refuses
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        _warn_unsynced(folder, error)


def _warn_unsynced(path: Path, error: OSError) -> None:
    warnings.warn(
        f"{path} could not be pushed to the disk ({error.strerror or error}); all is written, but "
        "what came last could be lost in a power failure",
        stacklevel=4,
    )
