"""Hessians of functions of a vector, whole and approximate, by torch.func."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


class RankOne(NamedTuple):
    """Store `c v vᵀ`, which a step inverts without a factorization.

    Args:
        c: The coefficient, a scalar.
        v: The vector, (n,).
    """

    c: Tensor
    v: Tensor


Hessian = Callable[[Tensor], Tensor | RankOne]


def exact(f: Function) -> Hessian:
    """Return x -> ∇²f(x), (n, n).

    Args:
        f: The function, (n,) -> scalar.
    """
    return torch.func.hessian(f)


def zero(f: Function) -> Hessian:
    """Return x -> 0: the step is that of the normalized gradient, `−γ B⁻¹g/|g|_*`.

    Args:
        f: The function, (n,) -> scalar.
    """
    return lambda x: RankOne(x.new_zeros(()), torch.zeros_like(x))


def gauss_newton(outer: Function, inner: Function) -> Hessian:
    """Return x -> `Jᵀ ∇²outer(u) J` of `f(x) = outer(u)`, `u = inner(x)` with the Jacobian J.

    Of `outer(u) = |u|^p/p` it is `|u|^{p−2} JᵀJ + (p−2)|u|^{p−4} (Jᵀu)(Jᵀu)ᵀ`.

    Args:
        outer: (m,) -> scalar.
        inner: (n,) -> (m,).
    """

    def hessian(x: Tensor) -> Tensor:
        J = torch.func.jacrev(inner)(x)
        return J.T @ torch.func.hessian(outer)(inner(x)) @ J

    return hessian


def fisher(inner: Function, p: float) -> Hessian:
    """Return x -> `(p−2)|u|^{p−4} (Jᵀu)(Jᵀu)ᵀ` of `f(x) = |u|^p/p`, `u = inner(x)`: a multiple of ∇f∇fᵀ.

    Args:
        inner: (n,) -> (m,).
        p: The power, at least 2.

    Raises:
        ValueError: p is below 2.
    """
    if not p >= 2:
        raise ValueError(f"a Fisher term of a norm's power needs p >= 2, got {p}")

    def hessian(x: Tensor) -> RankOne:
        u, pull = torch.func.vjp(inner, x)[:2]
        return RankOne((p - 2) * u.norm() ** (p - 4) if p > 2 else u.new_zeros(()), pull(u)[0])

    return hessian


def softmax_gauss_newton(inner: Function, mu: float = 1.0) -> Hessian:
    """Return x -> `Jᵀ diag(softmax(u/μ)) J / μ` of `f(x) = μ log Σ exp(u/μ)`, `u = inner(x)`: above the Hessian.

    Args:
        inner: (n,) -> (m,).
        mu: μ, positive.

    Raises:
        ValueError: μ is not positive.
    """
    if not mu > 0:
        raise ValueError(f"a log-sum-exp needs mu > 0, got {mu}")

    def hessian(x: Tensor) -> Tensor:
        J = torch.func.jacrev(inner)(x)
        return J.T @ ((inner(x) / mu).softmax(0)[:, None] * J) / mu

    return hessian
