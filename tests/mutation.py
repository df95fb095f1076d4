"""Mutation testing: cosmic-ray makes the mutants, a fork of this process tests each of them.

    pip install cosmic-ray==8.7.0 && python tests/mutation.py agm/loss.py [--only LINE]

cosmic-ray's own runner starts Python and imports torch anew for every mutant; that is all that is
replaced here. A mutant is run in a copy of the working tree, against the test files of its module,
and is killed by a failing test or by 300 seconds of CPU time. One that cannot be imported does not
count. Survivors are printed as differences. Left out are replacements that nearly always raise an
error on tensors and numbers with a fraction, ``is`` for ``==``, and what only a type checker reads:
``@overload`` and the signatures of a Protocol. Hypothesis draws 25 examples a
test, an eighth of the usual.
"""

import argparse
import ast
import difflib
import importlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import hypothesis  # noqa: F401
import mpmath  # noqa: F401
import numpy as np  # noqa: F401
import pytest
import torch
from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).parents[1]
TESTS = {
    "agm/functional.py": ["agm/test_functional.py", "agm/test_loss.py"],
    "agm/loss.py": ["agm/test_loss.py"],
    "agm/augment.py": ["agm/test_augment.py"],
    "agm/temporal.py": ["agm/test_temporal.py"],
    "agm/networks.py": ["agm/test_networks.py", "agm/test_hooks.py"],
    "agm/graph.py": ["agm/test_hooks.py"],
    "agm/hooks.py": ["agm/test_hooks.py"],
    "baselines/quantization/quantizers.py": [
        "baselines/quantization/test_quantizers.py",
        "baselines/quantization/test_student.py",
    ],
    "baselines/quantization/checkpoint.py": [
        "baselines/quantization/test_checkpoint.py",
        "baselines/test_run.py::test_saved_and_loaded_predicts_the_same",
        "baselines/test_run.py::test_a_quantized_network_of_another_version",
    ],
}
UNREAD = ("overload", "Protocol")
LEFT_OUT = re.compile(r"BinaryOperator_\w+_(?:Bit\w+|[LR]Shift|Mod|FloorDiv|Pow)$|_Is$|_IsNot$")
INCOMPETENT = 77


def unread_lines(source: str) -> set[int]:
    """The lines of ``@overload`` signatures and of Protocol classes."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            marks = [*node.decorator_list, *(node.bases if isinstance(node, ast.ClassDef) else ())]
            if any(isinstance(mark, ast.Name) and mark.id in UNREAD for mark in marks):
                first = min(mark.lineno for mark in [node, *marks])
                lines |= {*range(first, (node.end_lineno or first) + 1)}
    return lines


def outcome(tree: Path, module: str) -> str:
    """Run the tests of a module in a fork."""
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        os.chdir(tree)
        sys.path[0] = str(tree)
        try:
            importlib.import_module(module.removesuffix(".py").replace("/", "."))
        except BaseException:
            os._exit(INCOMPETENT)
        files = [f"tests/{name}" for name in TESTS[module]]
        os._exit(
            pytest.main(
                ["-n0", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=brief", *files]
            )
        )
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "survived", INCOMPETENT: "incompetent"}.get(code, "killed")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module", choices=TESTS)
    parser.add_argument("--only", type=int, nargs="+", help="lines to mutate (default: all)")
    args = parser.parse_args()
    sys.dont_write_bytecode = True  # it would be taken for that of the next mutant
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        files = subprocess.run(
            ["git", "ls-files", "*.py", "*.toml", "*.md"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        for name in files.stdout.split():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        assert outcome(tree, args.module) == "survived", "the tests fail without any mutation"
        source = (ROOT / args.module).read_text()
        unread = unread_lines(source)
        for item in _all_work_items([ROOT / args.module], {}):
            (mutation,) = item.mutations
            if LEFT_OUT.search(mutation.operator_name) or mutation.start_pos[0] in unread:
                continue
            if args.only and mutation.start_pos[0] not in args.only:
                continue
            operator = get_operator(mutation.operator_name)()
            mutant = mutate_code(source, operator, mutation.occurrence)
            (tree / args.module).write_text(mutant)
            result = outcome(tree, args.module)
            counts[result] += 1
            if result == "survived":
                lines = difflib.unified_diff(source.splitlines(), mutant.splitlines(), n=0)
                print(mutation.operator_name, *list(lines)[2:], "", sep="\n", flush=True)
    score = 100 * counts["killed"] / (counts["killed"] + counts["survived"])
    print(f"{args.module}: {dict(counts)}, {score:.1f} % killed", flush=True)


if __name__ == "__main__":
    main()
