"""Files under damage, full disks, hostile pickles and kills."""

import contextlib
import errno
import hashlib
import io
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from agm import AgmError
from baselines import load_quantized, save_quantized
from baselines.checkpoint import DIGEST_SIZE, MAGIC, load, load_newest, previous, save
from baselines.errors import CheckpointError
from baselines.student import QuantizationConfig, build_student
from tests.baselines import Tiny, bits, images, same_state

STATE = {
    "step": 3,
    "tensors": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(2, dtype=torch.bfloat16)},
    "history": [{"step": 1, "accuracy": 0.25}, {"x": float("nan")}],
    "rng": torch.Generator().manual_seed(3).get_state(),
    "hooks": [{}, None, True, "text", (1, 2)],
}


def state(i):
    return {"i": i, "tensor": torch.full((50,), float(i))}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.pt"


def names(path):
    return sorted(p.name for p in path.parent.iterdir())


def refused(path, *parts):
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, AgmError)


def sealed(payload):
    """A payload with the right header and checksum."""
    return MAGIC + hashlib.sha256(payload).digest() + payload


def test_round_trip(path):
    save(path, STATE)
    assert same_state(load(path), STATE)
    assert same_state(load(str(path)), STATE)
    assert same_state(load_newest(path), STATE)
    assert names(path) == ["run.pt"]


def test_previous(path):
    assert load_newest(path) is None
    for i in range(4):
        save(path, state(i), keep_previous=True)
        assert load(path)["i"] == i
        if i:
            assert load(previous(path))["i"] == i - 1
    assert names(path) == ["run.pt", "run.pt.previous"]
    path.unlink()
    assert load_newest(path)["i"] == 2


# Damage


def test_flipped_bits(path):
    save(path, STATE)
    content, g = path.read_bytes(), np.random.default_rng(0)
    header = len(MAGIC) + DIGEST_SIZE
    places = [*range(0, header, 7), *g.integers(header, len(content), size=60)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << g.integers(8)
        path.write_bytes(damaged)
        refused(path, "damaged")


def test_truncations_and_additions(path):
    save(path, STATE)
    content, g = path.read_bytes(), np.random.default_rng(1)
    lengths = [0, 1, len(MAGIC), len(MAGIC) + DIGEST_SIZE, len(content) - 1]
    for length in [*lengths, *g.integers(0, len(content), size=60)]:
        path.write_bytes(content[:length])
        refused(path)
    path.write_bytes(content + b"\0")
    refused(path, "damaged")


def test_right_checksum_on_rubbish(path):
    torch.save(STATE, buffer := io.BytesIO())
    content, g = buffer.getvalue(), np.random.default_rng(2)
    payloads = [b"", b"\0", b"hello", content[:100], content[:-30], b"\x80\x02."]
    payloads += [pickle.dumps(x, protocol=2) for x in (5, None, [1], {"step": 1})]
    payloads += [g.bytes(int(n)) for n in g.integers(1, 300, size=60)]
    for _ in range(60):
        damaged = bytearray(content)
        damaged[g.integers(len(content))] ^= 1 << g.integers(8)
        payloads.append(bytes(damaged))
    for payload in payloads:
        path.write_bytes(sealed(payload))
        with warnings.catch_warnings(), contextlib.suppress(CheckpointError):
            warnings.simplefilter("ignore")
            load(path)


def test_a_damaged_newest_falls_back(path):
    save(path, state(0), keep_previous=True)
    save(path, state(1), keep_previous=True)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"run\.pt is damaged.*run\.pt\.previous"):
        assert load_newest(path)["i"] == 0
    previous(path).write_bytes(b"")
    with pytest.raises(CheckpointError, match="previous"), pytest.warns(match="damaged"):
        load_newest(path)
    previous(path).unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        load_newest(path)


def test_missing_or_not_a_file(path):
    refused(path)
    refused(path.parent)
    path.write_text("text")
    refused(path, "not a checkpoint")
    torch.save(STATE, path)
    refused(path, "not a checkpoint")
    refused(path / "inside")
    for folder in (path, path.parent / "missing"):  # a file in the folder's place, and none
        with pytest.raises(CheckpointError):
            save(folder / "run.pt", STATE)
        assert load_newest(folder / "run.pt") is None
    with pytest.raises(CheckpointError):
        save(path.parent, STATE)


@pytest.mark.parametrize("name", ["run.pt", "run[1].pt"])
def test_a_stale_temporary_is_removed(tmp_path, name, monkeypatch):
    path = tmp_path / name

    class Killed(BaseException):
        pass

    def killed(_):
        raise Killed

    (path.parent / "other.tmp").write_bytes(b"someone else's")
    for exists in (False, True):
        if exists:
            save(path, state(1))
        before = names(path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", killed)
            with pytest.raises(Killed):
                save(path, state(2))
        assert len(names(path)) == len(before) + 1
        assert (load_newest(path) or {}).get("i") == (1 if exists else None)
        assert names(path) == before


@pytest.mark.parametrize("keep_previous", [False, True])
@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_full_disk(path, monkeypatch, function, call, keep_previous):
    save(path, state(0), keep_previous=True)
    save(path, state(1), keep_previous=True)
    real, calls = getattr(os, function), []

    def full(*args):
        calls.append(1)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, function, full)
    written = call == 2 and function == "replace" and not keep_previous  # there is no second
    refusal = pytest.raises(CheckpointError, match="No space left")
    with contextlib.nullcontext() if written else refusal:
        save(path, state(2), keep_previous=keep_previous)
    monkeypatch.undo()
    assert {*names(path)} <= {"run.pt", "run.pt.previous"}
    # The folder is synced last: the new file is already there.
    last = written or (function, call) == ("fsync", 2)
    assert load_newest(path)["i"] == (2 if last else 1)
    save(path, state(3), keep_previous=keep_previous)
    assert load(path)["i"] == 3


