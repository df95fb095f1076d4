"""Reading a user's weights, without ever running code from them."""

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.errors import TeacherError

# Where training programs keep the weights in a checkpoint, and their moving average.
_PLAIN = ("state_dict", "model", "model_state_dict")
_AVERAGED = (
    "state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema",
)  # fmt: skip
# What torch.compile, DataParallel and common training programs wrap a network in.
_PREFIXES = ("_orig_mod.", "module.", "model.", "backbone.")
# torchvision's DenseNet files name these layers as torch of 2017 did, ``norm.1`` for ``norm1``.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
_RESAVE = (
    "re-save it where it was made, with torch.save(model.state_dict(), path) "
    "or safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy a checkpoint into ``model``, which stays as it is on any error.

    Takes a state dict, bare or under ``state_dict``, ``model`` or ``model_state_dict``, from a
    ``.safetensors`` file or from ``torch.save``, whose files are always read with
    ``weights_only=True``: no code in them can run. Where a moving average of the weights is there
    too (``state_dict_ema``, ``model_ema``, ``ema``, ...), that is taken, as timm does, and a line
    on stdout says so. Prefixes that all keys share and the model's own lack (``_orig_mod.``,
    ``module.``, ``model.``, ``backbone.``, also nested) are left out, and the old names in
    torchvision's DenseNet files are understood. BatchNorm's ``num_batches_tracked`` may be missing.

    Raises:
        TeacherError: the file is missing, damaged, holds anything but tensors or several different
            networks; keys are missing or unexpected; shapes or the number of classes do not match.
    """
    where = os.fspath(path)
    if not os.path.isfile(path):
        raise TeacherError(f"no weights file at {where!r}; pass the path of a saved state_dict")
    own = model.state_dict()
    state = _without_prefixes(_unwrap(_read(where), where), own)
    shapes = {k: (tuple(v.shape), tuple(own[k].shape)) for k, v in state.items() if k in own}
    wrong = {k: pair for k, pair in shapes.items() if pair[0] != pair[1]}
    problems = {
        "missing keys": [
            k for k in own if k not in state and not k.endswith("num_batches_tracked")
        ],
        "unexpected keys": [k for k in state if k not in own],
        "mismatched shapes": [f"{k} {got} for {want}" for k, (got, want) in wrong.items()],
        "other kinds of tensors": [k for k, v in state.items() if k in own and _other(v, own[k])],
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
        inner = {k: loaded[k] for k in (*_AVERAGED, *_PLAIN) if isinstance(loaded.get(k), Mapping)}
        whole = {k: v for k, v in inner.items() if _is_state(v)}
        if whole:
            return dict(whole[_chosen(loaded, whole, path)])
        state = next(iter(inner.values()), loaded)
        if _is_state(state):
            return dict(state)
        other = [str(k) for k, v in state.items() if not _is_state({k: v})]
        found = f"other values than tensors: {_some(other)}" if other else "an empty one"
    raise TeacherError(f"expected a state_dict in {path!r}, found {found}; {_RESAVE}")


def _is_state(value: Mapping[Any, Any]) -> bool:
    """Whether there is something in it, and nothing but tensors."""
    return bool(value) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()
    )


def _chosen(loaded: Mapping[str, Any], whole: dict[str, Mapping[str, Tensor]], path: str) -> str:
    """The key of the state dict to take; where there was a choice, a line says which it is."""
    averaged = [k for k in whole if k in _AVERAGED]
    candidates = averaged or list(whole)
    first, *rest = candidates
    for other in rest:
        if not _same(whole[first], whole[other]):
            raise TeacherError(
                f"{path!r} holds different weights as {first!r} and as {other!r}; {_RESAVE}, from "
                "the one that you mean"
            )
    left = [k for k in (*_AVERAGED, *_PLAIN) if k in loaded and k not in candidates]
    if averaged or any(k in _AVERAGED for k in left):
        what = "the moving average of the weights" if averaged else "the weights"
        also = f" (it also holds {', '.join(map(repr, left))})" if left else ""
        print(f"{path}: took {what}, {first!r}{also}", flush=True)
    return first


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].layout == b[k].layout and torch.equal(a[k], b[k]) for k in a
    )


def _without_prefixes(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under the names of ``own``: without prefixes, and renamed, as fits best."""
    candidates = [state]
    if not any(k == "n_averaged" for k in own):  # of torch.optim.swa_utils.AveragedModel
        state = {k: v for k, v in state.items() if k != "n_averaged"}
        candidates = [state]
    while state and (shared := next((p for p in _PREFIXES if _all_start(state, p)), None)):
        state = {k.removeprefix(shared): v for k, v in state.items()}
        candidates.append(state)
    candidates += [{_OLD_DENSENET.sub(r"\1\2", k): v for k, v in c.items()} for c in candidates]
    return max(candidates, key=lambda names: len(names.keys() & own.keys()))


def _all_start(state: Mapping[str, Tensor], prefix: str) -> bool:
    return all(k.startswith(prefix) for k in state)


def _other(given: Tensor, own: Tensor) -> bool:
    """Whether a tensor cannot be copied as it is: without values, sparse, of integers' levels."""
    plain = given.layout == torch.strided and not (given.is_quantized or given.is_meta)
    same = (given.is_floating_point(), given.is_complex()) == (
        own.is_floating_point(), own.is_complex()
    )  # fmt: skip
    return not plain or not (same or own.ndim == 0)  # num_batches_tracked, of whatever type


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
