"""The conductor gives the formula of its source, is invariant where it claims to be, resumes, and refuses bad input."""

import io
from itertools import permutations
from math import pi, sin

import pytest
import torch
from numerics import EXACT, MUST_FAIL, RUN, relative
from torch import nn

import symlm
from symlm.gradient_conductor import Arbitration, GradientConductor

N = 12
ABC = ("a", "b", "c")


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Vector(nn.Module):
    """Parameters of two shapes, with losses `⟨g, w⟩` whose gradients are given."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (5, N - 5))

    def loss(self, g):
        return (self.first * g[:5].to(self.first)).sum() + (self.second * g[5:].to(self.first)).sum()

    @property
    def gradient(self):
        return torch.cat([self.first.grad, self.second.grad])


def conducted(steps, names=None, **options):
    """Give a conductor the gradients of each step, {name: g}; return what it wrote in each, and the conductor."""
    model = Vector()
    conductor = GradientConductor(model, names or list(steps[0]), **options)
    written = []
    for gradients in steps:
        conductor.backward({name: model.loss(g) for name, g in gradients.items()})
        conductor.step()
        written.append(model.gradient)
    return written, conductor


def drifting(count, losses=3, seed=0):
    """Return steps of gradients that conflict, and change slowly as those of a training run."""
    center = random(losses, N, seed=seed)
    center -= 1.2 * center.mean(0)
    moved = [center + 0.4 * random(losses, N, seed=9 * step + seed + 1) for step in range(count)]
    return [dict(zip("abcde", gradients, strict=False)) for gradients in moved]


def direct(steps, t=(-0.8, -0.5, 0.0), beta=0.0):
    """Return what the source's formulas write, on vectors in place, the angle and the arbiter written out."""
    norms, wins, last, mean, written = {}, [], {}, 0.0, []
    for count, given in enumerate(steps, start=1):
        g = {name: x.clone() for name, x in given.items()}
        norms = {name: 0.95 * norms.get(name, 1.0) + 0.05 * x.norm() for name, x in g.items()}
        for _ in range(2 * len(g)):
            pairs = [(i, j) for k, i in enumerate(g) for j in list(g)[k + 1 :]]
            c, i, j = min(((g[i] @ g[j] / g[i].norm() / g[j].norm()).item(), i, j) for i, j in pairs)
            if c >= t[2] - RUN:
                break
            strength = {k: g[k].norm() / norms[k] for k in (i, j)}
            score = {
                k: 0.8 * max(0.0, torch.cosine_similarity(g[k], last.get(k, torch.zeros(N)), dim=0).item())
                + 0.2 * strength[k] / (strength[i] + strength[j])
                for k in (i, j)
            }
            w, lost = (j, i) if score[j] > score[i] else (i, j)
            if wins[-3:] in ([i] * 3, [j] * 3):
                w, lost = (j, i) if wins[-1] == i else (i, j)
            wins.append(w)
            if c >= t[1]:
                alpha = pi / 2 * (1 - (c - t[1]) / (t[2] - t[1]))
            else:
                alpha = pi if c <= t[0] else pi / 2 * (1 + ((c - t[1]) / (t[0] - t[1])) ** 2)
            dot, sizes = g[w] @ g[lost], (g[w] @ g[w], g[lost] @ g[lost])
            g[w], g[lost] = (
                g[w] - sin(alpha) * dot / sizes[1] * g[lost],
                g[lost] - sin(min(alpha, pi / 2)) * dot / sizes[0] * g[w],
            )
        last = g
        mean = beta * mean + (1 - beta) * sum(g.values())
        written.append(mean / (1 - beta**count))
    return written


@pytest.mark.parametrize(("losses", "beta"), [(2, 0.0), (3, 0.0), (4, 0.0), (3, 0.85)])
def test_what_is_written_is_the_sources_formula(losses, beta):
    steps = drifting(30, losses)
    written, conductor = conducted(steps, momentum=beta)
    assert conductor.last.conflicts
    assert all(relative(ours, theirs) < RUN for ours, theirs in zip(written, direct(steps, beta=beta), strict=True))


