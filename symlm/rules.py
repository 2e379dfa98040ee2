"""The update rules: pure maps from a stack of matrices to directions, each declaring the symmetry it claims."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from symlm_kernels.reference import center, unit_rows
from torch import Tensor

from symlm.coefficients import get_schedule
from symlm.polar import polar as polar_factor
from symlm.scaling import nuclear_norm
from symlm.symmetry import Symmetry, permutations, rotations, signed_permutations

Polar = Callable[[Tensor], Tensor]
DENSE = Symmetry(left=rotations, right=rotations)
ROWS = Symmetry(left=signed_permutations, right=rotations)
CENTERED_ROWS = Symmetry(left=permutations, right=rotations, shift=True)
ELEMENTS = Symmetry(left=signed_permutations, right=signed_permutations)


PROMISES = {  # the departure that rounding, or five Newton–Schulz steps, may leave
    "unit rows": 1e-3,
    "zero column sums": 1e-3,
    "singular values": 0.35,
    "spectral norm": 0.35,
    "signs": 1e-3,
}


@dataclass(frozen=True)
class Rule:
    """A pure map (..., m, n) -> (..., m, n) with the symmetry it claims and its degree, `U(cM) = c^degree U(M)`.

    Call it as `rule(M)`, or `rule(M, polar=f)` to choose how polar factors are computed.
    """

    name: str
    function: Callable[..., Tensor]
    symmetry: Symmetry
    degree: int = 0
    stateful: bool = False
    row_map: Callable[[Tensor], Tensor] | None = None  # the rule, between its centerings, where rows do not mix

    def __call__(self, M: Tensor, *, polar: Polar = polar_factor) -> Tensor:
        if M.ndim < 2:
            raise ValueError(f"rule {self.name!r} wants (..., m, n), got shape {tuple(M.shape)}")
        return self.function(M, polar) if self.spectral else self.function(M)

    def blocks(
        self,
        M: Tensor,
        elements: int,
        rows: int | None = None,
        total: Callable[[Tensor], Tensor] = lambda x: x,
        seen: Callable[[slice], Tensor] | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, U[rows]) in blocks of about `elements`, so that a vocabulary's temporaries stay in cache.

        Shapes: (m, n) -> (block, n). A centered rule passes over M twice more, for the two means. Where M is a part of
        a matrix of `rows` rows, `total` sums a vector (n) over the parts. `seen` gives rows to use in place of M's.
        Raises: ValueError for a rule that mixes rows.
        """
        if self.row_map is None:
            raise ValueError(f"rule {self.name!r} mixes rows: it has no blocks")
        seen, f = seen or M.__getitem__, self.row_map
        size = max(1, elements // M.shape[-1])
        blocks = [slice(start, start + size) for start in range(0, len(M), size)]
        if not self.symmetry.shift:
            yield from ((block, f(seen(block))) for block in blocks)
            return
        count = len(M) if rows is None else rows
        zero = seen(slice(0, 0)).sum(dim=0)
        shift = total(sum((seen(block).sum(dim=0) for block in blocks), start=zero)) / count
        mean = total(sum((f(seen(block) - shift).sum(dim=0) for block in blocks), start=zero)) / count
        yield from ((block, f(seen(block) - shift).sub_(mean)) for block in blocks)

    def departures(self, M: Tensor, U: Tensor) -> dict[str, float]:
        """Return how far U is from what the rule promises of `rule(M)`, by promise; see `PROMISES` for the bounds.

        Shapes: (b, m, n) twice. Rows and matrices that are zero promise nothing. Reads the device, and takes SVDs.
        """
        M, U = M.double(), U.double()
        found = {}
        if self.row_map is not None and not self.symmetry.shift:
            lengths = U.norm(dim=-1)
            found["unit rows"] = (lengths - 1)[M.norm(dim=-1) > 0].abs()
        if self.symmetry.shift:
            found["zero column sums"] = U.sum(dim=-2).abs() / U.abs().sum(dim=-2).clamp(min=1e-300)
        if self.symmetry == DENSE:
            L, S, Rh = torch.linalg.svd(M, full_matrices=False)
            size = S.sum(dim=-1, keepdim=True) if self.degree else torch.ones_like(S[..., :1])
            own = (L.mT @ U @ Rh.mT).diagonal(dim1=-2, dim2=-1) / size.clamp(min=1e-300)
            found["singular values"] = (own - 1)[1e-2 * S.norm(dim=-1, keepdim=True) < S].abs()
        elif self.spectral and self.name.endswith("polar"):
            norms = torch.linalg.matrix_norm(U, ord=2)
            found["spectral norm"] = (norms - 1)[norms > 0].abs()
        if self.symmetry == ELEMENTS:
            found["signs"] = (U.abs() - 1)[M != 0].abs()
        return {promise: float(values.max()) for promise, values in found.items() if values.numel()}

    @property
    def spectral(self) -> bool:
        """Tell whether the rule computes a polar factor."""
        return "polar" in inspect.signature(self.function).parameters


RULES: dict[str, Rule] = {}


def rule(symmetry: Symmetry, **properties: Any) -> Callable[[Callable[..., Tensor]], Rule]:
    """Register the decorated function in `RULES` under its own name."""

    def register(function: Callable[..., Tensor]) -> Rule:
        RULES[function.__name__] = Rule(function.__name__, function, symmetry, **properties)
        return RULES[function.__name__]

    return register


def get_rule(name: str) -> Rule:
    """Return the named rule.  Raises: ValueError, listing the names."""
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}; choose one of {sorted(RULES)}")
    return RULES[name]


