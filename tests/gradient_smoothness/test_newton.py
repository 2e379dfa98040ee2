"""Regularized Newton steps: the source's counts, its problems, affine equivariance, and what is refused."""

import pytest
import torch
from numerics import EXACT, MUST_FAIL, RUN, relative

from symlm.gradient_smoothness import (
    RankOne,
    exact,
    fisher,
    gauss_newton,
    minimize,
    newton_step,
    softmax_gauss_newton,
    zero,
)
from symlm.gradient_smoothness.newton import Metric

START = torch.tensor([-2.0, 2.0], dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def residuals(x):
    return torch.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)])


def square(u):
    return u @ u


def rosenbrock(x):
    return square(residuals(x))


def power(p):
    return lambda u: (u @ u) ** (p / 2) / p


@pytest.mark.parametrize(
    ("hessian", "steps", "solves"),
    [(None, 51, 105), (gauss_newton(square, residuals), 50, 101)],
    ids=["exact", "gauss_newton"],
)
def test_rosenbrock_takes_as_many_steps_as_in_the_source(hessian, steps, solves):
    found = minimize(rosenbrock, START, hessian, target=1e-8)
    assert found.reason == "target"
    assert (len(found.steps), found.solves) == (steps, solves)
    assert found.value < 1e-8


def log_sum_exp(rows=24, columns=10):
    """Return the source's problem, with its minimum at zero: `log Σ exp(Ax − b)`, A without the gradient there."""
    A, b = random(rows, columns), random(rows, seed=1)
    A = A - (-b).softmax(0) @ A

    def inner(x):
        return A @ x - b

    return A, inner, lambda x: inner(x).logsumexp(0)


@pytest.mark.parametrize("hessian", ["exact", "softmax_gauss_newton"])
def test_log_sum_exp_is_minimized_at_zero_in_its_metric(hessian):
    A, inner, f = log_sum_exp()
    H = exact(f) if hessian == "exact" else softmax_gauss_newton(inner)
    best = f(torch.zeros(10, dtype=torch.float64))
    found = minimize(f, torch.ones(10, dtype=torch.float64), H, B=A.T @ A, target=float(best) + 1e-8)
    assert found.reason == "target"
    assert len(found.steps) < 100
    assert H(found.x).shape == (10, 10)
    assert torch.linalg.eigvalsh(softmax_gauss_newton(inner)(found.x) - exact(f)(found.x)).min() > -EXACT


@pytest.mark.parametrize("hessian", ["exact", "gauss_newton", "fisher"])
def test_a_power_of_a_norm_of_linear_equations_falls_by_orders(hessian):
    A, b, p = random(20, 12), random(20, seed=1), 4

    def inner(x):
        return A @ x - b

    f = lambda x: power(p)(inner(x))  # noqa: E731
    H = {"exact": exact(f), "gauss_newton": gauss_newton(power(p), inner), "fisher": fisher(inner, p)}[hessian]
    best = power(p)(inner(torch.linalg.lstsq(A, b).solution))
    start = torch.ones(12, dtype=torch.float64)
    found = minimize(f, start, H, B=A.T @ A, target=float(best) + 1e-8, steps=2000)
    assert found.reason == "target"
    assert f(start) - best > 1


def test_the_hessians_are_those_of_the_formulas():
    A, b, x, p = random(7, 5), random(7, seed=1), random(5, seed=2), 5

    def inner(x):
        return (A @ x).sin() - b

    u, J = inner(x), torch.func.jacrev(inner)(x)
    f_prime = torch.func.grad(lambda x: power(p)(inner(x)))(x)
    first, second = u.norm() ** (p - 2) * J.T @ J, (p - 2) * u.norm() ** (p - 4) * torch.outer(J.T @ u, J.T @ u)
    assert relative(gauss_newton(power(p), inner)(x), first + second) < EXACT
    c, v = fisher(inner, p)(x)
    assert relative(c * torch.outer(v, v), second) < EXACT
    assert relative(second, (p - 2) / u.norm() ** p * torch.outer(f_prime, f_prime)) < EXACT
    assert fisher(inner, 2)(x).c == 0
    assert relative(exact(rosenbrock)(START), torch.tensor([[4002.0, 800.0], [800.0, 200.0]])) < EXACT


@pytest.mark.parametrize("hessian", ["exact", "gauss_newton", "zero", "fisher"])
def test_iterates_move_with_an_affine_map_if_the_metric_moves_along(hessian):
    T, c = random(2, 2) + 2 * torch.eye(2, dtype=torch.float64), random(2, seed=1)
    B = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    make = {
        "exact": lambda f, u: exact(f),
        "gauss_newton": lambda f, u: gauss_newton(square, u),
        "zero": lambda f, u: zero(f),
        "fisher": lambda f, u: fisher(u, 4),
    }[hessian]

    def moved(y):
        return rosenbrock(T @ y + c)

    there = torch.linalg.solve(T, START - c)
    plain = minimize(rosenbrock, START, make(rosenbrock, residuals), B, steps=15)
    carried = minimize(moved, there, make(moved, lambda y: residuals(T @ y + c)), T.T @ B @ T, steps=15)
    assert relative(T @ carried.x + c, plain.x) < RUN
    assert [step.gamma for step in carried.steps] == [step.gamma for step in plain.steps]
    assert [step.gradient for step in carried.steps] == pytest.approx([step.gradient for step in plain.steps])
    left = minimize(moved, there, make(moved, lambda y: residuals(T @ y + c)), B, steps=15)
    assert relative(T @ left.x + c, plain.x) > 1e-3


