"""Conflicts between gradients, resolved pair by pair: arithmetic on the matrix of their inner products."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, pi, sin
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-9  # a cosine of an orthogonal pair, and the part of a gradient that cancellation leaves


class Conflict(NamedTuple):
    """Name one conflict of a step.

    Args:
        winner: The loss whose gradient gave way less.
        loser: The other one.
        cosine: The cosine of their gradients before.
    """

    winner: str
    loser: str
    cosine: float


@dataclass(frozen=True)
class Arbitration:
    """Set how a conflict is resolved: who wins, and how much of the other's direction each gradient loses.

    With the winner w, the loser l and their cosine c, both at once:
    `g_w −= s_w ⟨g_w, g_l⟩/|g_l|² g_l`, `g_l −= s_l ⟨g_w, g_l⟩/|g_w|² g_w`. Smooth: `s_w = sin α`,
    `s_l = sin min(α, π/2)` of the angle α that `angle` computes.
    In zones: the loser vanishes below the critical threshold, is projected below the main one, and both are projected
    below the weak one.

    The winner is the loss of the higher `stability · max(0, cos(g, its last one)) + strength · share`, where share is
    its part of the two norms over their means, unless one has won the last `streak` conflicts.

    Args:
        critical, main, weak: The thresholds of the cosine. From `weak` on gradients agree, and nothing changes.
        power: The power of α between the main and the critical threshold.
        zones: Whether strengths have steps, the source's older form.
        streak: After how many won conflicts in a row a loss no longer wins by its score; 0 for never.
        streak_wins: Which of the source's two readings holds then: False, its code's, the other loss wins; True, its
            README's, the same loss goes on winning.
        stability, strength: The weights of the score.
        norm_decay: The decay of the mean norm of a loss's gradient, which begins at 1.
        norm_cap: The largest norm of one loss's gradient; None for no cap.

    Raises:
        ValueError: A value is out of its range.

    Source:
        arXiv 2509.07252, and its code for the arbiter.
    """

    critical: float = -0.8
    main: float = -0.5
    weak: float = 0.0
    power: float = 2.0
    zones: bool = False
    streak: int = 3
    streak_wins: bool = False
    stability: float = 0.8
    strength: float = 0.2
    norm_decay: float = 0.95
    norm_cap: float | None = None

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if value is not None}
        if wrong := {name: value for name, value in numbers.items() if not _is_finite(value)}:
            raise ValueError(f"the rules of a conductor must be finite numbers, got {wrong}")
        if not -1 <= self.critical < self.main < self.weak <= 1:
            thresholds = (self.critical, self.main, self.weak)
            raise ValueError(f"thresholds must rise from critical to main to weak within [-1, 1], got {thresholds}")
        if self.power <= 0 or self.streak < 0 or self.streak != int(self.streak) or not 0 <= self.norm_decay < 1:
            raise ValueError(
                "power must be positive, streak a whole number, not negative, and 0 <= norm_decay < 1, got "
                f"{self.power}, {self.streak}, {self.norm_decay}"
            )
        if min(self.stability, self.strength) < 0 or (self.norm_cap is not None and self.norm_cap <= 0):
            raise ValueError(
                "stability and strength must not be negative, and norm_cap must be positive, got "
                f"{self.stability}, {self.strength}, {self.norm_cap}"
            )

    def angle(self, c: float) -> float:
        """Compute α of a cosine: 0 from the weak threshold up, π/2 at the main one, π from the critical one down."""
        if c >= self.main:
            return pi / 2 * max(0.0, (self.weak - c) / (self.weak - self.main))
        if c <= self.critical:
            return pi
        return pi / 2 + pi / 2 * ((self.main - c) / (self.main - self.critical)) ** self.power

    def change(self, c: float) -> tuple[float, float, float]:
        """Return s_w, s_l and the part of the loser that remains, for a cosine."""
        if not self.zones:
            alpha = self.angle(c)
            return sin(alpha) if alpha < pi else 0.0, sin(min(alpha, pi / 2)), 1.0
        if c < self.critical:
            return 0.0, 0.0, 0.0
        return (0.0 if c < self.main else 1.0), 1.0, 1.0

    def is_arbitrated(self, c: float) -> bool:
        """Return whether a conflict has a winner: in the weak zone both gradients lose the same."""
        return not self.zones or c < self.main

    def winner(self, i: int, j: int, scores: Mapping[int, float], winners: Sequence[int]) -> int:
        """Return which of two losses wins, given their scores and the winners of the conflicts before, in order."""
        recent = set(winners[-self.streak :]) if self.streak and len(winners) >= self.streak else set()
        if recent in ({i}, {j}):
            (usual,) = recent
            return usual if self.streak_wins else i + j - usual
        return j if scores[j] > scores[i] else i


def _is_finite(value: Any) -> bool:
    """Return whether a value is a number, not NaN nor infinite; a flag is one."""
    return isinstance(value, int | float) and isfinite(value)


class Arbiter:
    """Resolve the conflicts of each step, and remember what the next one asks of the last.

    Args:
        losses: K.
        rules: How conflicts are resolved.
    """

    def __init__(self, losses: int, rules: Arbitration) -> None:
        self.rules = rules
        self.norms = [1.0] * losses
        self.winners: list[int] = []
        self.mixing = torch.eye(losses, dtype=torch.float64)

    def judge(self, products: Tensor) -> tuple[list[float], list[tuple[int, int, float]]]:
        """Resolve the conflicts of K gradients.

        Args:
            products: Their inner products and those of the step before, as these came in, (2K, 2K).

        Returns:
            The weight of each gradient in the sum; and (winner, loser, cosine) of each conflict.
        """
        K, decay = len(self.norms), self.rules.norm_decay
        norms = products.diagonal()[:K].sqrt().tolist()
        self.norms = [decay * mean + (1 - decay) * norm for mean, norm in zip(self.norms, norms, strict=True)]
        as_resolved = torch.block_diag(torch.eye(K, dtype=torch.float64), self.mixing)
        products = as_resolved @ products @ as_resolved.T
        self.mixing, conflicts = resolve(products, self.norms, self.winners, self.rules)
        self.winners += [winner for winner, _, cosine in conflicts if self.rules.is_arbitrated(cosine)]
        self.winners = self.winners[-self.rules.streak :] if self.rules.streak else []
        return self.mixing.sum(0).tolist(), conflicts

    def state_dict(self) -> dict[str, Any]:
        """Return the state, of plain data."""
        return {"norms": list(self.norms), "winners": list(self.winners), "mixing": self.mixing.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.norms, self.winners = list(state["norms"]), list(state["winners"])
        self.mixing = torch.tensor(state["mixing"], dtype=torch.float64)


def resolve(
    products: Tensor, norms: Sequence[float], winners: Sequence[int], rules: Arbitration
) -> tuple[Tensor, list[tuple[int, int, float]]]:
    """Resolve the conflicts of K gradients, the lowest cosine first, until all agree or after 2K of them.

    Args:
        products: The inner products of the K gradients and the K of the step before, (2K, 2K), float64.
        norms: The mean norm of each gradient.
        winners: The winners of the last conflicts.
        rules: How.

    Returns:
        C, (K, K): gradient k becomes `Σ_j C_kj g_j`; and (winner, loser, cosine) of each conflict. The loser of a weak
        conflict in zones is the second of the two.
    """
    K = len(norms)
    now, across, before = products[:K, :K], products[:K, K:], products[K:, K:].diagonal()
    C = torch.diag(_caps(now.diagonal(), rules.norm_cap))
    winners, conflicts = list(winners), []
    for _ in range(2 * K):
        G = C @ now @ C.T
        if (pair := _most_opposed(G, now.diagonal(), rules.weak)) is None:
            break
        i, j, cosine = pair
        w = i
        if rules.is_arbitrated(cosine):
            w = rules.winner(i, j, _scores(G, (C @ across).diagonal(), before, norms, (i, j), rules), winners)
            winners.append(w)
        loser = i + j - w
        s_w, s_l, remains = rules.change(cosine)
        T = torch.eye(K, dtype=C.dtype)
        T[w, loser], T[loser, w] = -s_w * G[w, loser] / G[loser, loser], -s_l * G[w, loser] / G[w, w]
        T[loser, loser] = remains
        C = T @ C
        conflicts.append((w, loser, cosine))
    return C, conflicts


def _caps(squares: Tensor, cap: float | None) -> Tensor:
    """Return the factor that brings each gradient to its largest norm."""
    return torch.ones_like(squares) if cap is None else (cap / squares.sqrt()).clamp(max=1.0)


def _most_opposed(G: Tensor, whole: Tensor, weak: float) -> tuple[int, int, float] | None:
    """Return the pair of the lowest cosine below the threshold, and the cosine; gradients that vanished have none."""
    sizes = G.diagonal().clamp(min=0).sqrt()
    lives = sizes > ROUNDING * whole.sqrt()
    pairs = torch.triu(lives[:, None] & lives, diagonal=1)
    cosines = torch.where(pairs, G / (sizes[:, None] * sizes), torch.inf)
    place = int(cosines.argmin())
    i, j = divmod(place, len(G))
    cosine = float(cosines[i, j])
    return (i, j, cosine) if cosine < weak - ROUNDING else None


def _scores(
    G: Tensor, across: Tensor, before: Tensor, norms: Sequence[float], pair: tuple[int, int], rules: Arbitration
) -> dict[int, float]:
    """Return the scores of two gradients: how much each is like its last one, and its part of the two sizes."""
    sizes = G.diagonal().clamp(min=0).sqrt()
    strengths = {k: float(sizes[k]) / norms[k] for k in pair}
    scores = {}
    for k in pair:
        size = float(sizes[k] * before[k].sqrt())
        stability = max(0.0, float(across[k]) / size) if size > 0 else 0.0
        scores[k] = rules.stability * stability + rules.strength * strengths[k] / sum(strengths.values())
    return scores