def test_an_orthogonal_map_of_the_flat_gradient_moves_what_is_written():
    steps, Q = drifting(20), torch.linalg.qr(random(N, N))[0]
    plain, _ = conducted(steps)
    moved, conductor = conducted([{name: Q @ g for name, g in gradients.items()} for gradients in steps])
    assert conductor.last.conflicts
    assert all(relative(b, Q @ a) < RUN for a, b in zip(plain, moved, strict=True))
    stretched, _ = conducted(
        [{name: g * torch.arange(1, N + 1) for name, g in gradients.items()} for gradients in steps]
    )
    assert relative(stretched[-1], plain[-1] * torch.arange(1, N + 1)) > MUST_FAIL


def test_the_order_of_the_losses_does_not_matter():
    steps = drifting(20)
    first, _ = conducted(steps, ABC)
    for names in permutations(ABC):
        other, _ = conducted(steps, names)
        assert all(relative(b, a) < RUN for a, b in zip(first, other, strict=True))


def test_agreeing_gradients_pass_unchanged():
    g, h = random(2, N).abs()
    (written,), conductor = conducted([{"a": g, "b": h}])
    assert torch.equal(written, g + h)
    assert conductor.last.conflicts == ()
    assert conductor.last.cosine > 0


@pytest.mark.parametrize("zones", [False, True])
def test_after_a_critical_conflict_the_winner_is_untouched_and_the_loser_orthogonal_or_gone(zones):
    g = random(N)
    h = -0.5 * g + 0.05 * random(N, seed=1)
    (written,), conductor = conducted([{"a": g, "b": h}], rules=Arbitration(zones=zones))
    ((winner, _, cosine),) = conductor.last.conflicts
    assert cosine < -0.8
    won, lost = (g, h) if winner == "a" else (h, g)
    rest = written - won
    assert abs(rest @ won) < EXACT * (lost @ lost)
    assert (rest.norm() < EXACT) == zones
    assert zones or relative(rest, lost - (lost @ won) / (won @ won) * won) < EXACT


@pytest.mark.parametrize(("cosine", "winner_yields", "loser_yields"), [(-0.25, True, True), (-0.6, False, True)])
def test_zones_project_the_loser_and_in_the_weak_one_both(cosine, winner_yields, loser_yields):
    e, f = torch.eye(N, dtype=torch.float64)[:2]
    g, h = e, 2 * (cosine * e + (1 - cosine**2) ** 0.5 * f)  # the larger wins the first conflict
    (written,), _ = conducted([{"a": g, "b": h}], rules=Arbitration(zones=True))
    g_less, h_less = g - (g @ h) / (h @ h) * h, h - (g @ h) / (g @ g) * g
    assert relative(written, g_less + (h_less if winner_yields else h)) < EXACT
    assert loser_yields


def test_the_angle_is_continuous_and_has_the_sources_values():
    rules = Arbitration()
    assert [rules.angle(c) for c in (0.5, 0.0, -0.25, -0.5, -0.65, -0.8, -1.0)] == pytest.approx(
        [0, 0, pi / 4, pi / 2, pi / 2 + pi / 8, pi, pi]
    )
    for edge in (-0.5, -0.8):
        assert rules.angle(edge + 1e-9) == pytest.approx(rules.angle(edge - 1e-9), abs=1e-7)


@pytest.mark.parametrize("streak_wins", [False, True])
def test_after_three_wins_the_other_loss_wins_or_the_same_goes_on(streak_wins):
    """The source's code and its README say opposite things; `a` wins by its score in every step."""
    steady, flipping = random(N), random(N, seed=1)
    flipping -= (flipping @ steady) / (steady @ steady) * steady
    steps = [{"a": steady, "b": -0.9 * steady + 0.3 * (-1) ** k * flipping} for k in range(8)]
    model, winners = Vector(), []
    conductor = GradientConductor(model, ABC[:2], Arbitration(streak_wins=streak_wins, stability=0.0))
    for gradients in steps:
        gradients["a"] = gradients["a"] * 10 ** (1 + len(winners))  # ever stronger than its mean
        conductor.backward({name: model.loss(g) for name, g in gradients.items()})
        winners += [conflict.winner for conflict in conductor.step().conflicts]
    assert "".join(winners) == ("aaaaaaaa" if streak_wins else "aaabaaab")


