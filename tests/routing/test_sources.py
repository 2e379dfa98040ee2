"""Presets over several steps beside their sources: every update is written out again from its formula, in float64."""

import pytest
import torch
from models import tiny
from numerics import EXACT, ROTATED, relative

import symlm

STEPS = 4
ENDS = ("embedding", "tied_embedding", "lm_head")
STREAM = ("attention_o", "mlp_out")  # of ARO: rows are the residual stream's already


def exact(M):
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


def quintic(M):
    """Five steps of Muon's polynomial on the singular values."""
    U, S, Vh = torch.linalg.svd(M / M.norm(), full_matrices=False)
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    return U * S @ Vh


def D(M):
    return M / M.norm(dim=-1, keepdim=True)


def C(M):
    return M - M.mean(0, keepdim=True)


def nu(M):
    return torch.linalg.svdvals(M).sum()


def keller(M, polar=exact):
    return max(1.0, M.shape[0] / M.shape[1]) ** 0.5 * polar(M)


def heads(M):
    return torch.cat([keller(head) for head in M.split(8)])


def output_heads(M):
    return torch.cat([keller(head) for head in M.split(8, dim=1)], dim=1)


class Arm:
    """Step `M <- μM + (1−μ)G`, `W <- (1 − ηλ)W − η·f(M)`; with `ahead` f is of `μM + (1−μ)G`."""

    def __init__(self, f, lr, decay=0.0, mu=0.95, ahead=False):
        self.f, self.lr, self.decay, self.mu, self.ahead = f, lr, decay, mu, ahead
        self.means = {}

    def step(self, name, W, G):
        M = self.mu * self.means.get(name, torch.zeros_like(G)) + (1 - self.mu) * G
        self.means[name] = M
        X = self.mu * M + (1 - self.mu) * G if self.ahead else M
        return (1 - self.lr * self.decay) * W - self.lr * self.f(X)


class Adam:
    """AdamW by its formula, with zero starts corrected."""

    def __init__(self, lr, decay=0.0, betas=(0.9, 0.95)):
        self.lr, self.decay, self.betas, self.states = lr, decay, betas, {}

    def step(self, name, W, G):
        m, v, t = self.states.get(name, (0, 0, 0))
        m, v, t = self.betas[0] * m + (1 - self.betas[0]) * G, self.betas[1] * v + (1 - self.betas[1]) * G**2, t + 1
        self.states[name] = m, v, t
        U = m / (1 - self.betas[0] ** t) / ((v / (1 - self.betas[1] ** t)).sqrt() + 1e-8)
        return (1 - self.lr * self.decay) * W - self.lr * U


class PolarFirst:
    """PolarGrad's other order: `M <- μM + (1−μ)U`, `W <- W − ηνM`."""

    def __init__(self, lr):
        self.lr, self.means = lr, {}

    def step(self, name, W, G):
        self.means[name] = 0.95 * self.means.get(name, 0) + 0.05 * exact(G)
        return W - self.lr * nu(G) * self.means[name]


class Constrained(Arm):
    """Scion: `W <- (1 − η)W − ηρ·lmo(M)`, and `W − ηρ·lmo(M)` without the constraint."""

    def __init__(self, lmo, radius, constrained):
        super().__init__(lambda M: radius * lmo(M), 4e-4, float(constrained), mu=0.9)


class Aro:
    """`R <- QR(M f(RᵀM)ᵀ)`, `W <- (1 − ηλ)W − 0.2η√(mn)·U/|U|`, `U = R f(RᵀM)`; Adam's base has V in the rotation."""

    def __init__(self, f, lr, transposed, adam=False):
        self.f, self.lr, self.transposed, self.adam, self.states = f, lr, transposed, adam, {}

    def step(self, name, W, G):
        if self.transposed:
            W, G = W.T, G.T
        M, R, V = self.states.get(name, (0 * G, torch.eye(len(G)).double(), 0 * G))
        M, Y = 0.95 * M + 0.05 * G, R.T @ (0.95 * M + 0.05 * G)
        f = (lambda X: X / (0.95 * V + 0.05 * X**2).sqrt()) if self.adam else self.f
        Q, upper = torch.linalg.qr(M @ f(Y).T)
        R = Q * upper.diagonal().sign()
        U = R @ f(R.T @ M)  # of Adam the mean of squares, refreshed in the new rotation
        self.states[name] = M, R, 0.95 * V + 0.05 * (R.T @ M) ** 2
        after = (1 - 0.1 * self.lr) * W - 0.2 * self.lr * M.numel() ** 0.5 * U / U.norm()
        return after.T if self.transposed else after


def sinkhorn(M):
    for _ in range(5):
        M = D(D(M).T).T
    return M


def braked(M):
    X = M / M.norm()
    return 0.2 * M.numel() ** 0.5 * X / torch.cosh(X).square().mean().sqrt()


def muon(inner):
    return lambda role: Adam(0.01) if role in (*ENDS, "router", "vector") else inner(role)


def of_scion(constrained):
    def arm(role):
        lmo, radius = {
            "embedding": (lambda M: M.shape[1] ** 0.5 * D(M), 50),
            "lm_head": (lambda M: M.sign() / M.shape[1], 3000),
            "vector": (lambda M: M / M.square().mean().sqrt(), 50),
        }.get(role, (lambda M: (M.shape[0] / M.shape[1]) ** 0.5 * exact(M), 50))
        return Constrained(lmo, radius, constrained)

    return arm


