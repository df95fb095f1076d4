"""One fixed hypothesis profile, so that a failure on one machine is a failure on every machine.

And the fault campaigns: tests that take the fixture ``campaign``, run short by default and at full
length, alone, by ``python -m pytest --campaign``.
"""

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "agm",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("brief", settings.get_profile("agm"), max_examples=25)  # for mutants
settings.load_profile("agm")

torch.set_num_threads(1)  # the tensors are tiny: threads only cost
# compare.py's cells run here, where a test can reach them, unless it asks for --jobs.
os.environ["LOKY_MAX_CPU_COUNT"] = "1"
if not torch.cuda.is_available():  # before anything imports Triton, which reads it then and later
    os.environ["TRITON_INTERPRET"] = "1"


class Campaign:
    """How many faults to inject, and what came of them."""

    def __init__(self, full: bool) -> None:
        self.full = full
        self.counts: dict[str, Counter[str]] = {}

    def size(self, short: int, full: int) -> int:
        return full if self.full else short

    def count(self, fault: str, **outcomes: int) -> None:
        """Add to the counts of a fault; call it for an outcome when that has been asserted."""
        self.counts.setdefault(fault, Counter()).update(outcomes)


CAMPAIGN = pytest.StashKey[Campaign]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--campaign", action="store_true", help="the fault campaigns alone, at full length"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: a part of a campaign that only --campaign runs")
    config.stash[CAMPAIGN] = Campaign(config.getoption("--campaign"))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A campaign's counts are kept in one process."""
    return 0 if config.getoption("--campaign") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    full = config.stash[CAMPAIGN].full
    chosen: list[list[pytest.Item]] = [[], []]
    for item in items:
        long = item.get_closest_marker("long") is not None
        belongs = long or "campaign" in getattr(item, "fixturenames", ())
        chosen[belongs if full else not long].append(item)
    config.hook.pytest_deselected(items=chosen[False])
    items[:] = chosen[True]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    campaign = config.stash[CAMPAIGN]
    if campaign.full:
        terminalreporter.section("faults injected")
        for fault, outcomes in sorted(campaign.counts.items()):
            counts = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in outcomes.items())
            terminalreporter.line(f"{fault}: {counts}")


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Campaign:
    return request.config.stash[CAMPAIGN]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
