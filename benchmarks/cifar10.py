"""The CIFAR-10 images behind README's tables, as a folder for --data.

    python benchmarks/cifar10.py --out cifar10/dev

torchvision downloads CIFAR-10 (170 MB) into --root. Of its 10,000 test images the 5,000 that are
named in cifar10_dev.txt, 500 a class, become PNG files, --out/CLASS/NAME.
"""

import argparse
import os
import pickle
import sys
import tempfile
from pathlib import Path

from PIL import Image
from torchvision import datasets

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agm import AgmError
from benchmarks.errors import UsageError

NAMES = Path(__file__).parent / "cifar10_dev.txt"


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--root", type=Path, default=Path(".agm-cache"), help="of the download")
    args = parser.parse_args(argv)
    try:
        print(f"{write(args.root, args.out)} images in {args.out}")
    except AgmError as error:
        print(f"cifar10.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def write(root: Path, out: Path) -> int:
    """Download, choose and write; ``out`` is whole or absent. Returns the number of images."""
    if out.exists():
        raise UsageError(f"{out} is there already; choose another --out")
    try:
        test = datasets.CIFAR10(root, train=False, download=True)  # which compares checksums
    except (OSError, RuntimeError) as error:
        raise UsageError(f"cannot download CIFAR-10 into {root}: {error}") from error
    with (root / test.base_folder / "test_batch").open("rb") as file:
        names = pickle.load(file, encoding="latin1")["filenames"]
    chosen = set(NAMES.read_text().split())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            whole = Path(folder, out.name)
            for name, image, label in zip(names, test.data, test.targets, strict=True):
                if name in chosen:
                    (whole / test.classes[label]).mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image).save(whole / test.classes[label] / name)
            os.replace(whole, out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error}; choose another --out") from error
    return len(chosen.intersection(names))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
