"""Files under damage, full disks, hostile pickles and kills."""

import contextlib
import copy
import errno
import hashlib
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from agm import AgmError
from baselines import load_quantized, save_quantized
from baselines.errors import CheckpointError
from baselines.quantization.checkpoint import (
    DIGEST_SIZE,
    MAGIC,
    fingerprint,
    load,
    load_matching,
    load_newest,
    previous,
    save,
)
from baselines.quantization.policy import QuantizationConfig
from baselines.quantization.quantizers import observing
from baselines.quantization.student import build_student
from baselines.quantization.tracing import traced
from tests import hostile
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


def test_to_keep_the_previous_file_is_asked_for_by_name(path):
    with pytest.raises(TypeError):
        save(path, STATE, True)
    assert names(path) == []


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


def falls_back(path, damaged):
    """The newest is refused by name, and the one before it is taken in its place."""
    save(previous(path), state(0))
    path.write_bytes(damaged)
    refused(path)
    with pytest.warns(UserWarning, match="going on from .*previous"):
        assert load_newest(path)["i"] == 0
    assert load(path)["i"] == 0


def test_flipped_bits(path, campaign):
    save(path, STATE)
    content, g = path.read_bytes(), np.random.default_rng(0)
    header = len(MAGIC) + DIGEST_SIZE
    later = campaign.size(60, 1000 - header)
    places = [*range(0, header, campaign.size(7, 1)), *g.integers(header, len(content), later)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << g.integers(8)
        campaign.count("single flipped bits", files=1)
        falls_back(path, damaged)
        campaign.count("single flipped bits", named_CheckpointErrors=1)


def test_truncations_and_additions(path, campaign):
    save(path, STATE)
    content, g = path.read_bytes(), np.random.default_rng(1)
    lengths = [0, 1, len(MAGIC), len(MAGIC) + DIGEST_SIZE, len(content) - 1]
    more = campaign.size(60, 500) - len(lengths)
    for length in [*lengths, *g.choice(len(content), more, replace=False)]:
        campaign.count("truncations", files=1)
        falls_back(path, content[:length])
        campaign.count("truncations", named_CheckpointErrors=1)
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
    with pytest.warns(UserWarning, match=r"run\.pt is damaged.*run\.pt\.previous") as warned:
        assert load_newest(path)["i"] == 0
    assert [w.filename for w in warned] == [__file__]
    save(path, state(2), keep_previous=True)  # which keeps the good one, not the damaged one
    assert load(previous(path))["i"] == 0
    path.write_bytes(b"")
    previous(path).write_bytes(b"")
    with pytest.raises(CheckpointError, match="previous"), pytest.warns(match="damaged"):
        load_newest(path)
    previous(path).unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        load_newest(path)


def test_missing_or_not_a_file(path):
    refused(path, f"cannot read {path}: No such file or directory")
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
    # The folder is synced last: the new file is already there.
    last = (function, call) == ("fsync", 2)
    moved = call == 2 and function == "replace"  # the old file, before the new one came
    told = "intact, as .*previous" if moved else "intact. "
    refusal = pytest.raises(CheckpointError, match=f": No space left on device; .*{told}")
    warning = pytest.warns(UserWarning, match="No space left on device.*all is written")
    with contextlib.nullcontext() if written else warning if last else refusal:
        save(path, state(2), keep_previous=keep_previous)
    monkeypatch.undo()
    assert {*names(path)} <= {"run.pt", "run.pt.previous"}
    if not (last or written):
        assert load(previous(path) if moved else path)["i"] == 1
    assert load_newest(path)["i"] == (2 if last or written else 1)
    save(path, state(3), keep_previous=keep_previous)
    assert load(path)["i"] == 3


@pytest.mark.parametrize("refused", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_system_that_cannot_sync_is_a_warning(path, monkeypatch, refused):
    def refuse(_):
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(os, "fsync", refuse)
    for i in range(2):
        with pytest.warns(UserWarning, match=os.strerror(refused)) as warned:
            save(path, state(i), keep_previous=True)
        told = [str(w.message).split(" could not")[0] for w in warned]
        assert [os.path.basename(t) for t in told] == [
            f"run.pt.{os.getpid()}.tmp",
            path.parent.name,
        ]
        assert load(path)["i"] == i
    assert load(previous(path))["i"] == 0
    assert names(path) == ["run.pt", "run.pt.previous"]


@pytest.mark.parametrize("refused", [errno.EACCES, errno.EPERM, errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_opened_is_a_warning(path, monkeypatch, refused):
    real = os.open

    def refuse(name, *args, **kwargs):
        if os.path.isdir(name):
            raise OSError(refused, os.strerror(refused))
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(UserWarning, match=f"{path.parent} could not.*{os.strerror(refused)}"):
        save(path, state(1))
    assert load(path)["i"] == 1
    assert names(path) == ["run.pt"]


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


FULL = "full disks"


def full_disk(campaign, path, size):
    """Saving a state of that size fails by name and leaves what was there."""
    before = {name: path.with_name(name).read_bytes() for name in names(path)}
    campaign.count(FULL, saves=1)
    with pytest.raises(CheckpointError, match=rf"could not write {path}.*intact. Free some space"):
        save(path, {"i": 2, "tensor": torch.zeros(size, dtype=torch.uint8)}, keep_previous=True)
    assert {name: path.with_name(name).read_bytes() for name in names(path)} == before
    assert load_newest(path)["i"] == 1
    campaign.count(FULL, named_errors_with_the_old_file_intact=1)


def test_a_really_full_disk(small_disk, campaign):
    path, g = small_disk / "run.pt", np.random.default_rng(3)
    save(path, state(1))
    filler = small_disk / "filler"
    for free in g.integers(0, 150_000, size=campaign.size(5, 100)):
        filler.write_bytes(b"")
        disk = os.statvfs(small_disk)
        filler.write_bytes(bytes(disk.f_bavail * disk.f_frsize - free))
        full_disk(campaign, path, 160_000)
    filler.unlink()
    save(path, state(3))
    assert load(path)["i"] == 3


def test_a_file_that_may_not_grow(path, campaign):
    save(path, state(1))
    g, before = np.random.default_rng(4), resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in g.integers(0, 100_000, size=campaign.size(5, 100)):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), before[1]))
            full_disk(campaign, path, 100_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    save(path, state(3))
    assert load(path)["i"] == 3


# Hostile files


@pytest.mark.parametrize("name", hostile.TRAPS)
@pytest.mark.parametrize("container", hostile.CONTAINERS)
def test_a_malicious_pickle_does_not_run(path, campaign, monkeypatch, name, container):
    canary = path.parent / "canary"
    monkeypatch.syspath_prepend(canary.parent)
    pickled = hostile.trap(name, canary)
    content = hostile.contained(pickled, container)
    for reader in (load, load_newest, lambda p: load_quantized(p, Tiny())):
        for what, part in ((sealed(content), "refused.*use a file that"), (content, "not a check")):
            path.write_bytes(what)
            with pytest.raises(CheckpointError, match=part):
                reader(path)
    assert not canary.exists()
    assert "agm_trap" not in sys.modules
    pickle.loads(pickled)  # the trap is a real one
    assert canary.exists()
    sys.modules.pop("agm_trap", None)
    campaign.count("malicious pickles as a checkpoint", files=1, executed=0)


def test_a_whole_module_is_refused(path):
    torch.save({"config": {}, "model": Tiny()}, buffer := io.BytesIO())
    path.write_bytes(sealed(buffer.getvalue()))
    refused(path, "refused")


# Quantized networks


@pytest.mark.parametrize("keys", ["", "config", "model", "config model more", "identity trainer"])
def test_a_file_of_something_else(path, keys):
    save(path, {key: {} for key in keys.split()})
    with pytest.raises(CheckpointError, match="not a quantized network") as caught:
        load_quantized(path, Tiny())
    assert str(sorted(keys.split())) in str(caught.value)


def save_tiny(path, **config):
    save_quantized(tiny_student(**config), path)


def tiny_student(**config):
    return build_student(traced(Tiny(), (3, 8, 8)), QuantizationConfig(**config))


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
        (Tiny(classes=2), ("fc.bias: (4,) instead of (2,)",)),
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


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda state: state.pop("fc.bias"), "missing ['fc.bias'], unexpected []"),
        (lambda state: state.update(more=torch.zeros(1)), "missing [], unexpected ['more']"),
        (lambda state: state.update({"fc.bias": torch.zeros(3)}), "fc.bias: (3,) instead of (4,)"),
        (lambda state: state.update({"fc.bias": torch.zeros(())}), "fc.bias: () instead of (4,)"),
    ],
)
def test_one_difference_is_enough(change, part):
    model, state = Tiny(), dict(Tiny(seed=1).state_dict())
    before = bits(model)
    change(state)
    with pytest.raises(CheckpointError, match=r"^here is of another network.*give the arch") as e:
        load_matching(model, state, "here")
    assert part in str(e.value)
    assert bits(model) == before


