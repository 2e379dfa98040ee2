"""The public benchmark at toy size, from shards to table: what a run prints, stores, proves and refuses."""

import math
import re
import subprocess

import numpy as np
import pytest
import speedrun
import torch
from accelerate.state import AcceleratorState
from benchmarks.speedrun import config, results
from benchmarks.speedrun.model import GPT, ModelConfig, rotate
from benchmarks.speedrun.shards import Tokens, read_shard
from numerics import RANKS
from recipe import ROOT, launch

import symlm

YAML = str(ROOT / "recipes" / "configs" / "bench" / "speedrun.yaml")
ARMS = ("default", "muon", "adamw")
STEPS = 12
TINY = ModelConfig(vocab_size=96, layers=1, width=32, head_dim=16)
LINE = re.compile(r"^step:(\d+)/(\d+) val_loss:(\d+\.\d{5}) train_time:\d+\.\d{3}s step_avg:(\d+\.\d\d|nan)ms$")


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype=np.uint16).tobytes())
    return path


def flags(folder, out, *more):
    """Return a run's fields at toy size."""
    return [
        f"--config={YAML}",
        "--compile=false",
        f"--out={out}",
        f"--steps={STEPS}",
        "--micro_batch=4",
        f"--data.train={folder}/train_*.bin",
        f"--data.validation={folder}/val_*.bin",
        "--data.batch=128",
        "--data.length=16",
        "--data.validation_tokens=256",
        "--data.validate_every=5",
        "--data.validate_late=1",
        *(f"--model.{key}={value}" for key, value in vars(TINY).items()),
        *more,
    ]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two shards that a run reads to their ends, of tokens that go up by one or by two."""
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.cumsum(np.random.default_rng(0).integers(1, 3, size=1700)) % TINY.vocab_size
    write_shard(folder / "train_000001.bin", tokens[:1000])
    write_shard(folder / "train_000002.bin", tokens[1000:])
    write_shard(folder / "val_000000.bin", tokens[:300])
    return folder


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """The three arms, each to its end."""
    out = tmp_path_factory.mktemp("out")
    with torch.random.fork_rng():
        for arm in ARMS:
            speedrun.main(flags(text, out, f"--arm={arm}"))
    AcceleratorState._reset_state(True)
    return out


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_runs_to_its_end_with_a_line_a_validation(trained, arm):
    log = (trained / f"{arm}-0.txt").read_text()
    lines = [match.groups() for text in log.splitlines() if (match := LINE.match(text))]
    (run,) = results.read_arm(trained / f"{arm}.json")["runs"]
    assert [int(step) for step, *_ in lines] == run.steps == [0, 5, 10, 11, 12]
    assert {steps for _, steps, *_ in lines} == {str(STEPS)}
    assert [float(loss) for _, _, loss, _ in lines] == pytest.approx(run.losses, abs=1e-5)
    assert lines[0][3] == "nan"
    assert run.losses[0] == pytest.approx(math.log(TINY.vocab_size), rel=1e-6)
    assert run.losses[-1] < run.losses[0]


def test_the_dials_are_printed_as_they_stand(trained):
    rates = {
        arm: dict(re.findall(r"^\| (\w+) +\|[^|]*\|[^|]*\| ([\d.]+) +\|", (trained / f"{arm}-0.txt").read_text(), re.M))
        for arm in ARMS
    }
    assert rates["muon"] | {"embedding": "0.7", "capped_lm_head": "0.004", "vector": "0.015"} == rates["muon"]
    assert {rates["muon"][role] for role in ("attention_q", "mlp_out")} == {"0.025"}
    assert rates["adamw"]["mlp_in"] == "0.0015"
    assert rates["default"] == {
        group["name"]: f"{group['lr'] * group['lr_multiplier']:.4g}" for group in symlm.param_groups(GPT(TINY), lr=0.02)
    }


def test_the_table_has_a_line_an_arm(trained, capsys):
    """At toy size, where 3.28 is no feat: the default has learned the text's two moves in ten steps."""
    speedrun.main([f"--out={trained}", "--table=true"])
    printed = capsys.readouterr().out
    lines = {arm: re.search(rf"^\| {arm} +\|(.*)$", printed, re.M)[1] for arm in ARMS}
    assert "| yes" in lines["default"]
    assert all("not in 12" in lines[arm] and "no, below 0.004" in lines[arm] for arm in ("muon", "adamw"))


