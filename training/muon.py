"""Muon: momentum whose every step is orthogonalised; with it these models need far fewer samples than with Adam."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring all singular values close to one, keeping the singular vectors.

    Five Newton-Schulz steps with the coefficients of Jordan et al., "Muon: an optimizer for hidden layers in neural
    networks" (2024); singular values end between about 0.7 and 1.2.

    Args:
        matrices: (n, rows, columns).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; for matrices and convolution kernels (flattened to output by all else).

    Args:
        params: weights of two or more dimensions, not biases, gains or embeddings.
        lr: step, in units of the spectral norm of a square matrix.
        momentum: decay of the running mean of gradients.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; weights of the same shape are orthogonalised together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.flatten(1).shape, []).append(weight)
            for shape, weights in by_shape.items():
                gradients = torch.stack([self._nesterov(weight, group["momentum"]) for weight in weights])
                size = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
                for weight, update in zip(weights, orthogonalise(gradients), strict=True):
                    weight.sub_(update.view_as(weight), alpha=size)

    def _nesterov(self, weight: Tensor, momentum: float) -> Tensor:
        state: dict[str, Any] = self.state[weight]
        gradient = weight.grad
        assert gradient is not None  # step() leaves out weights without one
        mean = state.setdefault("mean", torch.zeros_like(gradient))
        mean.lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum).flatten(1)