def test_three_differences_of_a_kind_are_shown():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(3)))
    for state, shown in (
        ({}, "missing ['0.bias', '0.weight', '1.bias'], unexpected [], other shapes []"),
        (
            model.state_dict() | {f"extra{i}": torch.zeros(1) for i in range(5)},
            "missing [], unexpected ['extra0', 'extra1', 'extra2'], other shapes []",
        ),
        (
            {k: torch.zeros(2) for k in model.state_dict()},
            "missing [], unexpected [], other shapes ['0.bias: (2,) instead of (1,)', "
            "'0.weight: (2,) instead of (1, 1)', '1.bias: (2,) instead of (1,)']",
        ),
    ):
        with pytest.raises(CheckpointError) as caught:
            load_matching(model, state, "here")
        assert f"here is of another network: {shown}; give" in str(caught.value)


def test_a_quantized_network_keeps_its_settings(path):
    settings = {"weight_bits": 5, "act_bits": 2, "scheme": "symmetric", "edge_bits": 8,
                "ste": "clipped", "range_estimator": "mse", "fold_batch_norm": True,
                "activations": "relu"}  # fmt: skip
    want = tiny_student(**settings).to(memory_format=torch.channels_last)  # as a trainer's
    with torch.no_grad(), observing(want):
        want(images())
    save_quantized(want, path)
    loaded = load_quantized(path, Tiny(3))
    assert torch.equal(loaded(images()), want(images()))
    assert [str(m) for m in loaded.modules()][1:] == [str(m) for m in want.modules()][1:]
    assert loaded.meta["config"] == want.meta["config"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_quantized_network_of_another_dtype(path, dtype):
    want = tiny_student()
    save_quantized(copy.deepcopy(want).to(dtype), path)
    loaded = load_quantized(path, Tiny())
    for got, value in zip(loaded.parameters(), want.parameters(), strict=True):
        assert torch.equal(got, value.to(dtype).float())


# Fingerprints


def test_the_hash_sees_names_dtypes_shapes_and_bytes():
    def holding(name: str, value: torch.Tensor) -> str:
        module = nn.Module()
        module.register_buffer(name, value)
        return fingerprint(module)

    x = torch.arange(6, dtype=torch.int32)
    others = [
        holding("x", x),
        holding("y", x),
        holding("x", x.view(2, 3)),
        holding("x", x.view(torch.float32)),
        holding("x", x + 1),
        holding("x", torch.tensor(1.0)),
        holding("x", torch.zeros(3, dtype=torch.bfloat16)),
    ]
    assert len(set(others)) == len(others)
    assert all(len(h) == 16 and int(h, 16) >= 0 for h in others)


def test_the_hash_ignores_the_memory_format():
    model = Tiny()
    before = fingerprint(model)
    assert fingerprint(model.to(memory_format=torch.channels_last)) == before


def test_the_fingerprint_of_a_traced_network_is_of_its_code_too():
    class Doubled(Tiny):
        def forward(self, x):
            return super().forward(2 * x)

    class Capped(Tiny):
        def forward(self, x):
            return super().forward(x).clamp(max=9)

    found = [fingerprint(traced(kind(), (3, 8, 8))) for kind in (Tiny, Tiny, Doubled, Capped)]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    layers = nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4)
    relus = [nn.Sequential(*layers, relu, nn.Flatten()) for relu in (nn.ReLU(), nn.ReLU6())]
    one, other = (fingerprint(traced(network, (3, 8, 8))) for network in relus)
    assert one != other


