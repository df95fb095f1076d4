"""What the exported files lose, weigh and cost, against the networks that they were made from.

    python benchmarks/evidence/deployed.py RUN... --out FILE --model resnet20 --weights W --data D

RUN are output folders of compare.py. Each finished cell's network is exported with its synthetic
images and judged on all of --data: the student, the file (ONNX Runtime, all optimizations), and how
often the file without them agrees with its reference in torch, and the file of
``arithmetic="float"`` with the student. Times are the median of interleaved
calls of one thread, batch 16, as a share of the float32 network's, also in ONNX Runtime.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import benchmarks  # noqa: F401 - first, since it says what is missing

# isort: split
import numpy as np
import torch
from torch import Tensor

from agm import AgmError
from baselines import deployed, export_onnx, load_quantized
from baselines.quantization.export import float_onnx
from benchmarks import command_line, report
from benchmarks.errors import UsageError
from benchmarks.provenance import provenance
from benchmarks.task.task import Task, load_task

ROUNDS = 30


def session(path: Path, *, optimized: Path | None = None) -> Any:
    """ONNX Runtime on one thread; with ``optimized``, where to write what it made of the graph."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def logits(run: Any, batches: list[Tensor]) -> Tensor:
    """Of a session, for all batches."""
    found = [run.run(None, {"images": np.ascontiguousarray(x.numpy())})[0] for x in batches]
    return torch.from_numpy(np.concatenate(found))


def judged(task: Task, folder: Path, row: dict[str, Any], batches: list[Tensor]) -> dict[str, Any]:
    """The figures of one cell."""
    import onnx

    model = load_quantized(folder / row["checkpoint"], task.teacher)
    levels = torch.from_numpy(np.load(folder / f"{row['name']}.npy")).permute(0, 3, 1, 2)
    images = task.inputs.normalised(levels, 255)
    labels = task.images.labels
    with tempfile.TemporaryDirectory() as place:
        path, made, whole = Path(place, "a.onnx"), Path(place, "b.onnx"), Path(place, "c.onnx")
        exported = export_onnx(model, path, images)
        whole.write_bytes(float_onnx(task.teacher, model.meta["image_shape"]))
        runs = {"integer": session(path, optimized=made), "float32": session(whole, optimized=made)}
        fast = session(path, optimized=made)
        kinds = [node.op_type for node in onnx.load(made).graph.node]
        of = {"file": logits(fast, batches), "plain": logits(session(path), batches)}
        floats = Path(place, "d.onnx")
        export_onnx(model, floats, arithmetic="float")
        of["float"] = logits(session(floats, optimized=made), batches)
        sizes = {"bytes": path.stat().st_size, "float32_bytes": whole.stat().st_size}
    with torch.no_grad():
        reference = deployed(model, images)
        of["deployed"] = torch.cat([reference(x) for x in batches])
        of["student"] = torch.cat([model(x) for x in batches])
    x = {"images": np.ascontiguousarray(batches[0][:16].numpy())}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run.run(None, x)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    chosen = {name: v.argmax(1) for name, v in of.items()}
    hits = {name: int((v == labels).sum()) for name, v in chosen.items()}
    accuracies = {name: round(100 * n / len(labels), 4) for name, n in hits.items()}
    return {
        "name": row["name"], "bits": [row["weight_bits"], row["act_bits"]], "seed": row["seed"],
        **{f"accuracy_{name}": value for name, value in accuracies.items()},
        "plain_agrees_with_deployed": _agreement(chosen["plain"], chosen["deployed"]),
        "float_agrees_with_student": _agreement(chosen["float"], chosen["student"]),
        **sizes,
        "qlinearconv": kinds.count("QLinearConv"), "conv_left": kinds.count("Conv"),
        "integer_layers": exported.integer_layers, "layers": len(exported.rows),
        "time_over_float32": medians["integer"] / medians["float32"],
    }  # fmt: skip


def _agreement(a: Tensor, b: Tensor) -> float:
    return 100 * float((a == b).float().mean())


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are compare.py's.",
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", type=command_line.path)
    parser.add_argument("--out", type=command_line.path, required=True)
    own, rest = parser.parse_known_args(argv)
    try:
        torch.set_num_threads(1)
        task = load_task(command_line.parse(rest))
        if task.images is None:
            raise UsageError("--data is missing, the images to judge on")
        task.teacher.cpu()
        batches = [x.contiguous() for x, _ in task.images]
        rows = []
        for folder in own.runs:
            for file in sorted(folder.glob("*-seed*.json")):
                rows.append(judged(task, folder, json.loads(file.read_text()), batches))
                print(json.dumps(rows[-1]), flush=True)
        command = shlex.join(["python", "benchmarks/evidence/deployed.py", *argv])
        report.write_json(own.out, {"command": command, "cells": rows, **provenance("cpu")})
    except AgmError as error:
        print(f"deployed.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
