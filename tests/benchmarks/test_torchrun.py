"""compare.py under torchrun: ranks that share the cells, and ranks that share each batch."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.compare import complaint, load
from tests.benchmarks.test_grid import LONG, SCRIPT, SHORT, STEPS, output, same_runs, start, until
from tests.benchmarks.test_grid import home as home

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
GRID = (*LONG, "--seeds", "4", "--checkpoint-every", "3", "--out")


def torchrun(home: Path, size: int, *argv: str) -> subprocess.Popen:
    """As ``start`` of test_grid; a port of its own."""
    command = (*TORCHRUN, "--standalone", f"--nproc-per-node={size}", str(SCRIPT), *argv)
    with (home / "stderr").open("w") as stderr:
        return subprocess.Popen(
            command, cwd=home, stdout=subprocess.PIPE, stderr=stderr, text=True,
            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def rank(home: Path, number: int, size: int, port: int, *argv: str) -> subprocess.Popen:
    """One of several that nobody watches over, as on machines of their own."""
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "MASTER_PORT": port}
    place |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test"}
    return start(home, *argv, **{name: str(value) for name, value in place.items()})


def descendants(pid: int) -> list[int]:
    """The processes that torchrun started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid and b"compare.py" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def begun(out: Path, n: int):
    return lambda: len(list(out.glob("*.run"))) >= n


@pytest.fixture(scope="module")
def whole(home):
    output(start(home, *GRID, "whole"), 0, home)
    return "whole"


@pytest.mark.long  # a minute, for ranks that share cells
def test_a_rank_that_was_killed_is_made_up_for_by_resume(home, whole):
    child = torchrun(home, 3, *GRID, "killed")
    until(begun(home / "killed", 3), child)
    os.kill(descendants(child.pid)[-1], signal.SIGKILL)
    output(child, 1, home)  # torchrun ends the others, who save
    err = (home / "stderr").read_text()
    assert re.search(rf"stopped after step \d+ of {STEPS}", err)
    assert re.search(r"^go on with: .* --out killed --resume$", err, re.M)
    assert len(list((home / "killed").glob("*.run"))) == 3
    output(torchrun(home, 3, *GRID, "killed", "--resume"), 0, home)
    assert same_runs(home, whole, "killed")


@pytest.mark.long
def test_a_rank_that_nobody_misses_is_made_up_for_by_the_others(home, whole):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    ranks = [rank(home, i, 3, port, *GRID, "missed") for i in range(3)]
    until(begun(home / "missed", 3), ranks[0])
    ranks[2].kill()
    output(ranks[2], -signal.SIGKILL, home)
    output(ranks[1], 0, home)
    text = output(ranks[0], 0, home)
    assert "Wrote missed/report.json" in text
    assert same_runs(home, whole, "missed")


def test_ranks_that_share_each_batch(home):
    argv = ("--bits", "3", "--batch-size", "8", "--seeds", "1", "--steps", "60", "--with-agm")
    argv += ("--checkpoint-every", "3", "--parallel", "batch", "--out")
    text = output(torchrun(home, 2, *argv, "batch"), 0, home)
    command = f"Reproduce: torchrun --nproc-per-node=2 {SCRIPT}"
    assert text.splitlines()[-1].startswith(command)
    assert load(home / "batch")["settings"]["ranks"] == 2
    child = torchrun(home, 2, *argv, "stopped")
    until(begun(home / "stopped", 1), child)
    os.kill(descendants(child.pid)[0], signal.SIGTERM)  # of which the other is told
    output(child, 1, home)
    assert re.search(r"stopped after step \d+ of 60", (home / "stderr").read_text())
    output(torchrun(home, 2, *argv, "stopped", "--resume"), 0, home)
    assert same_runs(home, "batch", "stopped")
    argv = argv[: argv.index("--parallel")]
    output(start(home, *argv, "--out", "batch", "--resume"), 2, home)
    assert "ranks 2 there, None now" in (home / "stderr").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--bits", "3"), "under torchrun --out is needed"),
        (("--jobs", "2", "--out", "wrong"), "give --nproc-per-node in place of --jobs"),
    ],
)
def test_mistakes_under_torchrun(home, argv, message):
    output(torchrun(home, 2, *argv), 1, home)
    err = (home / "stderr").read_text()
    assert re.search(rf"^compare.py: error: .*{message}", err, re.M)
    assert not (home / "wrong" / "settings.json").exists()


@pytest.mark.parametrize("more", [(), ("--parallel", "batch")], ids=["runs", "batches"])
def test_ranks_with_different_networks_are_a_mistake(home, more):
    (home / "drawn.py").write_text(
        "import os, torch\nfrom tests.benchmarks.compare import NETS\nexec(NETS)\n"
        "def make():\n    torch.manual_seed(int(os.environ['RANK']))\n    return cnn()\n"
    )
    argv = (*SHORT, "--model", "drawn:make", "--out", f"drawn{len(more)}", *more)
    output(torchrun(home, 2, *argv), 1, home)
    line = r"^compare.py: error: this process has other settings .*teacher_hash.*made anew by each"
    assert re.search(line, (home / "stderr").read_text(), re.M)


def test_parallel_without_torchrun():
    assert "--parallel needs torchrun" in complaint("--parallel", "batch")
