"""What to watch: polar error, the size of updates by role, router load and logits.  Nothing here writes to a model."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from symlm.optimizer import SymOptimizer, directions, scale_of
from symlm.rules import get_rule
from symlm.views import MatrixView


@torch.no_grad()
def polar_error(U: Tensor) -> Tensor:
    """Return `‖UUᵀ − I‖_F / √m` for each matrix, its shorter side first.  Shapes: (..., m, n) -> (...)."""
    U = U if U.shape[-2] <= U.shape[-1] else U.mT
    eye = torch.eye(U.shape[-2], dtype=U.dtype, device=U.device)
    return torch.linalg.matrix_norm(U @ U.mT - eye) / U.shape[-2] ** 0.5


@torch.no_grad()
def update_rms(optimizer: SymOptimizer) -> dict[str, float]:
    """Return the RMS of the last step's update by role, `√(Σ(ηsU)² / count)`, recomputed from the state.

    With Nesterov momentum the look-ahead is gone after the step, and this is the update of the plain momentum.
    """
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            if not state or not p.numel():
                continue
            role = group["role"]
            square = torch.stack([part.double().square().sum() for part in updates(group, state)]).sum()
            squares[role] = squares.get(role, torch.zeros_like(square)) + square
            counts[role] = counts.get(role, 0) + p.numel()
    return {role: float((squares[role] / counts[role]).sqrt()) for role in squares}


def updates(group: dict[str, Any], state: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the parts `ηsU` of a parameter's update, recomputed from its state."""
    if get_rule(group["rule"]).stateful:
        t = max(float(state["step"]), 1.0)
        first = state["exp_avg"] / (1 - group["betas"][0] ** t)
        second = state["exp_avg_sq"] / (1 - group["betas"][1] ** t)
        yield group["lr"] * first / (second.sqrt() + group["eps"])
        return
    for view, M in MatrixView.parse(group["view"]).sections(state["momentum"]):
        size = group["lr"] * scale_of(group, view, tuple(M.shape))
        yield from (size * U for _, (U,) in directions(group, view, [M]))


@torch.no_grad()
def router_metrics(logits: Tensor, top_k: int) -> dict[str, Tensor]:
    """Return load and entropy of one MoE layer's router.  Shapes: logits (tokens, experts) -> scalars.

    f_i = share of the `tokens · top_k` choices that fall on expert i, P = softmax(z), u = 1/E:
    load_cv = std(f)/mean(f); load_entropy = −Σ f log f / log E; dead_expert_fraction = mean[f < u/10];
    top_expert_load = max f; token_entropy = mean H(P_t)/log E; load_balancing_loss = E Σ f_i mean_t P_ti;
    z_loss = mean lse(z)².  Source: arXiv 2605.18106, code, router metrics.
    """
    logits = logits.double()
    tokens, experts = logits.shape
    P = logits.softmax(-1)
    chosen = logits.topk(top_k, dim=-1).indices.flatten()
    f = torch.bincount(chosen, minlength=experts).double() / (tokens * top_k)
    log_experts = torch.log(torch.tensor(float(experts), dtype=torch.float64, device=logits.device))
    return {
        "load_balancing_loss": experts * (f * P.mean(0)).sum(),
        "load_cv": f.std(correction=0) / f.mean(),
        "load_entropy": torch.special.entr(f).sum() / log_experts,
        "dead_expert_fraction": (f < 0.1 / experts).double().mean(),
        "top_expert_load": f.max(),
        "token_entropy": torch.special.entr(P).sum(-1).mean() / log_experts,
        "z_loss": logits.logsumexp(-1).square().mean(),
    }


@torch.no_grad()
def logit_metrics(logits: Tensor) -> dict[str, Tensor]:
    """Return the size of the logits, plain and centered over the vocabulary.  Shapes: (..., vocab) -> scalars."""
    logits = logits.float().reshape(-1, logits.shape[-1])
    centered = logits - logits.mean(-1, keepdim=True)
    return {
        "rms": logits.square().mean().sqrt(),
        "centered_rms": centered.square().mean().sqrt(),
        "max_abs": logits.abs().max(),
        "centered_max_abs": centered.abs().max(),
        "logsumexp_mean": logits.logsumexp(-1).mean(),
    }
