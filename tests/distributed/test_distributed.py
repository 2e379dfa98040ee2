"""Many processes give the numbers of one, share the work, and agree or all raise: real ranks, gloo on CPUs."""

import functools

import pytest
import torch
from numerics import FP32, RANKS, RANKS_AT_SMALL_RATES, RANKS_OF_ROOTS, RUN, relative
from processes import (
    CASES,
    CLIP,
    CONDUCTED,
    EXTRA_CASES,
    SHORT,
    WORLDS,
    Half,
    model_of,
    optimizer_of,
    run,
    train,
    train_conducted,
    train_controlled,
    train_half,
    whole,
)

import symlm
from symlm.gradient_conductor import GradientConductor
from symlm.step_control import REDUCTIONS

PAIRS = [(case, world) for case in CASES for world in WORLDS.get(case, (2,))]
FOUR = pytest.param(4, marks=pytest.mark.slow)
BOTH = pytest.mark.parametrize("world", [2, FOUR])


@pytest.fixture(scope="module")
def ran():
    """Return the results of a world's cases, all of them from one start of its processes, at the first question."""

    @functools.cache
    def of(world):
        names = [case for case, size in PAIRS if size == world]
        try:
            return run(world, names + [name for name in EXTRA_CASES if name not in ("save", "load", "missing peer")])
        except RuntimeError as error:
            return error

    return of


def checked(results):
    """Return what each rank returned, or fail with the traceback of the one that raised."""
    for rank, value in enumerate(results):
        assert not (isinstance(value, str) and value.startswith("Traceback")), f"rank {rank}: {value}"
    return results


def result(ran, case, world):
    if isinstance(results := ran(world), RuntimeError):
        raise results
    return checked(results[case])


# Of fp32, by the first part that is in the case's name.
TOLERANCES = {
    "fp32 seldom": RANKS_OF_ROOTS,
    "soap fp32": RANKS,  # nearly equal eigenvalues turn their eigenvectors by any rounding
    "aro fp32": RANKS_OF_ROOTS,
    "fp32": RANKS_AT_SMALL_RATES,
    "": RANKS,
}


@pytest.mark.parametrize(
    ("case", "world"),
    [pytest.param(*pair, marks=[pytest.mark.slow] * (pair[1] == 4)) for pair in PAIRS],
    ids=lambda value: str(value),
)
def test_many_ranks_are_one(ran, case, world):
    model = model_of(case)
    alone = optimizer_of(case, model)
    # Of other partial sums of the gradients, torch's AdamW moves linear attention's gates by 1e-3 on one process too.
    train(model, alone, clip=CLIP if "clipped" in case else None, parts=world if "hybrid" in case else 1)
    sizes = symlm.diagnostics.update_rms(alone)
    narrow = next(size for part, size in TOLERANCES.items() if part in case)
    for weights, told in result(ran, case, world):
        for name, W in whole(model).items():
            assert relative(weights[name], W) < (RUN if W.dtype == torch.float64 else narrow), name
        assert told.get("rms", sizes) == pytest.approx(sizes, rel=1e-3)


@pytest.mark.parametrize("case", ["zero1", "zero2", "zero3"])
def test_zero_cuts_the_optimizers_state(ran, case):
    alone = optimizer_of(case, model := model_of(case))
    train(model, alone, steps=1)
    shares = [told["state"] / symlm.diagnostics.state_bytes(alone) for _, told in result(ran, case, 2)]
    assert max(shares) < 0.55


def test_what_zero_has_no_place_for_is_refused(ran):
    for layers, eight_bits, order in result(ran, "refused under zero", 2):
        assert "rotation 'layer' needs a layer's matrices together; set rotation 'own'" in layers
        assert "momentum_dtype='int8' stores blocks of whole rows, which ZeRO" in eight_bits
        assert 'remove "round_robin_gradients"' in order


