"""Diagnostics: polar error, size of updates by role, bytes of state, router load and logits; no model is changed."""

from collections.abc import Callable

import torch
from torch import Tensor

from symlm.distributed.collectives import summed_everywhere
from symlm.distributed.tensors import local
from symlm.optimizer import SymOptimizer


@torch.no_grad()
def polar_error(U: Tensor) -> Tensor:
    """Compute how far matrices are from semi-orthogonal, `‖UUᵀ − I‖_F / √m` with m the shorter side.

    Args:
        U: Matrices, (..., m, n); tall ones are transposed.

    Returns:
        The errors, (...).
    """
    U = U if U.shape[-2] <= U.shape[-1] else U.mT
    eye = torch.eye(U.shape[-2], dtype=U.dtype, device=U.device)
    return torch.linalg.matrix_norm(U @ U.mT - eye) / U.shape[-2] ** 0.5


@torch.no_grad()
def update_rms(optimizer: SymOptimizer) -> dict[str, float]:
    """Compute the RMS of the last step's update by role, `√(Σ(ηsU)² / count)`, without the decay.

    If parameters are sharded, all ranks call this together.

    Args:
        optimizer: The optimizer.

    Returns:
        The RMS by role; empty before a first step. Roles that a fused kernel updated are left out.
    """
    size = optimizer.update_size
    sums = dict(sorted(size.by_role().items())) if size else {}  # the order of roles differs between ranks
    if not sums:
        return {}
    squares, counts = zip(*sums.values(), strict=True)
    totals = torch.stack(
        [torch.stack(squares).double(), torch.tensor(counts, dtype=torch.float64).to(squares[0].device)]
    )
    if optimizer.is_sharded:
        totals = summed_everywhere(totals)
    return dict(zip(sums, (totals[0] / totals[1].clamp(min=1)).sqrt().tolist(), strict=True))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of state that this process stores, of any optimizer of torch's or symlm's."""
    return sum(local(x).nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))


Gather = Callable[[Tensor], Tensor]  # (1, ...) of this process -> (processes, ...)


@torch.no_grad()
def router_metrics(logits: Tensor, top_k: int, gather: Gather | None = None) -> dict[str, Tensor]:
    """Compute load, entropy and size of one MoE layer's router over the tokens of all processes.

    With f_i the share of the `tokens · top_k` choices that fall on expert i, P = softmax(z), p = mean_t P_t, u = 1/E:
    load = f; load_cv = std(f)/mean(f), load_entropy = −Σ f log f / log E, prob_cv and prob_entropy the same of p;
    dead_expert_fraction = mean[f < u/10]; top_expert_load = max f; token_entropy = mean H(P_t)/log E;
    load_balancing_loss = E Σ f p; z_loss = mean lse(z)²; logit_rms, logit_max_abs, logsumexp_mean, logsumexp_max.

    Args:
        logits: The router's logits z, (tokens, experts).
        top_k: The number of experts of a token.
        gather: Gathers a tensor (1, ...) of each process as (processes, ...); None for one process.

    Returns:
        The metrics by name, scalars in float64; `load` has shape (experts,).

    Source:
        arXiv 2605.18106, code, router metrics.
    """
    z = logits.double()
    experts, P, lse = z.shape[-1], z.softmax(-1), z.logsumexp(-1)
    counts = torch.bincount(z.topk(top_k, dim=-1).indices.flatten(), minlength=experts).double()
    means = [torch.special.entr(P).sum(-1), lse.square(), lse, z.square().mean(-1)]
    size = torch.tensor([float(len(z))], dtype=torch.float64, device=z.device)
    sums = torch.cat([size, torch.stack([mean.sum() for mean in means]), counts, P.sum(0)])
    peaks = torch.stack([z.abs().max(), lse.max()])
    if gather:
        sums, peaks = gather(sums[None]).sum(0), gather(peaks[None]).amax(0)
    tokens = sums[0]
    entropy, z_loss, lse_mean, square = sums[1:5] / tokens
    f, p = sums[5 : 5 + experts] / (tokens * top_k), sums[5 + experts :] / tokens
    log_experts = size.new_tensor(float(experts)).log()
    return {
        "load": f,
        "load_balancing_loss": experts * (f * p).sum(),
        "load_cv": f.std(correction=0) / f.mean(),
        "load_entropy": torch.special.entr(f).sum() / log_experts,
        "prob_cv": p.std(correction=0) / p.mean(),
        "prob_entropy": torch.special.entr(p).sum() / log_experts,
        "dead_expert_fraction": (f < 0.1 / experts).double().mean(),
        "top_expert_load": f.max(),
        "token_entropy": entropy / log_experts,
        "z_loss": z_loss,
        "logit_rms": square.sqrt(),
        "logit_max_abs": peaks[0],
        "logsumexp_mean": lse_mean,
        "logsumexp_max": peaks[1],
    }


@torch.no_grad()
def logit_metrics(logits: Tensor, gather: Gather | None = None) -> dict[str, Tensor]:
    """Compute the size of the logits, plain and centered over the vocabulary, and the entropy of their softmax.

    Args:
        logits: The logits, (..., vocabulary).
        gather: Gathers a tensor (1, ...) of each process as (processes, ...); None for one process.

    Returns:
        The metrics by name, scalars; maxima over the positions of all processes, the others means over them, each
        process with the same weight.

    Source:
        arXiv 2605.18106, code, logit metrics.
    """
    z = logits.float().reshape(-1, logits.shape[-1])
    centered, lse, P = z - z.mean(-1, keepdim=True), z.logsumexp(-1), z.softmax(-1)
    means = [z.square().mean(), centered.square().mean(), lse.mean(), torch.special.entr(P).sum(-1).mean()]
    mean = torch.stack([*means, P.amax(-1).mean()])
    peaks = torch.stack([z.abs().max(), centered.abs().max(), lse.max()])
    if gather:
        mean, peaks = gather(mean[None]).mean(0), gather(peaks[None]).amax(0)
    return {
        "rms": mean[0].sqrt(),
        "centered_rms": mean[1].sqrt(),
        "logsumexp_mean": mean[2],
        "entropy_mean": mean[3],
        "max_probability_mean": mean[4],
        "max_abs": peaks[0],
        "centered_max_abs": peaks[1],
        "logsumexp_max": peaks[2],
    }