def test_a_norm_cap_bounds_each_gradient_before_the_conflicts():
    g, h = random(2, N).abs()
    (written,), conductor = conducted([{"a": g, "b": 1e-3 * h}], rules=Arbitration(norm_cap=0.1))
    assert relative(written, 0.1 * g / g.norm() + 1e-3 * h) < EXACT
    assert conductor.last.norms == pytest.approx({"a": g.norm().item(), "b": 1e-3 * h.norm().item()})


def test_losses_of_one_graph_and_a_micro_batch_each_give_the_same():
    x, names, found = random(6, 4), ("fit", "size"), []
    for stochastic in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        conductor = GradientConductor(net, names)
        for name in names if stochastic else (None,):
            y = net(x)
            losses = {"fit": (y - 1).square().mean(), "size": (y + 1).square().mean()}
            conductor.backward({name: losses[name]} if name else losses)
        conductor.step()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        assert conductor.last.conflicts
    assert relative(*found) < EXACT


def test_passes_of_one_loss_add_up_until_the_step():
    a, b, c = random(3, N)
    model = Vector()
    conductor = GradientConductor(model, ("one", "two"))
    for _ in range(2):
        for g in (a, b):
            conductor.backward({"one": model.loss(g)})
        conductor.backward({"two": model.loss(c)})
        conductor.step()
    once, _ = conducted([{"one": a + b, "two": c}] * 2)
    assert relative(model.gradient, once[-1]) < EXACT


def test_two_conflicting_quadratics_reach_a_point_that_serves_both_where_the_larger_one_alone_decides_the_sum():
    """`|w − p|² · 100` and `|w − q|²`: steps of unit length along the conducted gradient and along the sum."""
    p, q = torch.zeros(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)

    def final(is_conducted):
        w = nn.Parameter(3 * random(N))
        model = nn.ParameterList([w])
        conductor = GradientConductor(model, ("far", "near"))
        for step in range(400):
            losses = {"far": 100 * (w - p).square().sum(), "near": (w - q).square().sum()}
            if is_conducted:
                conductor.backward(losses)
                conductor.step()
            else:
                w.grad = torch.autograd.grad(sum(losses.values()), w)[0]
            with torch.no_grad():
                w -= 0.5 * 0.99**step * w.grad / w.grad.norm().clamp(min=RUN)
        return w.detach(), conductor

    summed, _ = final(is_conducted=False)
    balanced, conductor = final(is_conducted=True)
    assert relative(summed, q / 101) < MUST_FAIL  # the minimum of the sum
    on_segment = (balanced @ q) / (q @ q)
    assert 0.05 < on_segment < 0.95
    assert (balanced - on_segment * q).norm() < MUST_FAIL  # no point is better for both
    assert conductor.last.cosine == pytest.approx(-1, abs=1e-3)


def test_the_state_is_plain_and_goes_on_bit_for_bit():
    steps = drifting(12)
    whole, uninterrupted = conducted(steps, momentum=0.5)
    _, first = conducted(steps[:6], momentum=0.5)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    model = Vector()
    second = GradientConductor(model, ABC, momentum=0.5)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for gradients, expected in zip(steps[6:], whole[6:], strict=True):
        second.backward({name: model.loss(g) for name, g in gradients.items()})
        second.step()
        assert torch.equal(model.gradient, expected)
    ours, theirs = second.state_dict(), uninterrupted.state_dict()
    assert all(ours[key] == theirs[key] for key in ("norms", "winners", "mixing", "steps"))