@BOTH
def test_momenta_of_8_bits_are_sharded_within_a_rounding_and_go_on_bit_for_bit(ran, world):
    wide = optimizer_of("zero2", model := model_of("zero2"))
    train(model, wide, 1)
    whole_size = symlm.diagnostics.state_bytes(wide)
    first, *others = result(ran, "8 bits", world)
    for case, found in first.items():
        for name, (*stored,) in found["momenta"].items():
            if stored:
                M, units = stored[0], stored[1].repeat_interleave(64, -1)[..., : stored[0].shape[-1]]
                exact = wide.state[model.get_parameter(name)]["momentum"]
                assert ((M - exact).abs() <= units * 1.01 + 1e-9).all(), (case, name)
        for rank in (first, *others):
            for name, W in first[case]["end"].items():
                assert torch.equal(rank[case]["end"][name], W), (case, name)
                again = rank[case]["again"][name]
                if case == "fsdp2" or world == 2:
                    assert torch.equal(again, W), (case, name)
                else:  # DDP's first step after a start adds four gradients in another order
                    assert relative(again, W) < RANKS, (case, name)
    assert max(rank["fsdp2"]["bytes"] for rank in (first, *others)) < 0.6 * first["ddp"]["bytes"] < 0.6 * whole_size


@BOTH
def test_settings_of_deepspeed_that_would_not_run_symlm_are_refused_at_construction(ran, world):
    for offloaded, parameters, quantized, elastic in result(ran, "refused settings", world):
        assert "its own Adam takes symlm's place" in offloaded
        assert 'remove "offload_param"' in parameters
        assert "zero_quantized_weights" in quantized
        assert 'remove "elastic_checkpoint"' in elastic


@BOTH
def test_ranks_that_disagree_all_raise_with_the_digests(ran, world):
    for messages in zip(*result(ran, "disagreement", world), strict=True):
        assert all("the ranks disagree" in message for message in messages)
        assert len({message.split("all have")[1] for message in messages}) == 1


@BOTH
def test_replicas_whose_gradients_nobody_averaged_are_warned_of(ran, world):
    for found in result(ran, "own gradients", world):
        apart = [message for message in found["bare"] if "differ between ranks" in message]
        assert len(apart) == 1
        assert "model.embed_tokens.weight" in apart[0]
        assert not any("differ between ranks" in message for message in found["ddp"] + found["own"])


@BOTH
def test_one_bad_rank_makes_all_skip(ran, world):
    assert result(ran, "nonfinite", world) == [{"same": True, "skipped": 1}] * world


@BOTH
def test_a_shard_without_a_gradient_steps_with_its_matrix(ran, world):
    alone = train_half(Half())
    for weights in result(ran, "half", world):
        for name, W in alone.items():
            assert relative(weights[name], W) < RUN, name


def test_a_missing_peer_ends_in_the_time_limit_of_the_process_group():
    first, late = checked(run(2, ["missing peer"], SHORT)["missing peer"])
    assert late == "late"
    assert "Timed out" in first["error"]
    assert first["seconds"] < 2 * SHORT.total_seconds()


@BOTH
def test_polar_work_is_shared(ran, world):
    counts = [rank["matrices"] for rank in result(ran, "work", world)]
    model = model_of("ddp")
    total = sum(
        layer.self_attn.config.num_attention_heads + layer.self_attn.config.num_key_value_heads + 2 + 3
        for layer in model.model.layers
    )
    assert sum(counts) == total
    assert max(counts) <= total / world * 1.5


@BOTH
def test_matrices_travel_both_ways_while_others_are_computed(ran, world):
    for rank in result(ran, "overlap", world):
        for case, told in rank.items():
            count = 1 + max(number for _, number in told)
            assert count > 2, case
            for k in range(count - 1):
                assert told.index(("send", k + 1)) < told.index(("compute", k)), case
                assert told.index(("compute", k + 1)) < told.index(("receive", k)), case


@BOTH
def test_bytes_are_what_the_counting_function_says(ran, world):
    sent = [pair for rank in result(ran, "traffic", world) for pair in rank]
    assert sent
    assert all(moved == counted for moved, counted in sent)


