"""The claims of Zhao et al. (NeurIPS 2022, section 5) in numbers: speed, several steps, and convex quadratics."""

import pytest
import torch
from numerics import EXACT, relative

from symlm import teleport as t


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spd(n, seed):
    A = random(n, n, seed=seed)
    return A @ A.T / n + 0.3 * torch.eye(n).double()


def rotation(n, seed=0):
    return torch.linalg.qr(random(n, n, seed=seed))[0]


def gradient(loss, w):
    w = w.detach().requires_grad_()
    return torch.autograd.grad(loss(w), w)[0]


def rosenbrock(w):
    return 100 * (w[0] ** 2 - w[1]) ** 2 + (w[0] - 1) ** 2


def act_on_rosenbrock(R, w):
    u, v = R @ torch.stack([10 * (w[0] ** 2 - w[1]), w[0] - 1])
    return torch.stack([v + 1, (v + 1) ** 2 - u / 10])


A = spd(4, seed=1)
CASES = {
    "quadratic": (lambda w: w @ A @ w, lambda w: t.act_on_quadratic(A, rotation(4), w), random(4, seed=2)),
    "Rosenbrock": (rosenbrock, lambda w: act_on_rosenbrock(rotation(2, seed=3), w), random(2, seed=4)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("metric", [False, True])
def test_5_1_how_fast_the_loss_falls_there_is_the_jacobian_here(name, metric):
    """Along `w' = −η∇L` the loss falls by `|∇L|²_η`; at g·w that is `|J^{-T}∇L(w)|²_η`, J the action's Jacobian."""
    loss, act, w = CASES[name]
    eta = spd(len(w), seed=5) if metric else torch.eye(len(w)).double()
    J = torch.autograd.functional.jacobian(act, w)
    predicted = torch.linalg.solve(J.T, gradient(loss, w))
    there = act(w)
    assert loss(there).item() == pytest.approx(loss(w).item())
    assert relative(predicted, gradient(loss, there)) < 1e-10
    speed, width = predicted @ eta @ predicted, 1e-8 / float(predicted.norm())
    fallen = loss(there) - loss(there - width * eta @ gradient(loss, there))
    assert (fallen / width).item() == pytest.approx(speed.item(), rel=1e-4)


def test_5_1_a_group_that_is_orthogonal_in_the_metric_changes_no_speed():
    """`g = η^{1/2} R η^{-1/2}` satisfies `gᵀη^{-1}g = η^{-1}`; another g does change it."""
    eta, G = spd(4, seed=6), random(4, seed=7)
    values, vectors = torch.linalg.eigh(eta)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T

    def speed(g):
        moved = torch.linalg.solve(g.T, G)
        return (moved @ eta @ moved).item()

    same = root @ rotation(4, seed=8) @ torch.linalg.inv(root)
    assert speed(same) == pytest.approx(speed(torch.eye(4).double()))
    assert abs(speed(rotation(4, seed=8)) / speed(torch.eye(4).double()) - 1) > 0.05


SMOOTH = {  # f with its Lipschitz constant of the gradient
    "quadratic": (lambda w: 0.5 * w @ A @ w, torch.linalg.eigvalsh(A)[-1].item()),
    "log-sum-exp": (lambda w: (A @ w).logsumexp(0), torch.linalg.matrix_norm(A, 2).item() ** 2),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_5_4_a_gradient_that_is_large_enough_stays_the_larger_for_several_steps(name, steps):
    """`|∇L(w')|/|∇L(w)| ≥ ((1+ηL)/(1−ηL))^T` is enough for T steps of gradient descent; a step changes it by 1 ± ηL."""
    loss, L = SMOOTH[name]
    lr = 0.01 / L
    enough, tried = ((1 + lr * L) / (1 - lr * L)) ** steps, 0
    for seed in range(200):
        small, large = random(4, seed=2 * seed), random(4, seed=2 * seed + 1)
        if name == "quadratic":
            large = large * (loss(small) / loss(large)).sqrt()  # of one level set, as a teleport has it
        small, large = sorted((small, large), key=lambda w: gradient(loss, w).norm().item())
        sizes = [[gradient(loss, w).norm().item()] for w in (small, large)]
        if sizes[1][0] < sizes[0][0] * enough:
            continue
        tried += 1
        for w, found in zip((small, large), sizes, strict=True):
            for _ in range(steps):
                w = w - lr * gradient(loss, w)
                found.append(gradient(loss, w).norm().item())
                assert (1 - lr * L) * found[-2] <= found[-1] * (1 + 1e-9)
                assert found[-1] <= (1 + lr * L) * found[-2] * (1 + 1e-9)
        assert all(big >= little for little, big in zip(*sizes, strict=True))
    assert tried >= 20


def test_5_4_a_gradient_that_is_only_a_little_larger_may_not_stay_so():
    """`diag(1, 9)`: the steeper gradient decays faster, so a lead below the bound is lost."""
    H, lr = torch.tensor([1.0, 9.0]).double(), 0.05
    flat, steep = torch.tensor([9.0, 0.0]).double(), torch.tensor([0.0, 1.2]).double()
    assert (H * steep).norm() > (H * flat).norm()
    for _ in range(5):
        flat, steep = flat - lr * H * flat, steep - lr * H * steep
    assert (H * steep).norm() < (H * flat).norm()


def test_5_7_on_a_quadratic_one_teleport_makes_the_whole_trajectory_the_steepest():
    """At the largest gradient of its level set w is an eigenvector of the largest λ, and stays one at every step.

    So the gradient is then, and remains, along Newton's direction; at another point of the level set it is not.
    """
    values, vectors = torch.linalg.eigh(A)
    start = random(4, seed=9)
    level = start @ A @ start
    best = (level / values[-1]).sqrt() * vectors[:, -1]
    for seed in range(50):  # on the orbit, which is the level set, no gradient is larger
        other = t.act_on_quadratic(A, rotation(4, seed=seed), start)
        assert (other @ A @ other).item() == pytest.approx(level.item())
        assert (A @ other).norm() <= (A @ best).norm() * (1 + EXACT)
    w = best
    for _ in range(20):
        G = 2 * A @ w
        newton = torch.linalg.solve(2 * A, G)
        assert torch.cosine_similarity(G, newton, dim=0).item() == pytest.approx(1, abs=EXACT)
        assert G.norm().item() == pytest.approx(2 * (w @ A @ w * values[-1]).sqrt().item())
        w = w - 0.1 * G
    G = 2 * A @ start
    assert torch.cosine_similarity(G, torch.linalg.solve(2 * A, G), dim=0).item() < 0.95