def test_a_run_that_would_spoil_a_mean_is_refused_before_it_trains(text, trained):
    before = (trained / "muon.json").read_bytes()
    with pytest.raises(ValueError, match=r"seed 0 already: a seed counts once"):
        speedrun.main(flags(text, trained, "--arm=muon"))
    with pytest.raises(ValueError, match=r"runs with arm\.steps 12, this one has 11"):
        speedrun.main(flags(text, trained, "--arm=muon", "--seed=1", "--steps=11"))
    assert (trained / "muon.json").read_bytes() == before


@pytest.mark.slow
def test_two_processes_train_what_one_does(text, trained, tmp_path):
    command = [*launch("cpu2.yaml", "--num_processes=2"), str(ROOT / "recipes" / "speedrun.py")]
    subprocess.run([*command, *flags(text, tmp_path, "--arm=muon")], check=True, capture_output=True)
    (one,), (two,) = (results.read_arm(folder / "muon.json")["runs"] for folder in (trained, tmp_path))
    assert (one.processes, two.processes) == (1, 2)
    assert two.losses == pytest.approx(one.losses, rel=RANKS)


@pytest.mark.parametrize(
    ("losses", "proved"),
    [
        ([3.276], True),
        ([3.2761], False),
        ([3.278] * 4, True),
        ([3.278] * 3, False),
        ([3.2787] * 10, True),  # result 36 of the public table
        ([3.2790], False),  # its result 2
        ([3.2774, 3.2760], True),
        ([3.29, 3.2] * 20, True),
        ([3.281] * 50, False),
        ([float("nan"), 3.0], False),
    ],
)
def test_the_rule_of_proof(losses, proved):
    assert results.is_proved(losses) is proved


def test_the_table_takes_the_first_step_that_all_runs_together_prove(tmp_path):
    def store(arm, *runs):
        for seed, losses in enumerate(runs):
            results.add_run(
                tmp_path / f"{arm}.json", {}, results.Run(seed, 8, {}, *zip(*losses, strict=True), [0.0] * len(losses))
            )

    store("one", [(100, 3.279), (125, 3.2765), (150, 3.27)])
    store("two", [(100, 3.27), (125, 3.2765), (150, 3.27)], [(75, 3.0), (100, 3.285), (125, 3.2775), (150, 3.2)])
    store("unproved", [(125, 3.281), (150, 3.279)])
    store("never", [(125, 3.4), (150, 3.3)])
    table = results.table(tmp_path)
    assert dict(table["steps to 3.28"]) == {"one": 150, "two": 125, "unproved": 150, "never": "not in 150"}
    assert dict(table["proved"]) == dict.fromkeys(("one", "two"), "yes") | dict.fromkeys(
        ("unproved", "never"), "no, below 0.004"
    )
    assert table.loc["two", "mean loss"] == "3.27700"
    assert table.loc["two", "n"] == 2