@rule(DENSE)
def polar(M: Tensor, polar: Polar) -> Tensor:
    """Return `U_r V_rᵀ` of the thin SVD.  Source: Muon, Jordan et al. 2024; arXiv 2505.21799."""
    return polar(M)


@rule(DENSE)
def left_spectral(M: Tensor, polar: Polar) -> Tensor:
    """Return `(M Mᵀ)^{-1/2} M`, which is the polar factor; the Gram side that is formed is the cheaper one.

    Source: arXiv 2605.18106, section 3.5.
    """
    return polar(M)


@rule(DENSE)
def right_spectral(M: Tensor, polar: Polar) -> Tensor:
    """Return `M (Mᵀ M)^{-1/2}`, which is the polar factor; the Gram side that is formed is the cheaper one.

    Source: arXiv 2605.18106, section 3.3.
    """
    return polar(M)


@rule(DENSE, degree=1)
def polargrad(M: Tensor, polar: Polar) -> Tensor:
    """Return `ν U`, `U = polar(M)`, `ν = ⟨M, U⟩ = ‖M‖_*`.  Source: arXiv 2505.21799, eq. 5."""
    return nuclear_norm(M, polar(M))


@rule(ROWS, row_map=unit_rows)
def row_norm(M: Tensor) -> Tensor:
    """Scale each row to unit length, `U_i = M_i / |M_i|`.  Source: arXiv 2605.18106, section 3.3."""
    return unit_rows(M)


@rule(CENTERED_ROWS, row_map=unit_rows)
def centered_row_norm(M: Tensor) -> Tensor:
    """Return `C D C M`: center, scale rows to unit length, center again.  Rows have length near 1, `1ᵀU = 0`.

    Source: arXiv 2605.18106, section 3.4; a shared shift of all rows is invisible to a softmax.
    """
    return center(unit_rows(center(M)))


@rule(ROWS)
def row_then_polar(M: Tensor, polar: Polar) -> Tensor:
    """Return `polar(D M)`, D scaling rows to unit length (the hybrid with α = 0)."""
    return polar(unit_rows(M))


@rule(ROWS)
def polar_then_row(M: Tensor, polar: Polar) -> Tensor:
    """Return `D polar(M)`, D scaling rows to unit length."""
    return unit_rows(polar(M))


@rule(CENTERED_ROWS)
def centered_polar(M: Tensor, polar: Polar) -> Tensor:
    """Return `C polar(C M)`: left-spectral on the quotient by the shared shift."""
    return center(polar(center(M)))


@rule(CENTERED_ROWS)
def centered_row_then_polar(M: Tensor, polar: Polar) -> Tensor:
    """Return `C polar(C D C M)`."""
    return center(polar(center(unit_rows(center(M)))))


@rule(CENTERED_ROWS)
def centered_polar_then_row(M: Tensor, polar: Polar) -> Tensor:
    """Return `C D polar(C M)`."""
    return center(unit_rows(polar(center(M))))


@rule(ELEMENTS)
def sign(M: Tensor) -> Tensor:
    """Return the sign of every entry: the negative control that Adam stands for."""
    return M.sign()


def brake(X: Tensor) -> Tensor:
    """Return `√(mean cosh²X)` of each matrix: `1 + γ²/2N` to first order for N entries of `γM/|M|_F`."""
    return X.cosh().square().mean(dim=(-2, -1), keepdim=True).sqrt()


def unit_matrix(M: Tensor) -> Tensor:
    """Return `M/|M|_F`; a zero matrix stays zero.  Shapes: (..., m, n) -> same."""
    return unit_rows(M.flatten(-2)).reshape(M.shape)


@rule(ELEMENTS)
def auon(M: Tensor) -> Tensor:
    """Return `X/√(mean cosh²X)`, `X = M/|M|_F`: the momentum's own direction, of Frobenius norm near 1.

    Source: arXiv 2509.24320, the paper's rule.
    """
    X = unit_matrix(M)
    return X / brake(X)


@rule(ELEMENTS, degree=1)
def auon_unnormalized(M: Tensor) -> Tensor:
    """Return `M/√(mean cosh²(γM/|M|_F))`, γ = 1.5: not normalized.  Source: arXiv 2509.24320, the code."""
    return M / brake(1.5 * unit_matrix(M))


@rule(ELEMENTS)
def hybrid_auon(M: Tensor) -> Tensor:
    """Return `Y/√(mean cosh²Y)`, Y one Newton–Schulz step of `M/|M|_F`.  Source: arXiv 2509.24320, the hybrid."""
    a, b, c = get_schedule("muon").steps(1)[0]
    X = unit_matrix(M)
    A = X @ X.mT
    Y = a * X + (b * A + c * A @ A) @ X
    return Y / brake(Y)


@rule(ELEMENTS, stateful=True)
def adamw(M: Tensor) -> Tensor:
    """Return AdamW's first direction from zero state, `M / |M|` entrywise; the optimizer runs torch's own, with state.

    Source: Loshchilov & Hutter, arXiv 1711.05101; degree 0 up to its absolute eps.
    """
    return M / torch.where(M == 0, 1.0, M.abs())
