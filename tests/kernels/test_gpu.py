"""What only a GPU can show; skipped where there is none."""

import pytest
import torch
from models import loss_of, tiny, tokens
from numerics import BF16_POLAR, FP32, KERNEL, relative

import symlm
from symlm.polar import polar

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def with_gradients(seed):
    model = tiny().cuda()
    loss_of(model, tokens(seed).cuda()).backward()
    return model


REPLAYS = 20


@pytest.mark.parametrize("kernels", ["auto", "torch", "triton"])
@pytest.mark.parametrize("preset", ["default", "muon"])
def test_a_step_is_captured_in_a_cuda_graph_and_replayed(preset, kernels):
    """Nothing in a step reads the device: replays are as many more steps, the count of skipped ones included."""
    eager, captured = with_gradients(0), with_gradients(0)
    optimizers = [
        symlm.SymOptimizer(m, lr=torch.tensor(0.02, device="cuda"), preset=preset, kernels=kernels)
        for m in (eager, captured)
    ]
    for _ in range(3 + REPLAYS):
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
    for _ in range(REPLAYS):
        graph.replay()
    for (name, p), q in zip(eager.named_parameters(), captured.parameters(), strict=True):
        assert relative(q, p) < 10 * FP32, name
    next(captured.parameters()).grad.fill_(torch.nan)
    before = {name: p.detach().clone() for name, p in captured.named_parameters()}
    graph.replay()
    assert optimizers[1].skipped_steps == 1
    assert all(torch.equal(p, before[name]) for name, p in captured.named_parameters())


def test_a_momentum_that_grows_is_not_captured():
    """It would stay at that of one step in every replay."""
    optimizer = symlm.SymOptimizer(with_gradients(0), lr=torch.tensor(0.02, device="cuda"), momentum_warmup=9)
    for _ in range(3):
        optimizer.step()
    with pytest.raises(RuntimeError, match="capture after step 9"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_replays_round_a_bf16_weight_by_other_bits():
    """The gradient is the same in every replay, and so is the momentum's direction: what differs is the noise."""
    model = tiny(num_hidden_layers=1).cuda().bfloat16()
    loss_of(model, tokens(0).cuda()).backward()
    optimizer = symlm.SymOptimizer(model, lr=torch.tensor(1e-5, device="cuda"), momentum=0.0)
    for _ in range(3):
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    W, moves = model.model.layers[0].mlp.up_proj.weight, []
    for _ in range(2):
        before = W.detach().clone()
        graph.replay()
        moves.append(W.detach() - before)
    assert not torch.equal(*moves)


def test_on_a_gpu_too_an_expert_without_a_gradient_rests():
    twins = tiny("olmoe").cuda(), tiny("olmoe")
    name, rms = "model.layers.0.mlp.experts.down_proj", []
    for model in twins:
        optimizer = symlm.SymOptimizer(model, compute_dtype="float32")
        W = model.get_parameter(name)
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, tokens().to(W.device)).backward()
            before = W.detach().clone()
            W.grad[1] = W.grad[1] * (step == 0)
            optimizer.step()
        assert torch.equal(W[1], before[1])
        assert not torch.equal(W[2], before[2])
        rms.append(symlm.diagnostics.update_rms(optimizer))
    assert rms[0] == pytest.approx(rms[1], rel=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("told", [{}, {"kernels": "triton"}, {"preset": "aro", "rotation": "layer"}], ids=str)
def test_a_model_spread_over_two_gpus_steps_as_on_one(told):
    one, two = with_gradients(0), with_gradients(0)
    gradients = [p.grad for p in two.parameters()]
    two.model.layers[1].to("cuda:1")
    for p, gradient in zip(two.parameters(), gradients, strict=True):
        p.grad = gradient.to(p.device)
    for model in (one, two):
        optimizer = symlm.SymOptimizer(model, compute_dtype="float32", **told)
        for _ in range(2):
            optimizer.step()
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert relative(q.to(p.device), p) < 1e-3, name
    assert set(symlm.diagnostics.update_rms(optimizer))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_whitened_heads_half_precision_products_give_fp32s_step(kernels):
    one, two = with_gradients(0), with_gradients(0)
    for model, told in ((one, ("torch", "float32")), (two, (kernels, "bfloat16"))):
        optimizer = symlm.SymOptimizer(model, kernels=told[0], compute_dtype=told[1])
        before = model.lm_head.weight.detach().clone()
        optimizer.step()
        model.lm_head.moved = model.lm_head.weight.detach() - before
    assert relative(two.lm_head.moved, one.lm_head.moved) < BF16_POLAR


@pytest.mark.parametrize("kernels", ["auto", "triton"])
@pytest.mark.parametrize("kind", ["qwen3", "olmoe", "tied", "bf16"])
def test_the_kernels_give_torchs_step(kind, kernels):
    sizes, models = [], []
    for chosen in ("torch", kernels):
        model = tiny("olmoe" if kind == "olmoe" else "qwen3", tie_word_embeddings=kind == "tied").cuda()
        model = model.bfloat16() if kind == "bf16" else model
        optimizer = symlm.SymOptimizer(model, kernels=chosen, compute_dtype="float32", weight_decay=0.1)
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, tokens(step).cuda()).backward()
            if not step:
                optimizer.step()
        for p, q in zip(models[0].parameters(), model.parameters(), strict=True) if models else ():
            q.grad = p.grad.clone()  # of the second step, after which roundings would part the gradients
        optimizer.step()
        models.append(model)
        sizes.append(symlm.diagnostics.update_rms(optimizer))
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert relative(q, p) < (1e-2 if kind == "bf16" else 1e-3), name
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-2)


@pytest.mark.parametrize("shape", [(2, 300, 520), (1, 1024, 1024), (70_000, 16, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tritons_products_are_their_twins_in_every_dtype(dtype, shape):
    """Also of more matrices than a second axis of a grid would hold."""
    from symlm_kernels import products, reference

    X = (torch.randn(shape, device="cuda") / shape[-1] ** 0.5).to(dtype)
    A = reference.gram(X)
    for ours, twin, told in (
        (products.gram, reference.gram, (X,)),
        (products.symmetric_product, reference.symmetric_product, (A, A, A, 0.5, 2.0)),
        (products.apply_polynomial, reference.apply_polynomial, (A, X, 3.0)),
    ):
        exact = twin(*(x.double() if isinstance(x, torch.Tensor) else x for x in told))
        error = relative(twin(*told).double(), exact)
        assert relative(ours(*told).double(), exact) <= max(KERNEL * error, 1e-6)


@pytest.mark.parametrize("method", ["newton_schulz", "gram_newton_schulz"])
def test_the_fastest_dtype_is_within_the_iterations_bound(method):
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(256, 256, dtype=torch.float64, device="cuda"))
    V, _ = torch.linalg.qr(torch.randn(512, 256, dtype=torch.float64, device="cuda"))
    M = (U * torch.logspace(0, -2, 256, dtype=torch.float64, device="cuda")) @ V.mT
    for kernels in ("torch", "triton"):
        S = torch.linalg.svdvals(polar(M.float(), method, compute_dtype="auto", kernels=kernels).double())
        assert S.min() > 0.6
        assert S.max() < 1.25
