"""Cells side by side in processes: what they give, and how they end."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from baselines import Interrupted
from benchmarks import grid, progress
from benchmarks.errors import UsageError
from benchmarks.grid import claimed, number_of_jobs, shared, side_by_side
from benchmarks.process import Stop
from benchmarks.task import teachers
from tests.benchmarks.compare import load, same_networks, untimed

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "compare.py"


def until(condition, child: subprocess.Popen, seconds: float = 300) -> None:
    """Wait for something that ``child`` does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, "it ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# Cells that stand for training; what they do is their name.


def toy(job, stop):
    def run(cell):
        match cell["name"].split("-"):
            case ["kill", *_]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["full", *_]:
                raise UsageError("the disk is full")
            case ["long", *_]:
                while not stop():
                    time.sleep(0.01)
                raise Interrupted("stopped after step 3")
            case ["step", *_]:
                with progress.of_run(2, cell["name"]) as bar:
                    bar.update()
                    time.sleep(1)
            case ["hang", pid]:
                Path(pid).write_text(str(os.getpid()))
                while True:
                    signal.pause()
        return cell | {"job": job, "pid": os.getpid(), "threads": torch.get_num_threads()}

    return run


def cells(*names):
    return [{"name": name} for name in names]


def ends(names, jobs, stop=lambda: False):
    """Name -> row or error."""
    found = {}
    for cell, end in side_by_side(cells(*names), jobs, toy, stop):
        assert cell["name"] not in found
        try:
            found[cell["name"]] = end()
        except Exception as error:
            found[cell["name"]] = error
    return found


