"""Power laws of made-up curves have the numbers that the curves were made of."""

import json
import re
from math import isinf, isnan, log, nan, sqrt

import numpy as np
import pytest
import report
from evidence.advantage import BENCHES, Point, exponent, parameters_of, trend
from evidence.powerlaws import fit, share_to
from evidence.tables import table
from scipy import stats

BUDGET = 6_553_600
SHARES = (0.25, 0.5, 1.0)


def loss(tokens, floor=2.0, size=300.0, exponent=0.4):
    return floor + size * tokens**-exponent


def runs_of(arm, seeds=(1, 2, 3), speed=1.0, noise=0.0, shares=SHARES, **law):
    """Make whole runs of an arm that needs `1/speed` of the tokens; a seed moves all its losses by as much."""
    each = {"arm": arm, "model": "prose", "factor": 1.0, "trial": False, "seconds_per_step": 0.1, "optimizer_bytes": 1}
    random = np.random.default_rng(len(arm))
    return [
        {
            **each,
            "seed": seed,
            "share": share,
            "tokens": [share * BUDGET / 2, share * BUDGET],
            "loss": [9.0, loss(speed * share * BUDGET, **law) + seed / 10 + noise * random.standard_normal()],
        }
        for seed in seeds
        for share in shares
    ]


@pytest.mark.parametrize("shares", [SHARES, (0.1, 0.3, 0.5, 0.8, 1.0)])
@pytest.mark.parametrize("a", [0.05, 0.4, 2.0])
def test_a_law_is_fitted_to_its_own_curve(shares, a):
    tokens = [share * BUDGET for share in shares]
    law = fit(tokens, [loss(D, 2.5, 0.5 * BUDGET**a, a) for D in tokens])
    assert (law.floor, law.exponent) == pytest.approx((2.5, a), rel=1e-4)
    assert law.size == pytest.approx(0.5 * BUDGET**a, rel=1e-2)
    assert law.tokens_to(2.5 + 0.5) == pytest.approx(BUDGET, rel=1e-4)
    assert isinf(law.tokens_to(2.4))


@pytest.mark.parametrize("losses", [[4.0, 3.9, 3.0], [3.0, 3.5, 3.75], [4.0, 3.5, 3.0]])
def test_what_does_not_fall_by_less_each_time_has_no_law(losses):
    with pytest.raises(ValueError, match="no power law falls through the losses"):
        fit([1e6, 2e6, 4e6], losses)
    with pytest.raises(ValueError, match="runs of three lengths"):
        fit([1e6, 4e6], losses[:2])


def test_an_arm_that_needs_fewer_tokens_has_their_share():
    share, low, high = share_to(runs_of("default", speed=1.25), runs_of("muon", shares=(1.0,)))
    assert (share, low, high) == pytest.approx((0.8, 0.8, 0.8), rel=1e-5)  # a seed's loss moves both arms: no spread
    share, low, high = share_to(runs_of("default", seeds=(1,), speed=1.25), runs_of("muon"))
    assert share == pytest.approx(0.8, rel=1e-5)
    assert isnan(low)
    assert isnan(high)
    assert isinf(share_to(runs_of("default", floor=2.6), runs_of("muon"))[0])


def test_the_interval_is_a_jackknife_over_the_seeds():
    ours, theirs = runs_of("default", speed=1.25, noise=0.003), runs_of("muon", noise=0.003)
    parts = []
    for out in (1, 2, 3):
        some = ([run for run in arm if run["seed"] != out] for arm in (ours, theirs))
        parts.append(log(share_to(*some)[0]))
    share, low, high = share_to(ours, theirs)
    error = sqrt(2 / 3 * sum((part - np.mean(parts)) ** 2 for part in parts))
    assert log(high / share) == pytest.approx(stats.t.ppf(0.975, 2) * error)
    assert low < 0.8 < high


def test_the_table_has_the_law_and_the_share():
    runs = runs_of("muon") + runs_of("default", speed=1.25)
    frame = table(runs, [])
    assert frame.loc["default", "law to muon's loss"] == "0.800 (0.800 to 0.800)"
    assert frame.loc["muon", "law to muon's loss"].startswith("1.000")
    assert frame.loc["muon", "law"] == "2.20 + 300·D^-0.40"
    assert "law" not in table(runs_of("muon", shares=(0.5, 1.0)), [])
    risen = [run | {"loss": [9.0, 3.0 + run["share"]]} for run in runs_of("default")]
    frame = table(runs_of("muon") + risen, [])
    assert (frame.loc["default", "law"], frame.loc["default", "law to muon's loss"]) == ("none", "no law")