def test_a_write_that_fails_half_way(path, monkeypatch):
    save(path, state(1))
    real = open

    class Full(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        "builtins.open", lambda f, m="r", *a: Full(f, "w") if m == "wb" else real(f, m, *a)
    )
    with pytest.raises(CheckpointError, match="No space left"):
        save(path, state(2))
    monkeypatch.undo()
    assert names(path) == ["run.pt"]
    assert load(path)["i"] == 1


# Hostile files


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("how", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize("reader", [load, load_newest, lambda p: load_quantized(p, Tiny())])
def test_a_malicious_pickle_does_not_run(path, how, reader):
    marker = path.parent / "marker"
    content = {"config": {}, "model": {"weight": Malicious(marker)}}
    if how == "pickle":
        payload = pickle.dumps(content, protocol=2)
    else:
        torch.save(content, buffer := io.BytesIO(), _use_new_zipfile_serialization=how == "zip")
        payload = buffer.getvalue()
    path.write_bytes(sealed(payload))
    with pytest.raises(CheckpointError, match="refused"):
        reader(path)
    assert not marker.exists()
    if how == "pickle":  # the trap is a real one
        pickle.loads(payload)
        assert marker.exists()


def test_a_whole_module_is_refused(path):
    torch.save({"config": {}, "model": Tiny()}, buffer := io.BytesIO())
    path.write_bytes(sealed(buffer.getvalue()))
    refused(path, "refused")


# Quantized networks


def save_tiny(path, **config):
    config = QuantizationConfig(**config)
    save_quantized(build_student(Tiny(), config)[0], config, path)


class Renamed(Tiny):
    def __init__(self):
        super().__init__()
        self.head = self.fc
        del self.fc

    def forward(self, x):
        return self.head(nn.functional.relu(self.bn0(self.conv0(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("architecture", "parts"),
    [
        (Tiny(classes=7), ("fc.bias: (4,) instead of (7,)", "fc.parametrizations.weight")),
        (Tiny(width=6), ("bn0.bias: (4,) instead of (6,)",)),
        (Renamed(), ("missing ['head.bias'", "unexpected ['")),
    ],
)
@pytest.mark.parametrize("fold", [False, True])
def test_another_network(path, architecture, parts, fold):
    save_tiny(path, fold_batch_norm=fold)
    before = bits(architecture)
    with pytest.raises(CheckpointError) as caught:
        load_quantized(path, architecture)
    for part in (str(path), "architecture", *parts):
        assert part.replace("bn0", "conv0" if fold else "bn0") in str(caught.value)
    assert bits(architecture) == before


def test_a_quantized_network_keeps_its_settings(path):
    settings = {"weight_bits": 5, "act_bits": 2, "scheme": "symmetric", "edge_bits": 8,
                "ste": "clipped", "range_estimator": "mse", "fold_batch_norm": True}  # fmt: skip
    save_tiny(path, **settings)
    loaded, want = (
        load_quantized(path, Tiny(3)),
        build_student(Tiny(), QuantizationConfig(**settings)),
    )
    assert torch.equal(loaded(images()), want[0](images()))
    assert [str(m) for m in loaded.modules()][1:] == [str(m) for m in want[0].modules()][1:]


# Kills

SAVING_LOOP = """
import os, random, signal, sys
import torch
from baselines.checkpoint import load_newest, save

torch.set_num_threads(1)  # threads do not survive a fork
path, keep = sys.argv[1], sys.argv[2] == "keep"
draw, start = random.Random(0), 0
for _ in range(6):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        i = start
        while True:
            i += 1
            save(path, {"i": i, "tensor": torch.full((100_000,), float(i))}, keep_previous=keep)
            os.write(write, b".")
    acknowledged = start + sum(len(os.read(read, 1)) for _ in range(draw.randint(1, 4)))
    for _ in range(draw.randint(0, 30_000)):  # somewhere in the saves that follow
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = load_newest(path)
    assert state["i"] >= acknowledged, (state["i"], acknowledged)
    assert (state["tensor"] == state["i"]).all()
    assert {*os.listdir(os.path.dirname(path))} <= {"run.pt", "run.pt.previous"}
    start = state["i"]
"""


@pytest.mark.parametrize("keep", ["keep", "drop"])
def test_killed_while_saving(path, keep):
    command = [sys.executable, "-W", "error::UserWarning", "-c", SAVING_LOOP, str(path), keep]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
