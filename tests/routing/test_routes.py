"""The table cannot lie."""

from dataclasses import replace

import pytest
import torch
from models import tiny, train

import symlm
from symlm.routing.table import ROUTES, Route, make_table
from symlm.views import MatrixView


@pytest.mark.parametrize(
    ("role", "rule"),
    [("embedding", "adamw"), ("lm_head", "row_norm"), ("router", "row_norm"), ("attention_q", "row_norm")],
)
def test_a_claim_that_is_too_small_is_refused(role, rule):
    role = symlm.Role(role)
    routes = {**ROUTES, role: replace(ROUTES[role], rule=rule)}
    with pytest.raises(ValueError, match=f"route of {role}: its symmetry"):
        make_table(routes)
    assert make_table(routes, baseline=True) == routes


def test_incomplete_and_misspelt_tables_are_refused():
    with pytest.raises(ValueError, match="no route for"):
        make_table({})
    with pytest.raises(ValueError, match="unknown view 'rows'"):
        make_table({**ROUTES, symlm.Role.MATRIX: Route("polar", view="rows")})


def test_the_table_is_printed_and_is_data():
    routing = symlm.describe_routing(tiny("qwen3_moe"))
    text = str(routing)
    assert "centered_row_norm" in text
    assert "b (p m) n -> (b p) m n, p=2" in text
    assert {row.name for row in routing} == {name for name, _ in tiny("qwen3_moe").named_parameters()}


def test_the_table_of_a_hybrid_of_sixty_layers_is_one_screen():
    layers = (["linear_attention"] * 3 + ["full_attention"]) * 15
    with torch.device("meta"):
        model = tiny("qwen3_next", layer_types=layers, num_hidden_layers=60)
    lines = str(symlm.describe_routing(model)).splitlines()
    assert len(lines) <= 24
    assert sum(line.startswith("attention_q ") for line in lines) == 1


def test_what_is_told_of_overrides_is_what_is_done():
    overrides = {"lm_head": {"rule": "row_norm", "scale": "unit", "lr": 5e-3}, "mlp_in": {"lr": 0.3}}
    told = {"lr": 0.1, "overrides": overrides}
    groups = symlm.param_groups(tiny(), **told)
    done = {
        name: (g["rule"], g["view"], g["scale"], g["lr"] * g["lr_multiplier"])
        for g in groups
        for name, _ in g["params"]
    }
    for row in symlm.describe_routing(tiny(), **told):
        assert (row.rule, row.view, row.scale, pytest.approx(0.1 * row.lr_multiplier)) == done[row.name]


def test_the_table_says_which_roles_decay_and_by_what():
    """A decay of the optimizer is multiplied by the table's number, which is 0 at the ends; an override's is not."""
    overrides = {"lm_head": {"weight_decay": 0.3}, "mlp_out": {"constraint": "fixed_norm"}}
    rows = symlm.describe_routing(tiny(), overrides=overrides)
    named = {row.role: row.constraint for row in rows}
    assert named["embedding"] == named["vector"] == "none"
    assert (named["mlp_in"], named["mlp_out"], named["lm_head"]) == ("decay", "fixed_norm", "decay 0.3")
    (scion,) = {r.constraint for r in symlm.describe_routing(tiny(), preset="scion-constrained") if r.role == "mlp_in"}
    assert scion == "decay 0.02"


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss", "qwen3"])
def test_the_default_is_one_table_with_and_without_routers(kind):
    momenta = {group["role"]: group.get("momentum") for group in symlm.param_groups(tiny(kind))}
    assert (momenta["embedding"], momenta["attention_q"], momenta["lm_head"]) == (0.7, 0.85, 0.8)
    assert momenta.get("expert_in", 0.95) == 0.95
    longer = {group["role"]: group.get("momentum") for group in symlm.param_groups(tiny(kind), preset="long-means")}
    assert (longer["embedding"], longer["attention_q"], longer["lm_head"]) == (0.9, 0.95, 0.8)