def paper(ends="row", mlp="muon", router=None):
    """The paper's arms at the rates of its README: {row, hybrid, AdamW} by {Muon, hybrid}, and the router's rule."""
    rows = {"row": (D, lambda M: C(D(C(M)))), "hybrid": (lambda M: exact(D(M)), lambda M: C(exact(C(D(C(M))))))}
    experts = {
        "expert_in": lambda M: torch.stack([torch.cat([keller(part) for part in expert.chunk(2)]) for expert in M]),
        "expert_out": lambda M: torch.stack([keller(expert) for expert in M]),
    }

    def arm(role):
        if role in ENDS:
            embeds = role == "embedding"
            if ends == "adamw":
                return Adam(0.1 if embeds else 1e-3)
            return Arm(rows[ends][0 if embeds else 1], 0.5 if embeds else 5e-3)
        if role == "router":
            return router or Arm(rows["row"][1], 7.5e-4)
        if role == "vector":
            return Adam(0.05, 1e-3)
        if role.startswith("mlp") and mlp == "hybrid":
            hybrid = rows["hybrid"][0]
            return Arm(hybrid if role == "mlp_in" else lambda M: hybrid(M.T).T, 0.02, 1e-3)
        by_heads = {"attention_o": output_heads, **dict.fromkeys(("attention_q", "attention_k", "attention_v"), heads)}
        return Arm({**by_heads, **experts}.get(role, keller), 0.02, 1e-3, ahead=True)

    return arm


def aro(f, adam=False):
    return muon(lambda role: Aro(f, 0.005, role not in STREAM, adam))


def wide(f):
    return muon(lambda role: Arm(f, 0.02, 0.1, ahead=True))


DECAY = {"weight_decay": 0.1}
ARO = {
    "retained": 0.0,
    **DECAY,
}  # the source's QR, which is of a singular matrix where there are more rows than columns
REGULAR = ("mlp_in", "mlp_out")
INNER = ("attention_q", "attention_k", "attention_v", "attention_o", "mlp_in", "mlp_out")


def rule(name):
    return {"overrides": {role: {"rule": name} for role in INNER}}


SOURCES = [
    ("muon", wide(keller), DECAY),
    ("muon", wide(lambda M: keller(M, quintic)), {"schedule": "muon", "polar_method": "newton_schulz", **DECAY}),
    ("muon-plus", muon(lambda role: Arm(plus, 0.04, 0.1, ahead=True)), DECAY),
    ("polargrad", muon(lambda role: Arm(lambda M: nu(M) * exact(M), 0.02, 0.1)), DECAY),
    ("polargrad", muon(lambda role: PolarFirst(0.02)), {"momentum_of": "directions"}),
    ("aro", aro(sinkhorn), ARO),
    ("aro", aro(torch.sign), {**rule("aro_sign"), **ARO}),
    ("aro", aro(D), {**rule("aro_rows"), **ARO}),
    ("aro", aro(None, adam=True), {**rule("aro_adam"), **ARO}),
    ("auon", muon(lambda role: Arm(braked, 0.005, 0.1, ahead=True)), DECAY),
    ("scion", of_scion(False), {}),
    ("scion-constrained", of_scion(True), {}),
    ("paper-row", paper(), {}),
    ("paper-hybrid-ends", paper("hybrid"), {}),
    ("paper-adamw-ends", paper("adamw"), {}),
    ("paper-hybrid-mlp", paper("row", "hybrid"), {}),
    ("paper-hybrid", paper("hybrid", "hybrid"), {}),
    ("paper-adamw-ends-hybrid-mlp", paper("adamw", "hybrid"), {}),
    ("paper-left-router", paper(router=Arm(lambda M: C(exact(C(M))), 7.5e-4)), {}),
    ("paper-left-router-alpha-1", paper(router=Arm(lambda M: nu(C(M)) * C(exact(C(M))), 7.5e-4)), {}),
    ("paper-hybrid-router", paper(router=Arm(lambda M: C(exact(C(D(C(M))))), 7.5e-4)), {}),
    ("paper-uncentered-router", paper(router=Arm(exact, 7.5e-4)), {}),
    ("paper-row-adamw-router", paper(router=Adam(7.5e-4)), {}),
]


def plus(M):
    return (M.shape[0] / M.shape[1]) ** 0.5 * D(D(exact(M)).T).T


@pytest.mark.parametrize(("preset", "arm", "options"), SOURCES, ids=[f"{k}-{row[0]}" for k, row in enumerate(SOURCES)])
def test_a_preset_is_its_source_over_steps(preset, arm, options):
    model = tiny("olmoe" if "router" in preset else "qwen3", torch.float64)
    settings = {"weight_decay": 1e-3} if "paper" in preset else {}
    opt = symlm.SymOptimizer(model, preset=preset, **{"polar_method": "svd", **settings, **options})
    roles = symlm.assign_roles(model)
    arms = {role: arm(str(role)) for role in set(roles.values())}
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for name, p in model.named_parameters():
            p.grad = (1 + step) * torch.randn(p.shape, dtype=torch.float64, generator=generator)
            expected[name] = arms[roles[name]].step(name, expected[name], p.grad)
        opt.step()
    held = [name for name in expected if preset != "aro" or roles[name] in (*REGULAR, *ENDS, "vector")]
    for name in held:
        found = model.get_parameter(name).detach()
        assert relative(found, expected[name]) < (ROTATED if preset == "aro" else 10 * EXACT), name