def test_ranks_share_batches_in_the_order_of_the_text(tmp_path):
    shards = [write_shard(tmp_path / f"{k}.bin", np.arange(k, k + size)) for k, size in ((0, 33), (50, 32))]
    tokens = Tokens(shards, 16, 4, 96)
    whole = list(tokens.batches())
    assert len(tokens) == len(whole) == 3
    assert [x.flatten().tolist() for x, _ in whole] == [list(range(k, k + 16)) for k in (0, 16, 50)]
    assert all(torch.equal(y, x + 1) for x, y in whole)
    for (x, y), *parts in zip(whole, *(tokens.batches(rank, 2) for rank in range(2)), strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)
    with pytest.raises(
        ValueError, match=r"data\.train: 2 shards hold 65 tokens, 3 batches of 16, .* at least 33 tokens"
    ):
        tokens.require(5, "data.train")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"magic": 20240801}, "begins with 20240801"),
        ({"version": 2}, "has version 2"),
        ({"count": 21}, "says that it holds 21 tokens and has room for 20"),
        ({"count": 19}, "says that it holds 19 tokens and has room for 20"),
        ({"cut": 1063}, "has room for 19.5"),
        ({"cut": 1000}, "1000 bytes and was cut inside its header"),
        ({"cut": 0}, "0 bytes and was cut inside its header"),
    ],
)
def test_a_bad_shard_is_refused_by_name(tmp_path, made, message):
    cut = made.pop("cut", None)
    path = write_shard(tmp_path / "bad.bin", range(20), **made)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=rf"bad\.bin .*{message}"):
        read_shard(path)


def test_a_token_beyond_the_vocabulary_is_refused_by_name(tmp_path):
    path = write_shard(tmp_path / "llama.bin", [*range(90, 110)])
    with pytest.raises(ValueError, match=r"llama\.bin: token 98 behind position 0 is not in the vocabulary of 96"):
        next(Tokens([path], 8, 8, 96).batches())


def test_missing_text_and_batches_that_cannot_be_shared_are_refused(text, tmp_path):
    given = config.read(flags(text, tmp_path, "--arm=default", "--data.train=/nowhere/*.bin"))
    with pytest.raises(ValueError, match=r"no shard matches /nowhere/\*\.bin"):
        speedrun.open_text(given)
    with pytest.raises(ValueError, match=r"data\.batch 128 is no multiple of 3 processes"):
        given.check_parts(3)
    given.check_parts(2)


def test_an_unknown_arm_is_named(capsys):
    with pytest.raises(SystemExit):
        config.read([f"--config={YAML}", "--arm=sgd"])
    assert "no arm 'sgd'; there are ['adamw', 'default', 'muon']" in capsys.readouterr().err


def test_the_model_is_the_benchmarks():
    with torch.device("meta"):
        model = GPT(ModelConfig())
    assert sum(p.numel() for p in model.parameters()) == 162_354_816  # counted in the public program
    roles = symlm.assign_roles(model)
    assert roles["embed.weight"] == "embedding"
    assert roles["lm_head.weight"] == "capped_lm_head"
    inside = {
        name.split(".")[-2]: str(role)
        for name, role in roles.items()
        if name.startswith("blocks.0.") and role != "vector"
    }
    assert inside == {f"{each}_proj": f"attention_{each}" for each in "qkvo"} | {
        "up_proj": "mlp_in",
        "down_proj": "mlp_out",
    }
    assert all(role == "vector" for name, role in roles.items() if name.endswith(("bias", "gains")))


@pytest.mark.parametrize(("raw", "capped"), [(1e6, 15.0), (15.0, 15 / math.sqrt(2)), (-15.0, -15 / math.sqrt(2))])
def test_logits_are_capped_at_fifteen(raw, capped):
    model = GPT(TINY)
    model.lm_head.bias.data[0] = raw
    loss = model(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)) / 4
    assert loss.item() == pytest.approx(math.log(math.exp(capped) + TINY.vocab_size - 1), rel=1e-5)


def test_a_rotation_shows_distance_alone_and_half_of_the_pairs_do_not_rotate():
    frequencies = GPT(TINY).blocks[0].attention.frequencies
    assert frequencies.tolist() == pytest.approx([1024 ** (-k / 3) for k in range(4)] + [0.0] * 4)
    q, k = (rotate(torch.randn(1, 1, 1, 16).expand(1, 9, 1, 16), frequencies)[0, :, 0] for _ in range(2))
    products = q @ k.T
    assert products.diagonal(2) == pytest.approx(products[0, 2].item(), rel=1e-4)
    assert products.diagonal(3).mean() != pytest.approx(products[0, 2].item(), rel=1e-2)
