"""The images behind the record's tables, of CIFAR-10 or CIFAR-100, as a folder for --data.

    python benchmarks/cifar.py cifar10 --out cifar10/dev
    python benchmarks/cifar.py cifar100 --out cifar100/dev

torchvision downloads the data set (170 MB) into --root and compares the MD5 sums of the archive and
of each file in it with its own. Of the 10,000 test images those 5,000 that cifar10_dev.txt or
cifar100_dev.txt names, 500 or 50 a class, become PNG files, --out/CLASS/NAME.
"""

import argparse
import os
import pickle
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import benchmarks  # noqa: F401 - first, since it says what is missing

# isort: split
from PIL import Image
from torchvision import datasets

from agm import AgmError
from benchmarks.command_line import path
from benchmarks.errors import UsageError

LISTS = Path(__file__).parent
SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SETS)
    parser.add_argument("--out", type=path, required=True, help="a folder that is not there yet")
    parser.add_argument("--root", type=path, default=Path(".agm-cache"), help="of the download")
    args = parser.parse_args(argv)
    try:
        print(f"{write(args.name, args.root, args.out)} images in {args.out}")
    except AgmError as error:
        print(f"cifar.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def write(name: str, root: Path, out: Path) -> int:
    """Download, choose and write; ``out`` is whole or absent. Returns the number of images."""
    if out.exists():
        raise UsageError(f"{out} is there already; choose another --out")
    try:
        test = getattr(datasets, SETS[name])(root, train=False, download=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"cannot download {SETS[name]} into {root}: {error}") from error
    with (root / test.base_folder / test.test_list[0][0]).open("rb") as file:
        filenames = pickle.load(file, encoding="latin1")["filenames"]
    chosen = set((LISTS / f"{name}_dev.txt").read_text().split())
    found = [
        (f"{test.classes[label]}/{filename}", image)
        for filename, image, label in zip(filenames, test.data, test.targets, strict=True)
    ]
    found = [(path, image) for path, image in found if path in chosen]
    if sorted(path for path, _ in found) != sorted(chosen):
        raise UsageError(
            f"the test split in {root} has {len(found)} of the {len(chosen)} images that "
            f"{name}_dev.txt names; remove it there, so that it is downloaded again"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            whole = Path(folder, out.name)
            for path, image in found:
                (whole / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(whole / path)
            os.replace(whole, out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error}; choose another --out") from error
    return len(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
