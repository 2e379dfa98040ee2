"""torch.compile around a step runs it as it is, and says so where one graph is asked for."""

import pytest
import torch
from torch import nn

import symlm

ROLES = {"0.weight": "embedding", "1.weight": "lm_head", "2.*": "vector", "*": "matrix"}


def stepping():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(16, 8), nn.Linear(8, 12, bias=False), nn.LayerNorm(12), nn.Linear(12, 6, bias=False)
    )
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model, symlm.SymOptimizer(model, roles=ROLES)


def test_a_compiled_step_is_the_step():
    (eager, one), (compiled, other) = stepping(), stepping()
    step = torch.compile(other.step, backend="eager")
    for _ in range(2):
        one.step()
        step()
    assert all(map(torch.equal, eager.parameters(), compiled.parameters()))


def test_one_graph_is_refused_with_the_reason():
    _, optimizer = stepping()
    with pytest.raises(Exception, match="a step is Python's choices around few launches: it runs as it is"):
        torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
