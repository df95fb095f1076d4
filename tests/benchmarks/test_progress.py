"""What is shown of a grid, on a terminal and elsewhere."""

import contextlib
import io
import re

import pytest

from benchmarks import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream: io.StringIO, monkeypatch, *, done: int = 0, quiet: bool = False) -> str:
    """What a grid of three cells writes, one of which was done before if so said."""
    monkeypatch.setattr("sys.stderr", stream)
    with contextlib.closing(progress.OfGrid(3, done, quiet=quiet)) as grid:
        for name in "abc"[done:]:
            with progress.of_run(8, name) as bar:
                bar.update(8)
            grid.running({name: "8/8", "other": ""})
            grid.ended(name, "good")
    return stream.getvalue()


def test_a_line_a_cell_without_a_terminal(monkeypatch):
    want = "[2/3] b: good\n[3/3] c: good\n"
    assert shown(io.StringIO(), monkeypatch, done=1) == want
    assert shown(io.StringIO(), monkeypatch, quiet=True) == ""


def test_a_terminal_keeps_the_grids_bar_alone(monkeypatch):
    text = shown(Terminal(), monkeypatch)
    assert "a:   0%" in text
    assert "a 8/8, other" in text
    assert "good" not in text
    *before, last = text.rstrip().split("\r")
    assert last.startswith("runs: 100%")
    assert "3/3" in last
    assert before[-1].strip(" \x1b[A") == ""  # wiped


def test_names_that_do_not_fit_are_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with contextlib.closing(progress.OfGrid(99, 0)) as grid:
        grid.running({f"gdfq-w3a3-both-seed{i}": f"{i}/600" for i in range(9)})
    (line,) = re.findall(r"gdfq-w3a3-both-seed0 0/600, gdfq.*\.\.\.", terminal.getvalue())
    assert len(line) == 39


def test_nothing_is_shown_where_all_was_done_before(monkeypatch):
    assert shown(Terminal(), monkeypatch, done=3) == ""


@pytest.mark.parametrize(("rank", "want"), [(None, True), ("0", True), ("1", False)])
def test_one_rank_shows(rank, want, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert progress.shown() is want


def test_a_job_writes_its_step_to_a_file_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setattr(progress, "_JOB", {})
    progress.is_job(tmp_path / "note")
    assert not progress.shown()
    with progress.of_run(8, "a") as bar:
        assert (tmp_path / "note").read_text() == "0/8"
        bar.update(8)
    assert (tmp_path / "note").read_text() == "8/8"
    assert terminal.getvalue() == ""
