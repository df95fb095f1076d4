"""README's plug-in snippet runs as printed, with its marked lines and without them."""

import re
from pathlib import Path

import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"
SNIPPET = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
MARK = "  # +\n"


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 100)
        self.linear = nn.Linear(100, 3 * 8 * 8)

    def forward(self, z, y):
        return torch.tanh(self.linear(z * self.embedding(y))).view(-1, 3, 8, 8)


def classifier():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10)
    ).eval()


def run(code):
    """Everything that the loop takes for granted, then the loop; returns its names."""
    torch.manual_seed(0)
    teacher, student, generator = classifier().requires_grad_(False), classifier(), Generator()
    names = {
        "steps": 3,
        "teacher": teacher,
        "student": student,
        "generator": generator,
        "generator_optimizer": torch.optim.Adam(generator.parameters()),
        "student_optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
    }
    exec(code, names)
    return names


def test_at_most_five_lines_are_added():
    assert 1 <= SNIPPET.count(MARK) <= 5


def test_the_snippet_trains_and_changes_the_result():
    without = run(
        "\n".join(line for line in SNIPPET.splitlines() if not line.endswith(MARK.rstrip()))
    )
    with_agm = run(SNIPPET)
    for names in (without, with_agm):
        assert names["lq"].isfinite()
    for network in ("generator", "student"):
        pairs = zip(without[network].parameters(), with_agm[network].parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs)