def test_a_state_of_something_else_is_refused():
    _, conductor = conducted(drifting(2))
    state = conductor.state_dict()
    with pytest.raises(ValueError, match=r"is of the losses \['a', 'b', 'c'\], not of \['a', 'b'\]"):
        GradientConductor(Vector(), ABC[:2]).load_state_dict(state)
    with pytest.raises(ValueError, match="of a model with other parameters"):
        GradientConductor(nn.Linear(3, 3), ABC).load_state_dict(state)
    with pytest.raises(ValueError, match="with momentum and this one has none"):
        GradientConductor(Vector(), ABC, momentum=0.5).load_state_dict(state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_skipped_and_nothing_is_written(bad):
    steps, model = drifting(2), Vector()
    conductor = GradientConductor(model, ABC)
    optimizer = torch.optim.AdamW(model.parameters())
    for gradients in ({**steps[0], "b": steps[0]["b"] * bad}, steps[0]):
        before = conductor.state_dict()
        conductor.backward({name: model.loss(g) for name, g in gradients.items()})
        report = conductor.step()
        if not report.finite:
            assert model.first.grad is None
            optimizer.step()
            assert not model.first.any()
            after = conductor.state_dict()
            assert after.pop("skipped_steps") == before.pop("skipped_steps") + 1
            assert after == before
    once, _ = conducted(steps[:1])
    assert torch.equal(model.gradient, once[0])


def test_bf16_rows_are_near_fp32_ones_and_take_half_the_memory():
    steps = [{name: g.float() for name, g in gradients.items()} for gradients in drifting(5)]
    written = []
    for dtype in (None, torch.bfloat16):
        model = Vector(torch.float32)
        conductor = GradientConductor(model, ABC, dtype=dtype)
        for gradients in steps:
            conductor.backward({name: model.loss(g) for name, g in gradients.items()})
            conductor.step()
        written.append(model.gradient)
        sizes = {x.element_size() for row in conductor.state_dict()["gradients"] for x in row.values()}
        assert sizes == {2 if dtype else 4}
    assert written[1].dtype == torch.float32
    assert 0 < relative(written[1], written[0]) < MUST_FAIL


def test_any_optimizer_takes_what_is_written():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(32, 6)
    conductor = GradientConductor(net, ("fit", "size"))
    optimizer = symlm.SymOptimizer(net, roles={"0.weight": "mlp_in", "2.weight": "mlp_out"})
    fits = []
    for _ in range(30):
        y = net(x)
        losses = {"fit": (y - x[:, :4]).square().mean(), "size": 0.1 * y.square().mean()}
        fits.append(losses["fit"].item())
        conductor.backward(losses)
        conductor.step()
        optimizer.step()
        optimizer.zero_grad()
    assert fits[-1] < 0.5 * fits[0]


def test_bad_input_is_named():
    model = Vector()
    for losses in (["one"], [], ["one", "one"], "text", None, [1, 2]):
        with pytest.raises(ValueError, match="needs the names of two losses or more, each once"):
            GradientConductor(model, losses)
    with pytest.raises(ValueError, match="0 <= momentum < 1"):
        GradientConductor(model, ("one", "two"), momentum=1.0)
    for dtype in (torch.int8, "float32"):
        with pytest.raises(ValueError, match="rows have a floating-point dtype"):
            GradientConductor(model, ("one", "two"), dtype=dtype)
    conductor = GradientConductor(model, ("one", "two"))
    for loss in (1.0, model.loss(random(N)).detach(), model.first):
        with pytest.raises(ValueError, match="the loss 'two' must be one number with a graph for its backward pass"):
            conductor.backward({"one": model.loss(random(N)), "two": loss})
    with pytest.raises(ValueError, match=r"unknown losses \['three'\]; the conductor was given \['one', 'two'\]"):
        conductor.backward({"three": model.loss(random(N))})
    conductor.backward({"one": model.loss(random(N))})
    with pytest.raises(RuntimeError, match=r"the losses \['two'\] had no backward pass"):
        conductor.step()
    with pytest.raises(RuntimeError, match="gave no parameter of the conductor a gradient: build the conductor after"):
        conductor.backward({"two": torch.ones((), requires_grad=True)})
    conductor = GradientConductor(model, ("one", "two"))
    conductor.backward({"one": model.first.sum(), "two": model.second.sum()})
    with pytest.raises(RuntimeError, match=r"the losses \['one', 'two'\] share no parameter with any other"):
        conductor.step()
    with pytest.raises(ValueError, match="no trainable parameter for a conductor"):
        GradientConductor(Vector().requires_grad_(False), ("one", "two"))


BAD_RULES = [{"main": -0.9}, {"weak": -0.5}, {"power": 0.0}, {"streak": -1}, {"norm_decay": 1.0}, {"norm_cap": 0.0}]


NO_NUMBERS = [{name: float("nan")} for name in ("power", "stability", "strength", "norm_cap", "critical", "norm_decay")]


@pytest.mark.parametrize("options", [*BAD_RULES, *NO_NUMBERS, {"stability": -0.1}, {"streak": 1.5}, {"weak": "0"}])
def test_rules_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="must"):
        Arbitration(**options)
