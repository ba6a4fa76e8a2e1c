"""Distances between predictions. Pure functions of tensors."""

from typing import Literal

from torch import Tensor

Distance = Literal["l2", "pseudo_huber"]


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over all elements."""
    return (a - b).square().mean()


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Mean over elements of sqrt(d^2 + c^2) - c, the element-wise form of the public LCM recipes.

    Song & Dhariwal (2023) define it on whole samples; with c = 1e-3 the element-wise form is nearly L1.
    """
    return ((a - b).square().add(c**2).sqrt() - c).mean()
