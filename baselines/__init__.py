"""Generator-based data-free quantization: GDFQ, Qimera and AdaDFQ on one loop that takes hooks."""

from baselines.errors import BaselineError
from baselines.quantization.checkpoint import load_quantized, save_quantized
from baselines.quantization.export import deployed, export_onnx
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
