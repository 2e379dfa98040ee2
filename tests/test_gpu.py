"""What only a GPU can show; skipped where there is none."""

import pytest
import torch
from models import loss_of, tiny, tokens
from numerics import BF16_POLAR, FP32, relative

import symlm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def with_gradients(seed):
    model = tiny().cuda()
    loss_of(model, tokens(seed).cuda()).backward()
    return model


@pytest.mark.parametrize("preset", ["default", "muon"])
def test_a_step_is_captured_in_a_cuda_graph_and_replayed(preset):
    """Nothing in a step reads the device: three replays are three more steps, the count of skipped ones included."""
    eager, captured = with_gradients(0), with_gradients(0)
    optimizers = [symlm.SymOptimizer(m, lr=torch.tensor(0.02, device="cuda"), preset=preset) for m in (eager, captured)]
    for _ in range(6):
        optimizers[0].step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizers[1].step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[1].step()
    for _ in range(3):
        graph.replay()
    for (name, p), q in zip(eager.named_parameters(), captured.parameters(), strict=True):
        assert relative(q, p) < 10 * FP32, name
    next(captured.parameters()).grad.fill_(torch.nan)
    before = {name: p.detach().clone() for name, p in captured.named_parameters()}
    graph.replay()
    assert optimizers[1].skipped_steps == 1
    assert all(torch.equal(p, before[name]) for name, p in captured.named_parameters())


def test_a_whitened_heads_half_precision_products_give_fp32s_step():
    one, two = with_gradients(0), with_gradients(0)
    for model, dtype in ((one, "float32"), (two, "bfloat16")):
        optimizer = symlm.SymOptimizer(model, compute_dtype=dtype)
        before = model.lm_head.weight.detach().clone()
        optimizer.step()
        model.lm_head.moved = model.lm_head.weight.detach() - before
    assert relative(two.lm_head.moved, one.lm_head.moved) < BF16_POLAR


def test_tritons_products_give_torchs_step():
    one, two = with_gradients(0), with_gradients(0)
    for model, kernels in ((one, "torch"), (two, "triton")):
        symlm.SymOptimizer(model, kernels=kernels, compute_dtype="float32").step()
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert relative(q, p) < 1e-3, name
