"""Named coefficient schedules of the Newton–Schulz iteration, each once, each with its source."""

from dataclasses import dataclass

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Schedule:
    """List the coefficients `(a, b, c)` of `X' = aX + (bA + cA²)X`, `A = XXᵀ`, one triple a step.

    Args:
        triples: The coefficients; steps beyond them repeat the last triple.
        bound: The factor on ‖X‖_F by which X is divided before the first step, so that no singular value exceeds 1
            by rounding.
        source: Where the coefficients are from.
    """

    triples: tuple[Triple, ...]
    bound: float
    source: str

    def steps(self, count: int) -> list[Triple]:
        """Return the coefficients of the first steps.

        Args:
            count: The number of steps.

        Returns:
            `count` triples.

        Raises:
            ValueError: count < 1.
        """
        if count < 1:
            raise ValueError(f"Newton–Schulz needs at least one step, got steps={count}; the default is 5")
        return [self.triples[min(k, len(self.triples) - 1)] for k in range(count)]


def _safe(triples: tuple[Triple, ...], factor: float) -> tuple[Triple, ...]:
    """Divide every polynomial's argument by `factor`, except the last one's (Polar Express, section 4.4)."""
    *head, last = triples
    return (*((a / factor, b / factor**3, c / factor**5) for a, b, c in head), last)


SCHEDULES: dict[str, Schedule] = {
    "muon": Schedule(((3.4445, -4.7750, 2.0315),), 1.0, "Jordan et al. 2024, Muon: quintic tuned for slope at zero"),
    "polar_express": Schedule(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        1.02,
        "Amsel et al., arXiv 2505.16932, Algorithm 1: 5 steps, safety 2e-2, cushion 2",
    ),
    "polar_express_long": Schedule(
        _safe(
            (
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
                (1.875, -1.25, 0.375),
            ),
            1.05,
        ),
        1.0,
        "Amsel et al., arXiv 2505.16932, the list of the paper's listing, safety 1.05; converges beyond 7 steps",
    ),
    "newton_schulz": Schedule(((1.5, -0.5, 0.0),), 1.0, "Higham, Functions of Matrices, 2008, eq. (8.20)"),
}


def get_schedule(name: str) -> Schedule:
    """Return the named schedule.

    Args:
        name: A key of `SCHEDULES`.

    Returns:
        The schedule.

    Raises:
        ValueError: There is no schedule of that name; the message lists the names.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose one of {sorted(SCHEDULES)}")
    return SCHEDULES[name]