@pytest.mark.parametrize("threads", [None, ""], ids=["not said", "said to be nothing"])
def test_every_cell_is_run_once_in_processes_of_one_thread(threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    names = [f"cell-{i}" for i in range(8)]
    found = ends(names, 2)
    assert sorted(found) == names
    assert {row["name"] for row in found.values()} == set(names)
    assert {row["job"] for row in found.values()} == {0, 1}
    assert len({row["pid"] for row in found.values()} | {os.getpid()}) == 3
    assert {row["threads"] for row in found.values()} == {1}


def test_what_runs_is_told_while_it_runs():
    seen = []
    running = side_by_side(cells("step-1", "step-2", "step-3"), 2, toy, lambda: False, seen.append)
    assert len(list(running)) == 3
    assert any(steps.keys() == {"step-1", "step-2"} for steps in seen)
    assert {text for steps in seen for text in steps.values()} == {"", "0/2"}
    assert seen[-1] == {}


def test_a_killed_process_takes_its_cell_with_it_and_no_other():
    names = ["a", "kill-1", "b", "c", "kill-2", "d"]
    found = ends(names, 2)
    assert sorted(found) == sorted(names)
    for name, end in found.items():
        killed = name.startswith("kill")
        assert isinstance(end, grid.BrokenExecutor if killed else dict), (name, end)


def test_errors_keep_their_kind():
    found = ends(["full", "a"], 2)
    assert isinstance(found["full"], UsageError)
    assert str(found["full"]) == "the disk is full"
    assert found["a"]["name"] == "a"


def test_leaving_early_lets_the_others_end_their_step():
    running = side_by_side(cells("full", "long", "long-2"), 2, toy, lambda: False)
    cell, _ = next(running)
    assert cell["name"] == "full"
    running.close()  # waits for them, who would else run for ever


def test_the_first_signal_stops_all_and_begins_no_other():
    stop = Stop()
    with stop.listening():
        running = side_by_side(cells("a", "long-1", "long-2", "late"), 2, toy, stop)
        assert next(running)[0]["name"] == "a"
        signal.raise_signal(signal.SIGINT)
        rest = {cell["name"]: end for cell, end in running}
    assert {"long-1"} <= set(rest) <= {"long-1", "long-2"}
    for end in rest.values():
        with pytest.raises(Interrupted, match="after step 3"):
            end()


HANGING = """
import sys
from benchmarks.grid import side_by_side
from benchmarks.process import Stop
from tests.benchmarks.test_grid import cells, toy
stop = Stop()
if __name__ == "__main__":
    with stop.listening():
        list(side_by_side(cells("hang-1.pid", "hang-2.pid"), 2, toy, stop))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_program_that_is_ended_at_once(number, tmp_path):
    def pids():
        texts = [tmp_path / f"{i}.pid" for i in (1, 2)]
        return [int(p.read_text()) for p in texts if p.exists() and p.read_text()]

    child = subprocess.Popen(
        [sys.executable, "-c", HANGING], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    try:
        until(lambda: len(pids()) == 2, child)
        os.killpg(child.pid, number)  # as a terminal does
        if number != signal.SIGKILL:
            child.stderr.readline()
            assert "stopping after this step" in child.stderr.readline()
            assert all(map(alive, pids()))
            os.killpg(child.pid, number)
            assert child.wait(60) == 128 + number
        deadline = time.monotonic() + 60
        while any(map(alive, pids())) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(alive, pids()))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


@pytest.mark.parametrize(
    ("asked", "cells", "device", "want"),
    [
        (None, 12, "cpu", 4), (-1, 12, "cpu", 4), (None, 3, "cpu", 3), (7, 12, "cpu", 7),
        (1, 12, "cpu", 1), (None, 1, "cpu", 1), (9, 2, "cpu", 2), (None, 12, "cuda", 2),
        (None, 12, "cuda:1", 1), (None, 12, "mps", 1), (3, 12, "cuda:1", 3), (-1, 0, "cpu", 1),
    ],
)  # fmt: skip
def test_number_of_jobs(asked, cells, device, want, monkeypatch):
    monkeypatch.setattr(grid, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert number_of_jobs(asked, cells, device) == want


def test_runs_of_several_threads_need_several_cores(monkeypatch):
    monkeypatch.setattr(grid, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert number_of_jobs(None, 12, "cpu") == 2


@pytest.mark.parametrize("asked", [0, -2])
def test_no_number_of_jobs(asked):
    with pytest.raises(UsageError, match=rf"--jobs must be at least 1, or -1 .*got {asked}"):
        number_of_jobs(asked, 2, "cpu")


def test_a_cell_that_is_claimed_comes_when_it_is_given_back(tmp_path):
    other = contextlib.ExitStack()
    other.enter_context(claimed(tmp_path, {"name": "b"}))
    running = shared(cells("a", "b", "c"), tmp_path, lambda: False)
    assert [next(running)["name"] for _ in range(2)] == ["a", "c"]
    other.close()
    assert [cell["name"] for cell in running] == ["b"]


@pytest.mark.parametrize("refused", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_folder_without_locks_has_no_claims_and_no_sharing(tmp_path, monkeypatch, refused):
    def refuse(*_):
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr("fcntl.flock", refuse)
    with claimed(tmp_path, {"name": "a"}):
        pass
    with pytest.raises(UsageError, match=r"has no locks.*choose an --out that has"):
        next(shared(cells("a"), tmp_path, lambda: False))


def test_waiting_for_a_claim_ends_with_a_signal(tmp_path):
    with claimed(tmp_path, {"name": "a"}):
        answers = iter([False, False, True])
        assert list(shared(cells("a"), tmp_path, lambda: next(answers))) == []


# compare.py

SHORT = ("--bits", "3", "--steps", "8", "--batch-size", "16", "--with-agm")
STEPS = 150
LONG = ("--bits", "3", "--batch-size", "4", "--seeds", "2", "--steps", str(STEPS))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the digits teacher, trained once."""
    folder = tmp_path_factory.mktemp("home")
    teachers.digits_teacher(folder / ".agm-cache")
    return folder


def start(home: Path, *argv: str, **environment: str) -> subprocess.Popen:
    """compare.py in a session of its own, its stderr in ``home``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with (home / "stderr").open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *argv], cwd=home, stdout=subprocess.PIPE, stderr=stderr,
            text=True, start_new_session=True, env=environment,
        )  # fmt: skip


def output(child: subprocess.Popen, status: int, home: Path) -> str:
    try:
        out, _ = child.communicate(timeout=600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == status, (home / "stderr").read_text()
    return out


def same_runs(home: Path, a: str, b: str) -> bool:
    names = sorted(path.name for path in (home / a).glob("*.ckpt"))
    assert names
    return untimed(load(home / a)["cells"]) == untimed(load(home / b)["cells"]) and same_networks(
        home / a, home / b, names
    )


def test_jobs_give_what_one_after_the_other_gives(home):
    argv = (*SHORT, "--seeds", "2", "--out")
    output(start(home, *argv, "one", "--jobs", "1"), 0, home)
    text = output(start(home, *argv, "two", LOKY_MAX_CPU_COUNT="2"), 0, home)
    assert same_runs(home, "one", "two")
    assert f"Reproduce: python {SCRIPT}" in text
    lines = (home / "stderr").read_text().splitlines()
    ended = [
        re.match(r"\[(\d)/4\] (gdfq-w3a3-\w+-seed\d): .* after \d+ s$", line) for line in lines
    ]
    assert [line[1] for line in ended] == list("1234")
    assert len({line[2] for line in ended}) == 4
    assert {path.name for path in (home / "one").iterdir()} == {
        path.name for path in (home / "two").iterdir()
    }


@pytest.fixture(scope="module")
def whole(home):
    output(start(home, *LONG, "--out", "whole", "--jobs", "1"), 0, home)
    return "whole"


def begun(out: Path) -> bool:
    return len(list(out.glob("*.run"))) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_grid_goes_on_as_if_nothing_had_happened(number, home, whole):
    name = f"stopped-{number.name}"
    argv = (*LONG, "--jobs", "2", "--checkpoint-every", "3", "--out", name)
    child = start(home, *argv)
    until(lambda: begun(home / name), child)
    if number == signal.SIGINT:
        os.killpg(child.pid, number)  # a terminal's Ctrl-C reaches every process
    else:
        child.send_signal(number)
    if number == signal.SIGKILL:
        output(child, -number, home)
    else:
        output(child, 128 + number, home)
        err = (home / "stderr").read_text()
        assert len(re.findall(rf"^gdfq-\S+: stopped after step \d+ of {STEPS}$", err, re.M)) == 2
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith(f"go on with: python {SCRIPT}")
    output(start(home, *argv, "--resume"), 0, home)
    assert same_runs(home, whole, name)


def workers(child: subprocess.Popen) -> list[int]:
    """The processes of its jobs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == child.pid and b"popen_loky" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def test_a_killed_worker_is_a_failed_cell(home, whole):
    argv = (*LONG, "--jobs", "2", "--checkpoint-every", "3", "--out", "killed")
    child = start(home, *argv)
    until(lambda: begun(home / "killed"), child)
    os.kill(workers(child)[0], signal.SIGKILL)
    text = output(child, 1, home)
    assert len(re.findall(r"^FAILED gdfq-\S+: TerminatedWorkerError: .*killed", text, re.M)) == 1
    assert sorted(row["error"] is None for row in load(home / "killed")["cells"]) == [False, True]
    output(start(home, *argv, "--resume"), 0, home)
    assert same_runs(home, whole, "killed")


def test_a_mistake_in_a_job_is_told_in_a_line(home):
    settings = home / "spoilt" / "settings.json"
    child = start(home, *SHORT, "--seeds", "1", "--jobs", "2", "--out", "spoilt")
    until(settings.exists, child)
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps(content | {"teacher_hash": "another"}))
    output(child, 2, home)
    last = (home / "stderr").read_text().splitlines()[-1]
    assert last.startswith("compare.py: error: this process has other settings than the first")
    assert "teacher_hash 'another' there" in last
