"""The size at which each weight decay holds a weight, and the spectral one's rank:  python recipes/reproduce/decays.py

Sources: AdamC, arXiv 2506.02285: at rest a decay of ηλ holds |W|² near η|U|²/2λ, which moves with a schedule, and one
of λη²/η_max near η_max|U|²/2λ, which does not; independent decay, 1711.05101 and 2309.14322; cautious decay,
2510.12402; spectral decay, 2610.11730 (LLaMA, 124 M and more: the effective rank falls to 1/2.17 at 1.1 % more loss),
which at the size here has no target. `--steps 10` for a look.
"""

from argparse import ArgumentParser
from functools import partial
from statistics import fmean

import matplotlib.pyplot as plt
import tiny_lm
import torch
from shared import Check, finish
from torch import nn
from tqdm import tqdm

import symlm
from symlm.roles.role import Role

N, RATE, DECAY, STEPS = 24, 0.1, 0.5, 800
EXPECTED = {"decay": 0.25, "corrected_decay": 1.0, "independent_decay": 0.25}


def squares(constraint: str, rate: float, decay: float) -> list[float]:
    """Step a matrix by polar factors of noise, at a rate and then at a quarter of it; return |W|² of every step."""
    torch.manual_seed(0)
    net = nn.Linear(N, N, bias=False, dtype=torch.float64)
    options = {"momentum": 0.0, "nesterov": False, "weight_decay": decay, "polar_method": "svd"}
    settings = {"matrix": {"constraint": constraint, "scale": "unit"}}
    optimizer = symlm.SymOptimizer(net, rate, "muon", settings, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < STEPS else 0.25)
    found = []
    for _ in range(2 * STEPS):
        net.weight.grad = torch.randn(N, N, dtype=torch.float64)
        optimizer.step()
        schedule.step()
        found.append(float(net.weight.detach().square().sum()))
    return found


def sizes(axes) -> list[Check]:
    """Compare |W|² at rest to its formula, and at a quarter of the rate to that."""
    checks = []
    for name, quarter in EXPECTED.items():
        found = squares(name, RATE, DECAY * RATE if name == "independent_decay" else DECAY)
        axes.plot(found, label=name)
        first, last = fmean(found[STEPS // 2 : STEPS]), fmean(found[-STEPS // 2 :])
        rest = RATE * N / (2 * DECAY)  # |U|² = N
        checks.append(Check(f"{name}: |W|² at rest", rest, first, abs(first / rest - 1) < 0.1))
        share = last / first
        checks.append(
            Check(f"{name}: its part at a quarter of the rate", quarter, share, abs(share / quarter - 1) < 0.2)
        )
    twice = fmean(squares("independent_decay", 2 * RATE, DECAY * RATE)[STEPS // 2 : STEPS])
    rest = (2 * RATE) ** 2 * N / (2 * DECAY * RATE)
    checks.append(Check("independent_decay at twice the rate: |W|² at rest", rest, twice, abs(twice / rest - 1) < 0.1))
    cautious = fmean(squares("cautious_decay", RATE, DECAY)[STEPS // 2 : STEPS])
    checks.append(Check("cautious_decay: |W|² at rest", "above decay's", cautious, cautious > RATE * N / (2 * DECAY)))
    axes.set(
        yscale="log", xlabel="step", ylabel="|W|²", title="steps of noise, a quarter of the rate from the middle on"
    )
    axes.legend()
    return checks


def effective_rank(W: torch.Tensor) -> float:
    """Return the exponential of the entropy of the singular values over their sum."""
    p = torch.linalg.svdvals(W.detach().double())
    return float(torch.special.entr(p / p.sum()).sum().exp())


def built(models: list[nn.Module], constraint: str, decay: float, model: nn.Module) -> symlm.SymOptimizer:
    """Return Muon whose MLPs decay by a constraint, and remember the model."""
    models.append(model)
    settings = {role: {"constraint": constraint} for role in ("mlp_in", "mlp_out")}
    return symlm.SymOptimizer(model, 0.02, "muon", settings, weight_decay=decay)


def ranks(axes, steps: int) -> list[Check]:
    """Train a language model of bytes with Muon and each kind of decay, and print the effective rank of its MLPs."""
    found = {}
    for name, decay in tqdm((("none", 0.0), ("decay", 0.4), ("spectral_decay", 0.4)), desc="bytes", mininterval=2):
        models: list[nn.Module] = []
        loss = tiny_lm.train(partial(built, models, name, decay), steps)[1]
        roles = symlm.assign_roles(models[0])
        weights = [models[0].get_parameter(key) for key, role in roles.items() if role in (Role.MLP_IN, Role.MLP_OUT)]
        found[name] = (fmean(effective_rank(W) for W in weights), loss)
        axes.plot(torch.linalg.svdvals(weights[0].detach()), label=name)
    axes.set(xlabel="singular value", ylabel="size", title=f"the first MLP matrix after {steps} steps")
    axes.legend()
    checks = [
        Check(f"bytes, {name}: effective rank of 64; held-out loss", "none at this size", f"{rank:.1f}; {loss:.3f}")
        for name, (rank, loss) in found.items()
    ]
    share = found["spectral_decay"][0] / found["none"][0]
    return [*checks, Check("spectral_decay: effective rank over none's", "< 1 (source: 1/2.17)", share, share < 1)]


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120, help="of each of the 3 runs of the language model")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    figure, panels = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    finish(__file__, sizes(panels[0]) + ranks(panels[1], steps), figure)


if __name__ == "__main__":
    main()