@BOTH
def test_a_step_borrows_no_more_than_the_plan_says(ran, world):
    """The bound is no idle one either: the allocator sees at least 0.4 of it."""
    for rank in result(ran, "borrowed", world):
        for case, told in rank.items():
            assert 0.4 < told["peak"] / told["told"] <= 1, case


@BOTH
def test_mixed_precision_shards_stay_wide_and_alike(ran, world):
    first, *others = result(ran, "mixed precision", world)
    for weights in others:
        assert all(torch.equal(weights[name], W) for name, W in first.items())
    assert all(W.dtype == torch.float32 and W.isfinite().all() for W in first.values())


@BOTH
def test_metrics_are_of_all_tokens(ran, world):
    logits = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    one = symlm.diagnostics.router_metrics(logits, 2)
    one |= {f"logit {k}": v for k, v in symlm.diagnostics.logit_metrics(logits).items()}
    for many in result(ran, "watched", world):
        assert set(many) == set(one)
        assert all(torch.allclose(many[key], value, rtol=1e-5) for key, value in one.items())


@BOTH
def test_a_conductor_on_many_ranks_is_the_one_of_one_process(ran, world):
    """Each rank resolves the same conflicts of the same whole gradients, also after its state was loaded."""
    alone = optimizer_of("ddp", model := model_of("ddp"))
    conductor = GradientConductor(model, CONDUCTED, momentum=0.5)
    reports = train_conducted(model, alone, conductor)
    assert all(report.conflicts for report in reports)
    last = conductor.state_dict()["gradients"]
    for rank in result(ran, "conducted", world):
        for case, found in rank.items():
            assert found["skips"], case
            for report, conflicts, norms in zip(reports, found["conflicts"], found["norms"], strict=True):
                assert [(w, lost) for w, lost, _ in conflicts] == [(w, lost) for w, lost, _ in report.conflicts], case
                assert [c for *_, c in conflicts] == pytest.approx([c for *_, c in report.conflicts], rel=RUN), case
                assert norms == pytest.approx(report.norms, rel=RUN), case
            for name, W in whole(model).items():
                assert relative(found["weights"][name], W) < RUN, (case, name)
                for row, expected in zip(found["gradients"], last, strict=True):
                    assert relative(row[name], expected[name]) < RUN, (case, name)


@BOTH
def test_a_state_of_another_place_is_refused(ran, world):
    *others, last = result(ran, "misplaced", world)
    assert last.pop("file") is None
    for found in (*others, last):
        assert found.pop("own") is None
        assert all("is placed otherwise than the parameter" in message for message in found.values())


@BOTH
def test_a_controlled_step_is_that_of_all_ranks_batches(ran, world):
    for over in REDUCTIONS:
        alone = train_controlled(model_of("ddp"), over)
        for rank in result(ran, "controlled", world):
            assert all(relative(rank[over][name], W) < FP32 for name, W in alone.items()), over  # whose r is in fp32


@BOTH
def test_what_needs_whole_weights_refuses_shards(ran, world):
    for control, agd, *initialized in result(ran, "refused shards", world):
        assert "which shards are not: use DDP" in control
        assert "AGD's rate is of whole layers" in agd
        assert all("is sharded: initialize the model before" in message for message in initialized)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of four shards and of four copies after five steps, and what the run in shards had after ten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMLM_TEST_CHECKPOINT", str(tmp_path_factory.mktemp("checkpoint")))
        yield checked(run(4, ["save"])["save"])[0]


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2, FOUR])
def test_a_checkpoint_moves_to_another_number_of_ranks_and_another_wrapper(saved, world):
    for rank in checked(run(world, ["load"])["load"]):
        for name, W in saved.items():
            assert all(relative(weights[name], W) < RUN for weights in rank.values()), name
            assert world != 4 or torch.equal(rank["shards as shards"][name], W), name