def test_a_zero_hessian_gives_the_normalized_gradient_step():
    g, B = random(6), random(6, 6)
    B = B @ B.T + torch.eye(6, dtype=torch.float64)
    H = zero(rosenbrock)(g)
    for metric in (Metric(None), Metric(B)):
        h, amount = newton_step(g, H, 0.3, metric)
        raised = g if metric.B is None else torch.linalg.solve(B, g)
        size = (g @ raised).sqrt()
        assert relative(h, -0.3 * raised / size) < EXACT
        assert float(amount) == pytest.approx(float(size / 0.3))


def test_a_hessian_of_rank_one_is_solved_as_the_matrix_that_it_is():
    g, v, B = random(6), random(6, seed=1), random(6, 6, seed=2)
    metric = Metric(B @ B.T + torch.eye(6, dtype=torch.float64))
    c = torch.tensor(0.7, dtype=torch.float64)
    fast, _ = newton_step(g, RankOne(c, v), 0.5, metric)
    whole, _ = newton_step(g, c * torch.outer(v, v), 0.5, metric)
    assert relative(fast, whole) < RUN


def saddle(x):
    return 0.25 * (x[0] ** 2 - 1) ** 2 + 0.5 * x[1] ** 2


def test_where_the_hessian_is_not_positive_the_radius_is_halved_until_it_is():
    start = torch.tensor([0.1, 1.0], dtype=torch.float64)
    assert torch.linalg.eigvalsh(exact(saddle)(start)).min() < 0
    with pytest.raises(ValueError, match="is not positive definite: take a smaller gamma than 100"):
        newton_step(torch.func.grad(saddle)(start), exact(saddle)(start), 100.0)
    found = minimize(saddle, start, gamma=100.0, tolerance=1e-10)
    assert found.reason == "gradient"
    assert float(found.x[0]) == pytest.approx(1)


def test_bad_input_is_refused_and_a_minimum_that_cannot_be_bettered_ends():
    for B in ([[1.0, 2.0], [2.0, 1.0]], [[2.0, 1.0], [0.0, 2.0]]):
        with pytest.raises(ValueError, match="the metric B is not symmetric and positive definite"):
            minimize(rosenbrock, START, B=torch.tensor(B, dtype=torch.float64))
    for gamma in (0.0, -1.0, float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match=f"the radius gamma must be positive and finite, got {gamma!r}"):
            minimize(rosenbrock, START, gamma=gamma)
    for p in (1, float("nan")):
        with pytest.raises(ValueError, match=f"power needs p >= 2, got {p}"):
            fisher(residuals, p)
    for mu in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"a log-sum-exp needs mu > 0, got {mu}"):
            softmax_gauss_newton(residuals, mu)
    for H in (torch.eye(3), torch.ones(2, 3), torch.ones(2)):
        with pytest.raises(ValueError, match="the Hessian must be a matrix of 2 rows and columns"):
            minimize(rosenbrock, START, lambda x, H=H: H.double())
    with pytest.raises(ValueError, match="the Hessian is not symmetric"):
        minimize(rosenbrock, START, lambda x: torch.tensor([[1.0, 5.0], [0.0, 1.0]], dtype=torch.float64))
    for x, B in ((torch.eye(2).double(), None), (START, torch.eye(3).double()), (START, torch.ones(2, 3).double())):
        with pytest.raises(ValueError, match=r"minimize needs a vector x, \(n,\), and a metric B of \(n, n\)"):
            minimize(lambda x: x.square().sum(), x, B=B)
    with pytest.raises(ValueError, match="not finite where minimize begins"):
        minimize(lambda x: x.log().sum(), START)
    with pytest.raises(ValueError, match=r"the Hessian plus .* B is not positive definite"):
        minimize(rosenbrock, START, lambda x: torch.full((2, 2), float("nan"), dtype=x.dtype))
    assert minimize(rosenbrock, START, steps=3).reason == "steps"
    flat = minimize(lambda x: 1 + x @ x, torch.full((2,), 1e-9, dtype=torch.float64))  # 1 + 2e-18 is 1
    assert flat.reason == "stuck"


def test_the_radius_is_that_of_the_step_that_was_taken():
    found = minimize(rosenbrock, START, steps=5)
    first = found.steps[0]
    assert first.value == pytest.approx(float(rosenbrock(START)))
    assert first.gradient == pytest.approx(float(torch.func.grad(rosenbrock)(START).norm()))
    h, _ = newton_step(torch.func.grad(rosenbrock)(START), exact(rosenbrock)(START), first.gamma)
    once = minimize(rosenbrock, START, steps=1)
    assert relative(once.x, START + h) < EXACT
    assert relative(found.x, once.x) > MUST_FAIL
