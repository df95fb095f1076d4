"""Current networks of torchvision, timm and pip: quantized whole, near the original, trainable.

Random weights with settled BatchNorms, images of 64 pixels (or what the network needs).
"""

import warnings
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from baselines.methods import gdfq
from baselines.quantization.policy import QuantizationConfig, bit_policy
from baselines.quantization.quantizers import ActivationQuantizer, observing, unquantized
from baselines.quantization.reference import Reference
from baselines.quantization.student import build_student
from baselines.quantization.tracing import traced
from baselines.training.trainer import Trainer
from tests.baselines import images, settle

TORCHVISION = (
    "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_400mf",
    "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x1_0", "vgg11_bn",
)  # fmt: skip
TIMM = (
    "cspresnet50", "densenet121", "dla34", "dpn48b", "ecaresnet26t", "efficientnet_lite0",
    "ese_vovnet19b_dw", "fbnetc_100", "gernet_s", "ghostnet_050", "hardcorenas_a",
    "hrnet_w18_small", "mixnet_s", "mobilenetv3_small_050", "mobileone_s0", "regnety_002",
    "repvgg_a0", "res2net50_14w_8s", "resnest14d", "resnet10t", "rexnet_100", "selecsls42b",
    "skresnet18", "tf_efficientnet_b0", "tinynet_e", "xception41",
)  # fmt: skip
SAMPLE = {
    "torchvision:shufflenet_v2_x1_0", "torchvision:regnet_y_400mf", "timm:mobilenetv3_small_050",
    "efficientnet_lite_pytorch",
}  # fmt: skip
NAMES = [
    *(f"torchvision:{name}" for name in TORCHVISION), *(f"timm:{name}" for name in TIMM),
    "efficientnet_lite_pytorch",
]  # fmt: skip


def network(name):
    library, _, model = name.partition(":")
    if library == "torchvision":
        more = {}
        if model in ("googlenet", "inception_v3"):
            more = {"aux_logits": False, "init_weights": False}
        return torchvision.models.get_model(model, num_classes=10, **more)
    if library == "timm":
        return pytest.importorskip("timm").create_model(model, num_classes=10)
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    return lite.EfficientNet.from_name("efficientnet-lite0", num_classes=10)


@pytest.mark.parametrize(
    "name", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.long) for n in NAMES]
)
def test_quantized_whole_near_the_original_and_trainable(name):
    size = 96 if "inception" in name else 64
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net = settle(network(name), size, shift=1.0)
    x = images(8, size, seed=2)
    reference = Reference(net, x)
    graph = traced(net, (3, size, size))
    reference.check(graph, "traced")

    student = build_student(graph, QuantizationConfig(8, 8, "inputs", fold_batch_norm=True))
    with unquantized(student):
        reference.check(student, "student's")
    with torch.no_grad(), observing(student):
        student(x)
    assert (student(x) - reference.logits).norm() < 0.05 * reference.logits.norm()
    policy = bit_policy(student)
    assert policy.floating == 0
    weights = [row for row in policy.rows if row[1] == "weight"]
    layers = [m for m in graph.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]
    assert len(weights) == len(layers)
    assert policy.read == sum(isinstance(m, ActivationQuantizer) for m in student.modules())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        settle(net, size)
    losses = losses_of_training(net, size)
    assert sum(losses[-4:]) / 4 < losses[0]


def losses_of_training(net, size):
    """Of the student at W3A3, at quick's rate, on the same images throughout."""
    method, recipe = gdfq.quick(size)
    recipe = replace(recipe, steps=13, batch_size=8, warmup=0.1, observe=0.1,
                     generator_lr=1e-6, schedule="constant", shift=False)  # fmt: skip
    trainer = Trainer(
        net,
        method=replace(method, width=8, latent_dim=8),
        recipe=recipe,
        config=recipe.config(3, 3),
        image_shape=(3, size, size),
        input_mean=0.0,
        input_std=1.0,
        precision="fp32",
    )
    trainer.step()
    fixed = trainer.generator.sample(8, trainer.rng)
    trainer.generator.sample = lambda *_: fixed
    return [
        sum(term.item() for name, term in trainer.step().items() if name.startswith("Q/"))
        for _ in range(12)
    ]
