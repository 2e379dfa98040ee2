"""Screening designs: many dials in few runs, each effect the mean of half of the runs against the other half."""

import numpy as np
from scipy.linalg import hadamard

PRIMES = (3, 7, 11, 19, 23)


def design(dials: int) -> np.ndarray:
    """Return a two-level design of strength two: columns are orthogonal, and each has as many -1 as 1.

    The first `dials` columns are the dials'; those that are left measure the error. Runs are a multiple of four, the
    least above the number of dials.

    Args:
        dials: How many dials, 1 to 23.

    Returns:
        Runs × (runs - 1), of -1 and 1.

    Raises:
        ValueError: There are no dials, or more than 23.

    Source:
        Plackett & Burman, Biometrika 33 (1946); the squares of a prime field as in Paley (1933), 16 runs by Sylvester.
    """
    if not 1 <= dials <= PRIMES[-1]:
        raise ValueError(f"a screening has 1 to {PRIMES[-1]} dials; got {dials}")
    runs = 4 * (dials // 4 + 1)
    if runs - 1 not in PRIMES:
        return hadamard(runs)[:, 1:]
    prime = runs - 1
    squares = {k * k % prime for k in range(1, prime)}
    first = np.array([1 if k in squares or k == 0 else -1 for k in range(prime)])
    return np.vstack([*(np.roll(first, k) for k in range(prime)), -np.ones(prime, int)])


def effects(levels: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return the mean loss at 1 minus that at -1, of every column.

    Shapes: (runs, columns), (runs,) -> (columns,).
    """
    return levels.T @ losses / (len(losses) / 2)