def points(means, errors, sizes=(10**5, 10**6)):
    return [Point("muon", "", N, mean, error, 3) for N, mean, error in zip(sizes, means, errors, strict=True)]


def test_an_advantage_that_is_a_power_of_the_size_has_its_exponent():
    sizes = (10**5, 3 * 10**5, 10**6)
    b, half, c = exponent(points([2 * N**-0.3 for N in sizes], [0.001, 0.002, 0.003], sizes))
    assert (b, c) == pytest.approx((-0.3, 2.0))
    b, half, _ = exponent(points([0.2, 0.1], [0.002, 0.003]))
    assert b == pytest.approx(log(0.5) / log(10))
    assert half == pytest.approx(stats.norm.ppf(0.975) * sqrt(0.01**2 + 0.03**2) / log(10))
    assert trend(points([0.2, 0.1], [0.002, 0.003])).endswith("shrinks with size")
    assert trend(points([0.1, 0.2], [0.002, 0.003])).endswith("grows with size")
    assert trend(points([0.2, 0.1], [0.05, 0.05])).endswith("level within the interval")
    assert trend(points([0.2, 0.1], [nan, nan])).endswith("one seed")
    assert trend(points([0.2, -0.1], [0.1, 0.1])).startswith("no exponent: an exponent needs two sizes")


def test_parameters_are_those_that_a_token_uses():
    dense = 2 * 1024 * 64 + 64 + 4 * (2 * 64 * 64 + 2 * 64 * 32 + 2 * 32 + 2 * 64 + 3 * 64 * 192)
    mixed = 2 * 1024 * 64 + 64 + 4 * (2 * 64 * 64 + 2 * 64 * 32 + 64 + 32 + 2 * 64 + 8 * 64 + 2 * 3 * 64 * 104)
    assert parameters_of(BENCHES / "ladder-1-prose.yaml") == dense
    assert parameters_of(BENCHES / "ladder-1-moe.yaml") == mixed


def test_raw_numbers_that_are_no_comparison_are_named(tmp_path, monkeypatch, capsys):
    file = tmp_path / "soak.json"
    file.write_text(json.dumps({"date": "", "runs": [{"arm": "default", "seed": 0}]}))
    monkeypatch.setattr("sys.argv", ["report.py", str(file)])
    with pytest.raises(SystemExit):
        report.main()
    assert "soak.json is no results.json of compare.py: it lacks ['bench', " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ladder-1-moe", "ladder-1-source"])
def test_committed_comparisons_can_be_drawn(tmp_path, name):
    [*pictures, markdown, page] = report.draw_comparisons([BENCHES.parents[1] / "results" / f"{name}.json"], tmp_path)
    assert pictures
    assert all(path.stat().st_size > 1000 for path in (*pictures, page))
    assert "muon-public" in markdown.read_text()


def test_several_rungs_are_drawn_with_their_advantage(tmp_path):
    files = []
    for rung, gain in ((1, 0.2), (2, 0.1)):
        arms = runs_of("muon", shares=(1.0,), floor=2.0 + gain), runs_of("default", shares=(1.0,))
        runs = [run for arm in arms for run in arm]
        about = {"bench": f"ladder-{rung}", "date": "", "commit": "", "device": "", "torch": ""}
        files.append(tmp_path / f"rung-{rung}.json")
        files[-1].write_text(json.dumps({**about, "runs": runs}))
    drawn = report.draw_comparisons(files, tmp_path / "out")
    assert {path.relative_to(tmp_path / "out").as_posix() for path in drawn} >= {
        "advantage.png",
        "advantage.md",
        "rung-1/report.md",
        "rung-2/ladder-2-prose-curves.png",
    }
    page = (tmp_path / "out" / "advantage.md").read_text()
    b = log(0.5) / log(627_808 / 328_512)
    assert f"muon: N^({b:.2f} ± 0.00): shrinks with size" in page
    assert re.search(r"\| ladder-1, prose +\| +328,512 +\| +0\.200 ± 0\.000 ", page)
    assert report.draw_comparisons(files[:1], tmp_path / "one")[0].parent == tmp_path / "one"