# Kills

SAVING_LOOP = """
import json, os, random, signal, sys, time
import torch
from baselines.quantization.checkpoint import load_newest, save

torch.set_num_threads(1)  # threads do not survive a fork
path, keep, kills, seed = sys.argv[1], sys.argv[2] == "keep", int(sys.argv[3]), int(sys.argv[4])
draw, start, stale = random.Random(seed), 0, 0

def state(i):
    return {"i": i, "tensor": torch.full((100_000,), float(i))}

begin = time.perf_counter()
save(path, state(0), keep_previous=keep)
duration = time.perf_counter() - begin
for _ in range(kills):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        i = start
        while True:
            i += 1
            save(path, state(i), keep_previous=keep)
            os.write(write, b".")
    os.close(write)
    acknowledged = start
    for _ in range(draw.randint(0, 3)):
        acknowledged += len(os.read(read, 1))
    moment = time.perf_counter() + draw.uniform(0, 2 * duration)
    while time.perf_counter() < moment:  # anywhere in the saves that follow
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 4096):
        acknowledged += len(more)
    os.close(read)
    stale += any(name.endswith(".tmp") for name in os.listdir(os.path.dirname(path)))
    state_now = load_newest(path)
    # At most the interval in which it was killed is lost.
    assert acknowledged <= state_now["i"] <= acknowledged + 1, (state_now["i"], acknowledged)
    assert (state_now["tensor"] == state_now["i"]).all()
    assert {*os.listdir(os.path.dirname(path))} <= {"run.pt", "run.pt.previous"}
    start = state_now["i"]
print(json.dumps({"kills": kills, "in_the_midst_of_a_file": stale, "recovered": kills}))
"""


@pytest.mark.parametrize("keep", ["keep", "drop"])
def test_killed_while_saving(path, campaign, keep):
    kills = campaign.size(6, 100)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", SAVING_LOOP, path, keep, str(kills),
         str(len(keep))],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    campaign.count("kill -9 while saving", **json.loads(done.stdout), temporary_files_left=0)
