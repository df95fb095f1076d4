"""Reading a user's weights, without ever running code from them."""

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.errors import TeacherError

_RESAVE = (
    "re-save it where it was made, with torch.save(model.state_dict(), path) "
    "or safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy a checkpoint into ``model``, which stays as it is on any error.

    Takes a state dict, bare or under ``state_dict``, ``model`` or ``model_state_dict``, with or
    without DataParallel's ``module.`` prefix, from a ``.safetensors`` file or from ``torch.save``,
    whose files are always read with ``weights_only=True``: no code in them can run. BatchNorm's
    ``num_batches_tracked`` may be missing.

    Raises:
        TeacherError: the file is missing, damaged or holds anything but tensors; keys are missing
            or unexpected; shapes or the number of classes do not match.
    """
    where = os.fspath(path)
    if not os.path.isfile(path):
        raise TeacherError(f"no weights file at {where!r}; pass the path of a saved state_dict")
    state = _unwrap(_read(where), where)
    own = model.state_dict()
    if all(k.startswith("module.") for k in state) and not any(
        k.startswith("module.") for k in own
    ):
        state = {k.removeprefix("module."): v for k, v in state.items()}

    shapes = {k: (tuple(v.shape), tuple(own[k].shape)) for k, v in state.items() if k in own}
    wrong = {k: pair for k, pair in shapes.items() if pair[0] != pair[1]}
    problems = {
        "missing keys": [
            k for k in own if k not in state and not k.endswith("num_batches_tracked")
        ],
        "unexpected keys": [k for k in state if k not in own],
        "mismatched shapes": [f"{k} {got} for {want}" for k, (got, want) in wrong.items()],
    }
    found = [f"{what}: {_some(items)}" for what, items in problems.items() if items]
    if not found:
        model.load_state_dict(state, strict=False)
        return
    # The classifier is registered last; are its rows all that differs?
    got, want = wrong.get(next(reversed(own), ""), ((), ()))
    rows = all((g[:1], g[1:], w[:1]) == (got[:1], w[1:], want[:1]) for g, w in wrong.values())
    if len(found) == 1 and got and want and rows:
        raise TeacherError(
            f"the weights {where!r} are for {got[0]} classes, the model has {want[0]}: "
            f"pass num_classes={got[0]} (on the command line --num-classes, or --data with that "
            "many class folders), or other weights"
        )
    raise TeacherError(
        f"the weights {where!r} do not fit the model; {'; '.join(found)}. "
        "Choose the model that they were saved from"
    )


def _read(path: str) -> Any:
    """The unchecked contents of a weights file."""
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise TeacherError(
                f"reading {path!r} needs safetensors: run `pip install safetensors`"
            ) from error
        try:
            return load_file(path)
        except Exception as error:  # SafetensorError is a plain Exception
            raise TeacherError(
                f"cannot read {path!r}, it is damaged or not safetensors ({error}); {_RESAVE}"
            ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not the whole message of torch, which offers weights_only=False.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a reference to {refused[1]}" if refused else "something else"
        raise TeacherError(
            f"refused to load {path!r}: expected tensors alone, found {what}, which might run "
            f"code, or the file is damaged; {_RESAVE}"
        ) from error
    except Exception as error:  # whatever a damaged file may cause
        first = str(error).split(". ")[0]  # torch goes on with its offer of weights_only=False
        raise TeacherError(
            f"cannot read {path!r}, it is damaged or not from torch.save "
            f"({type(error).__name__}: {first}); {_RESAVE}"
        ) from error


def _unwrap(loaded: Any, path: str) -> dict[str, Tensor]:
    """The state dict inside what a file held."""
    found = f"a {type(loaded).__name__}"
    if isinstance(loaded, Mapping):
        inner = (loaded.get(key) for key in ("state_dict", "model", "model_state_dict"))
        state = next((i for i in inner if isinstance(i, Mapping)), loaded)
        other = [str(k) for k, v in state.items() if not isinstance(v, Tensor)]
        if state and not other:
            return {str(k): v for k, v in state.items()}
        found = f"other values than tensors: {_some(other)}" if other else "an empty one"
    raise TeacherError(f"expected a state_dict in {path!r}, found {found}; {_RESAVE}")


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
