import errno
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import process
from benchmarks.errors import UsageError
from benchmarks.process import Stop, locked

ROOT = Path(__file__).parents[2]
HOLDER = """
import pathlib, signal, sys
from benchmarks.process import locked
with locked(pathlib.Path(sys.argv[1])):
    print("holding", flush=True)
    signal.pause()
"""
LONG_STEP = """
import os, signal
from benchmarks.process import Stop
arrived, writing = os.pipe()
os.set_blocking(writing, False)
signal.set_wakeup_fd(writing)  # signal.pause would miss a signal that comes just before it
stop = Stop()
with stop.listening():
    print("training", flush=True)
    os.read(arrived, 1)
    assert stop()
    print("stopping", flush=True)
    os.read(arrived, 1)
"""


def start(code: str, *args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"another run is working in .*choose another --out") as e:
        locked(folder).__enter__()
    assert str(folder) in str(e.value)


def test_a_folder_is_locked_until_its_process_is_gone_however_it_went(tmp_path):
    folder = tmp_path / "runs" / "a"
    with start(HOLDER, str(folder)) as holder:
        try:
            assert holder.stdout.readline() == "holding\n"
            refused(folder)
            with locked(tmp_path / "runs" / "b"):
                pass
        finally:
            holder.kill()
        assert holder.wait() == -signal.SIGKILL
    with locked(folder):
        refused(folder)
    with locked(folder):  # and the lock of a finished run as well
        pass


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_locking_leaves_other_files_alone(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with locked(tmp_path):
        pass
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "inside"):
        with pytest.raises(UsageError, match=r"cannot write to .*choose another --out") as e:
            locked(folder).__enter__()
        assert str(folder) in str(e.value)
    assert file.read_text() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_the_step_end(number):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    stop, done = Stop(), False
    with stop.listening():
        assert not stop()
        assert stop.received is None
        signal.raise_signal(number)
        done = True
    assert done
    assert stop()
    assert stop.received == number
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_handlers_are_restored_after_an_error():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyError), Stop().listening():
        raise KeyError
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_second_signal_ends_the_program_at_once():
    with start(LONG_STEP) as child:
        try:
            assert child.stdout.readline() == "training\n"
            os.kill(child.pid, signal.SIGINT)
            assert child.stdout.readline() == "stopping\n"
            os.kill(child.pid, signal.SIGTERM)
            assert child.wait(300) == 128 + signal.SIGTERM
        finally:
            child.kill()


# Where the system lacks something


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("refused", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EACCES])
def test_a_folder_without_locks_is_a_warning(tmp_path, monkeypatch, refused, wait):
    def refuse(*_):
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr("fcntl.flock", refuse)
    entered = []
    warning = pytest.warns(UserWarning, match=rf"{tmp_path} cannot be locked.*no second run")
    with warning, locked(tmp_path, wait=wait):
        entered.append(True)
    assert entered


def test_a_system_without_fcntl_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # import fcntl fails
    try:
        without = importlib.reload(process)
        warning = pytest.warns(UserWarning, match="cannot be locked .this system has no fcntl")
        with warning, without.locked(tmp_path):
            (tmp_path / "result").write_text("1")
    finally:
        monkeypatch.undo()
        importlib.reload(process)
    assert (tmp_path / "result").read_text() == "1"
    with process.locked(tmp_path):
        refused(tmp_path)