def test_groups_hold_plain_values_and_scaled_rates():
    groups = symlm.param_groups(tiny(), lr=0.1, overrides={"lm_head": {"lr": 5e-3}})
    rates = {group["role"]: group["lr"] * group["lr_multiplier"] for group in groups}
    assert rates["lm_head"] == 5e-3
    assert groups[0]["lr"] == 0.1  # the dial: what every framework logs
    assert rates["embedding"] == pytest.approx(0.1 * ROUTES[symlm.Role.EMBEDDING].lr)
    values = [value for group in groups for key, value in group.items() if key not in ("params", "betas")]
    values += [beta for group in groups for beta in group.get("betas", ())]
    assert {type(value) for value in values} <= {str, int, float, bool}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "defualt"}, "unknown preset 'defualt'"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"overrides": {"head": {"lr": 1.0}}}, "unknown role 'head'"),
        ({"overrides": {"lm_head": {"rule": "rownorm"}}}, "unknown rule 'rownorm'"),
        ({"overrides": {"lm_head": {"lr": -1.0}}}, "lr must be a positive number"),
        ({"overrides": {"lm_head": {"scale": "big"}}}, "unknown scale 'big'"),
    ],
)
def test_bad_arguments_name_themselves(arguments, message):
    with pytest.raises(ValueError, match=message):
        symlm.param_groups(tiny(), **arguments)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gpt_oss", "olmoe"])
def test_aros_rows_are_the_residual_streams(kind):
    model = tiny(kind)
    for group in symlm.param_groups(model, preset="aro"):
        if group["rule"].startswith("aro"):
            view = MatrixView.parse(group["view"])
            assert all(view.shape(tuple(p.shape))[1] == model.config.hidden_size for _, p in group["params"])
    optimizer = symlm.SymOptimizer(model, preset="aro")
    train(model, optimizer, 2)
    assert {check.promise for check in optimizer.verify()} == {"unit RMS"}


@pytest.mark.parametrize(
    ("kind", "overrides", "needed"),
    [
        ("qwen3", {"attention_q": {"rule": "row_adam"}}, "view 'whole'"),
        ("phi3", {"attention_qkv": {"rule": "aro_sign", "view": "whole"}}, "a view of equal matrices"),
    ],
)
def test_a_state_with_no_place_is_refused(kind, overrides, needed):
    with pytest.raises(ValueError, match=f"has a state, which needs {needed}"):
        symlm.SymOptimizer(tiny(kind), overrides=overrides)


GRID = {  # the rules of embedding, head and MLP
    "paper-row": ("row_norm", "centered_row_norm", "polar"),
    "paper-hybrid-ends": ("row_then_polar", "centered_row_then_polar", "polar"),
    "paper-adamw-ends": ("adamw", "adamw", "polar"),
    "paper-hybrid-mlp": ("row_norm", "centered_row_norm", "row_then_polar"),
    "paper-hybrid": ("row_then_polar", "centered_row_then_polar", "row_then_polar"),
    "paper-adamw-ends-hybrid-mlp": ("adamw", "adamw", "row_then_polar"),
}
ROUTERS = {
    "paper-row": "centered_row_norm",
    "paper-left-router": "centered_polar",
    "paper-left-router-alpha-1": "centered_polargrad",
    "paper-hybrid-router": "centered_row_then_polar",
    "paper-uncentered-router": "left_spectral",
    "paper-row-adamw-router": "adamw",
}


@pytest.mark.parametrize("name", GRID)
def test_the_papers_grid_is_ends_by_mlp_over_muon_a_head(name):
    table = symlm.PRESETS[name]
    found = (table[symlm.Role.EMBEDDING].rule, table[symlm.Role.LM_HEAD].rule, table[symlm.Role.MLP_IN].rule)
    assert found == GRID[name]
    assert table[symlm.Role.MLP_OUT].rule == found[-1]
    assert {(table[role].rule, table[role].view) for role in (symlm.Role.ATTENTION_Q, symlm.Role.ATTENTION_O)} == {
        ("polar", "heads")
    }
    if "adamw" in name:  # 1e-1 and 1e-3 at the dial 0.02
        assert (0.02 * table[symlm.Role.EMBEDDING].lr, 0.02 * table[symlm.Role.LM_HEAD].lr) == pytest.approx(
            (0.1, 0.001)
        )


@pytest.mark.parametrize("name", ROUTERS)
def test_the_papers_routers_have_one_rate_of_7_5e_4(name):
    assert symlm.PRESETS[name][symlm.Role.ROUTER].rule == ROUTERS[name]
    assert 0.02 * symlm.PRESETS[name][symlm.Role.ROUTER].lr == pytest.approx(7.5e-4)


def test_the_uncentered_router_is_no_rule_of_the_routers_symmetry():
    with pytest.raises(ValueError, match=r"route of router: its symmetry .* is larger than what 'left_spectral'"):
        make_table(symlm.PRESETS["paper-uncentered-router"])
