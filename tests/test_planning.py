"""A plan counts what really moves, and sees what sharing does."""

import pytest
import torch
from models import tiny

import symlm
from symlm.planning import plan


def test_one_rank_moves_nothing():
    told = plan(tiny())
    assert (told.received, told.gradients, told.imbalance) == (0, 0, 1.0)


def test_ddp_gets_every_direction_that_others_compute():
    """Two ranks that share equally get half of all that travels: the matrices of spectral rules, in fp32."""
    with torch.device("meta"):
        model = tiny()
    travels = sum(
        p.numel()
        for group in symlm.param_groups(model)
        if group["rule"] in ("polar", "left_spectral")
        for _, p in group["params"]
    )
    told = plan(model, copies=2)
    assert told.received == pytest.approx(4 * travels / 2, rel=0.3)
    assert told.imbalance < 1.3


def test_shards_move_less_the_more_there_are():
    received = [plan(tiny(), shards=ranks, preset="muon").received for ranks in (2, 4, 8)]
    assert received == sorted(received, reverse=True)


def test_the_heads_gram_matrix_is_summed_over_shards():
    plain = {"lm_head": {"rule": "centered_row_adam"}}
    more = plan(tiny(), shards=4).received - plan(tiny(), shards=4, overrides=plain).received
    assert more == 2 * 4 * 32 * 32 * 3 // 4


def test_rotations_are_shared_by_nobody():
    assert plan(tiny(), shards=4, preset="aro").imbalance == 4
    assert plan(tiny(), copies=4, preset="aro").imbalance == 4
    assert plan(tiny(), preset="aro").imbalance == 1


def test_experts_that_are_computed_where_they_lie_are_counted():
    """On one rank the look-ahead alone of the largest stack, and four ranks share the work of their experts."""
    options = {"num_experts": 16, "moe_intermediate_size": 64}
    model = tiny("qwen3_moe", **options)
    largest = max(p.numel() for p in model.parameters())
    assert plan(model).temporary > 4 * 2 * largest
    assert plan(model, shards=4).temporary > 4 * 2 * largest // 4
    few = {"expert_in": {"rule": "row_norm"}, "expert_out": {"rule": "row_norm"}}
    assert plan(model, shards=4).imbalance < plan(model, shards=4, overrides=few).imbalance


def test_a_plan_of_nobody_is_refused():
    with pytest.raises(ValueError, match="at least one shard and one copy, got shards=0"):
        plan(tiny(), shards=0)


def test_a_whitened_head_is_repeated_by_copies_and_shared_by_shards():
    plain = {"lm_head": {"rule": "centered_row_adam"}}
    assert plan(tiny(), copies=4).imbalance > 1.05 * plan(tiny(), copies=4, overrides=plain).imbalance
    assert plan(tiny(), shards=4).imbalance <= plan(tiny(), shards=4, overrides=plain).imbalance
