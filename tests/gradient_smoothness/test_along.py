"""The radius of a language model along a step: what it is, what does not change it, and where it is refused."""

import pytest
import torch
from models import loss_of, tiny, tokens
from numerics import EXACT, MUST_FAIL, RUN
from torch import nn

import symlm
from symlm import teleport as t
from symlm.gradient_smoothness import along_step


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(n):
    return torch.linalg.qr(random(n, n))[0]


def skew(*shape):
    T = random(*shape)
    return T - T.mT


SYMMETRIES = {
    "neuron permutations": lambda model: t.neuron_permutations(
        model, torch.stack([torch.randperm(48, generator=torch.Generator().manual_seed(k)) for k in range(2)])
    ),
    "rotations of values": lambda model: t.value_output(model, skew(2, 2, 8, 8)),
    "rope rotations": lambda model: t.rope_rotations(model, random(2, 2, 4)),
    "head shift": lambda model: t.head_shift(model, random(32)),
    "residual rotation": lambda model: t.residual_rotation(model, orthogonal(32)),
}


def measured(model, step, x):
    return along_step(model, step, lambda call: loss_of(call, x), groups=symlm.assign_roles(model))


def matrices_of(model):
    return {name: 0.01 * torch.randn_like(p) for name, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("name", SYMMETRIES)
def test_gamma_of_every_role_is_the_same_wherever_a_symmetry_of_the_loss_moves_model_and_step(name):
    model, x = tiny(dtype=torch.float64), tokens()
    step = matrices_of(model)
    before = measured(model, step, x)
    assert {"all", "attention_q", "mlp_out", "embedding", "lm_head"} <= set(before)
    transports = SYMMETRIES[name](model)
    t.teleport(model, transports, lambda: loss_of(model, x))
    for key, transport in transports.items() if name != "head shift" else ():
        step[key] = transport.weight(step[key])
    after = measured(model, step, x)
    assert {role: s.gamma for role, s in after.items()} == pytest.approx(
        {role: s.gamma for role, s in before.items()}, rel=RUN
    )


def test_gamma_is_of_the_euclidean_norm_which_scales_of_neurons_change():
    model, x = tiny(dtype=torch.float64), tokens()
    step = matrices_of(model)
    before = measured(model, step, x)
    scales = t.neuron_scales(model, 0.5 * random(2, 48))
    t.teleport(model, scales, lambda: loss_of(model, x))
    after = measured(model, step | {key: transport.weight(step[key]) for key, transport in scales.items()}, x)
    assert after["attention_q"].gamma == pytest.approx(before["attention_q"].gamma, rel=RUN)
    assert abs(after["mlp_in"].gamma / before["mlp_in"].gamma - 1) > MUST_FAIL


class Quadratic(nn.Module):
    """`½ wᵀ A w` with a known Hessian."""

    def __init__(self):
        super().__init__()
        A = random(6, 6)
        self.A, self.w = A @ A.T, nn.Parameter(random(6, seed=1))
        self.still = nn.Parameter(random(3, seed=2))

    def forward(self):
        return 0.5 * self.w @ self.A @ self.w + self.still.square().sum()


def test_on_a_quadratic_it_is_the_formula_and_so_is_the_change_itself():
    model, p = Quadratic(), random(6, seed=3)
    (found,) = {*along_step(model, {"w": p}, lambda call: call()).values()}
    gradient, change = model.A @ model.w.detach(), model.A @ p
    assert found.gradient == pytest.approx(gradient.norm().item(), rel=EXACT)
    assert found.change == pytest.approx(change.norm().item(), rel=EXACT)
    assert found.gamma == pytest.approx((gradient.norm() * p.norm() / change.norm()).item(), rel=EXACT)
    assert found.steps == pytest.approx(found.gamma / p.norm().item(), rel=EXACT)
    elsewhere = along_step(model, {"w": p}, lambda call: call(), at={"w": torch.zeros(6, dtype=torch.float64)})
    assert elsewhere["all"].gradient == 0
    assert model.w.grad is None


def test_longer_steps_have_the_same_gamma_and_fewer_of_them_fit():
    model, x = tiny(dtype=torch.float64), tokens()
    step = matrices_of(model)
    one, ten = measured(model, step, x), measured(model, {name: 10 * p for name, p in step.items()}, x)
    for role, smoothness in one.items():
        assert ten[role].gamma == pytest.approx(smoothness.gamma, rel=RUN)
        assert 10 * ten[role].steps == pytest.approx(smoothness.steps, rel=RUN)


def test_a_mixture_of_experts_without_forward_derivative_is_measured_by_its_change():
    model, x = tiny("olmoe"), tokens()
    step = {name: 1e-3 * torch.randn_like(p) for name, p in model.named_parameters()}
    found = measured(model, step, x)
    assert {"router", "expert_in", "expert_out", "all"} <= set(found)
    assert all(0 < s.gamma < float("inf") for s in found.values())


def test_names_and_shapes_that_the_model_has_not_are_refused():
    model = Quadratic()
    for step in ({"v": random(6)}, {"w": random(5)}):
        with pytest.raises(ValueError, match="which the model has not, or not of this shape"):
            along_step(model, step, lambda call: call())
