"""Generator-based data-free quantization: methods (``METHODS``) on one loop that takes hooks.

A step, in :class:`baselines.training.trainer.Trainer`: latents -> images -> teacher -> the
method's losses and the hooks' -> generator; images -> hooks -> student. :func:`quantize` is a run
of it, with evaluation, checkpoints and export. Imports point one way: run -> methods -> training
-> quantization -> errors.

Where to add what:

* a method: one file, see :mod:`baselines.methods`;
* a hook, in any package: an object with the four calls of :class:`agm.Hook`, given as
  ``quantize(..., hooks=[...])``, and called after the warm-up. ``generator_loss`` may return 0,
  and ``student_batch``, which is given labels here, the (images, labels) that it was given; about
  other images the teacher is asked again. Draw from a ``torch.Generator`` of its own and keep it in
  ``state_dict``, so that a resumed run is the same bit for bit, and have a ``__repr__`` that names
  its settings, by which a resumed run knows it; see ``benchmarks/task/real_images.py``;
* a range estimator: a function (x, bit_width, scheme) -> (low, high) in ``RANGE_ESTIMATORS`` of
  :mod:`baselines.quantization.quantizers`; the recipes and the tests know it by its name;
* a layer that no quantizer or exporter knows: it is refused by name; teach
  :mod:`baselines.quantization.canonical` to write it with layers that they know.
"""

from baselines.errors import BaselineError
from baselines.quantization.checkpoint import load_quantized, save_quantized
from baselines.quantization.export import export_onnx
from baselines.quantization.integers import deployed
from baselines.run import METHODS, RECIPES, Interrupted, Result, quantize

__all__ = [
    "METHODS",
    "RECIPES",
    "BaselineError",
    "Interrupted",
    "Result",
    "deployed",
    "export_onnx",
    "load_quantized",
    "quantize",
    "save_quantized",
]
