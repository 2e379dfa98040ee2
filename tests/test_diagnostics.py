"""The watched quantities against cases done by hand."""

from dataclasses import replace

import pytest
import torch
from models import EXTRA, tiny, tokens, train

import symlm
from symlm.diagnostics import logit_metrics, polar_error, router_metrics, update_rms


def test_polar_error_of_known_matrices():
    assert polar_error(torch.eye(4, 7)).item() == 0
    assert polar_error(2 * torch.eye(4)).item() == pytest.approx(3.0)


PLACES = {"lm_head": "lm_head.weight", "embedding": "model.embed_tokens.weight"}


def test_update_rms_is_the_step_that_was_made():
    model = tiny()
    opt = symlm.SymOptimizer(model)
    train(model, opt, 2)
    before = {role: model.get_parameter(name).detach().clone() for role, name in PLACES.items()}
    bias = model.model.norm.weight.detach().clone()
    train(model, opt, 1)
    rms = update_rms(opt)
    for role, name in PLACES.items():
        moved = model.get_parameter(name) - before[role]
        assert rms[role] == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-3), role
    assert rms["vector"] > 0
    assert not torch.equal(bias, model.model.norm.weight)


@pytest.mark.parametrize("kind", EXTRA)
@pytest.mark.parametrize("preset", symlm.PRESETS)
def test_verify_finds_every_promise_kept(preset, kind):
    model = tiny(kind)
    opt = symlm.SymOptimizer(model, lr=1e-3, preset=preset)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    opt.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    checks = opt.verify()
    assert {check.role for check in checks} == {g["role"] for g in opt.param_groups if g["rule"] != "adamw"}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_verify_names_what_did_not_run(monkeypatch):
    model = tiny()
    opt = symlm.SymOptimizer(model)
    with pytest.raises(RuntimeError, match=r"embed_tokens.weight \(embedding\): no step has reached it"):
        opt.verify()
    train(model, opt, 1)
    assert "off by at most" in str(opt.verify())
    monkeypatch.setitem(
        symlm.rules.RULES, "left_spectral", replace(symlm.rules.RULES["left_spectral"], function=fallback)
    )
    with pytest.raises(RuntimeError, match=r"gate_proj.weight \(mlp_in, left_spectral\): singular values off by"):
        opt.verify()


def fallback(M, polar):
    return M.sign()


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gpt2"])
def test_adamw_compatible_updates_have_adamws_size(kind):
    model = tiny(kind)
    opt = symlm.SymOptimizer(model, lr=1e-3, preset="adamw-compatible", polar_method="svd")
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    for p in model.parameters():  # every row and every matrix has a direction of full rank
        p.grad = torch.randn_like(p)
    opt.step()
    for role, rms in update_rms(opt).items():
        if role != "vector":
            assert rms == pytest.approx(0.2e-3, rel=0.05), role


def test_router_metrics_by_hand():
    logits = torch.log(torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]]))
    metrics = router_metrics(logits, top_k=1)
    assert metrics["load_balancing_loss"].item() == pytest.approx(4 * 0.7)
    assert metrics["load_cv"].item() == pytest.approx(3**0.5)
    assert metrics["load_entropy"].item() == pytest.approx(0)
    assert metrics["dead_expert_fraction"].item() == pytest.approx(0.75)
    assert metrics["top_expert_load"].item() == 1
    assert metrics["z_loss"].item() == pytest.approx(0, abs=1e-12)


def test_logit_metrics_by_hand():
    metrics = logit_metrics(torch.tensor([[3.0, 5.0]]))
    assert metrics["rms"].item() == pytest.approx(17**0.5)
    assert metrics["centered_rms"].item() == pytest.approx(1)
    assert metrics["max_abs"].item() == 5
