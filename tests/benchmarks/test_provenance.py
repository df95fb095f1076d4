"""What made a figure."""

from benchmarks.provenance import provenance


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance("cpu")["versions"]["commit"] is None
