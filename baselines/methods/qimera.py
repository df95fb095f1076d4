"""Qimera: Choi et al., "Data-free Quantization with Synthetic Boundary Supporting Samples",
NeurIPS 2021.

latent = sum_k w_k M(norm(e_{y_k} + z_k)), soft label = sum_k w_k onehot(y_k),
w = softmax of Gaussian noise, or, with probability 1 - p for a whole step, the first class alone.
L_G and L_Q as GDFQ's, both cross-entropies on the soft label.
"""

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from baselines.errors import UnsupportedLayerError
from baselines.methods import gdfq
from baselines.methods.gdfq import GDFQ
from baselines.quantization.graph import CONVOLUTIONS, run_order
from baselines.training.generators import Decoder
from baselines.training.recipe import Recipe


class SuperposedGenerator(nn.Module):
    """(classes (N, K), noise (N, K, D), weights (N, K)) -> images.

    Args:
        embedding: of the classes, (C, D), to start from.
        decoder: of the superposed latents.
        superposed: K.
        probability: p, that a step superposes.
    """

    def __init__(
        self, embedding: Tensor, decoder: Decoder, *, superposed: int, probability: float
    ) -> None:
        super().__init__()
        self.superposed, self.probability = superposed, probability
        self.embedding = nn.Embedding.from_pretrained(embedding.clone(), freeze=False)
        self.disentangle = nn.Linear(embedding.shape[1], decoder.linear.in_features)
        self.decoder = decoder

    def sample(self, n: int, rng: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        """The inputs for n images, and their soft labels (n, C)."""
        k, (num_classes, dim) = self.superposed, self.embedding.weight.shape
        classes = torch.randint(num_classes, (n, k), generator=rng, device=rng.device)
        noise = torch.randn(n, k, dim, generator=rng, device=rng.device)
        weights = torch.randn(n, k, generator=rng, device=rng.device).softmax(1)
        # Chosen on the device, so that no step waits for the outcome.
        superpose = torch.rand((), generator=rng, device=rng.device) < self.probability
        weights = torch.where(superpose, weights, torch.eye(1, k, device=rng.device))
        labels = torch.zeros(n, num_classes, device=rng.device).scatter_add_(1, classes, weights)
        return (classes, noise, weights), labels

    def forward(self, classes: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
        noisy = self.embedding(classes) + noise
        latents = self.disentangle(F.layer_norm(noisy, noisy.shape[-1:]))
        return self.decoder((weights[..., None] * latents).sum(1))


@dataclass(frozen=True)
class Qimera(GDFQ):
    """GDFQ's losses and constants on soft labels, of which ``many_classes`` plays no part, and

    Args:
        latent_dim: of the decoder's input (default 64, CIFAR's).
        probability: p, that a step superposes (default 0.4).
        superposed: K; None (default) for the published 2 up to 10 classes, 10 up to 100, else 100,
            which is MobileNetV2's (ResNet-18 and ResNet-50 have 500, the latter with p = 0.7).
        from_classifier: start the embeddings from the rows of the teacher's last layer, a Linear
            or a 1x1 Conv2d; None (default) where published: small images with more than 10 classes
            (and ResNet-50).
    """

    latent_dim: int = 64
    probability: float = 0.4
    superposed: int | None = None
    from_classifier: bool | None = None

    def make_generator(
        self, teacher: nn.Module, num_classes: int, image_shape: tuple[int, int, int]
    ) -> nn.Module:
        channels, size, _ = image_shape
        from_classifier = self.from_classifier
        if from_classifier is None:
            from_classifier = num_classes > 10 and size <= 64
        superposed = self.superposed or (
            2 if num_classes <= 10 else 10 if num_classes <= 100 else 100
        )
        decoder = Decoder(
            self.latent_dim, size, channels, width=self.width, largest_start=self.largest_start
        )
        return SuperposedGenerator(
            self._embedding(teacher, num_classes, from_classifier),
            decoder,
            superposed=superposed,
            probability=self.probability,
        )

    def _embedding(self, teacher: nn.Module, num_classes: int, from_classifier: bool) -> Tensor:
        if not from_classifier:
            return torch.randn(num_classes, self.latent_dim)
        modules = list(teacher.modules())
        if isinstance(teacher, fx.GraphModule):  # the last that runs, not the last that is listed
            modules = [m for called in run_order(teacher) for m in called.modules()]
        weights = [m.weight for m in modules if isinstance(m, (nn.Linear, *CONVOLUTIONS))]
        shape = weights[-1].shape if weights else ()
        # Linear, or a convolution of one pixel: in either case a row a class.
        if shape[:1] != (num_classes,) or shape[2:].numel() != 1:
            raise UnsupportedLayerError(
                "Qimera starts its embeddings from the teacher's last layer, which must be a "
                f"Linear or a 1x1 convolution with {num_classes} outputs, one a class, and has "
                f"weights {tuple(shape)}; choose another method"
            )
        return weights[-1].detach().flatten(1).cpu()


def paper(image_size: int) -> tuple[Qimera, Recipe]:
    """The published settings; the optimizers, lengths and exceptions are GDFQ's."""
    method, recipe = gdfq.paper(image_size)
    return _with_losses_of(method), recipe


def quick(image_size: int) -> tuple[Qimera, Recipe]:
    """GDFQ's quick settings with Qimera's images, from a generator that is trained less.

    At GDFQ's rate the images of a class grow alike (``benchmarks/evidence/results/ablation.md``).
    """
    method, recipe = gdfq.quick(image_size)
    return _with_losses_of(method), replace(recipe, generator_lr=1e-4)


def _with_losses_of(method: GDFQ) -> Qimera:
    """Qimera with all of GDFQ's settings, but for those of a generator that takes a label."""
    own = {"latent_dim": Qimera.latent_dim, "many_classes": None}
    return Qimera(**asdict(method) | own)
