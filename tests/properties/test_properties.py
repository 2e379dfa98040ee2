"""Random modules, gradients and what users do between steps: no exception but symlm's, no NaN, no half of a step.

`pytest tests/properties --hypothesis-profile=campaign --timeout=0` draws a thousand runs a preset, others each time.
"""

import traceback
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, reject
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import nn
from torch.testing import make_tensor

import symlm
from symlm.rules.soap import FIRST_VALUE

PACKAGE = str(Path(symlm.__file__).parent)
PRESETS = sorted(symlm.PRESETS)
SIZES = (1, 2, 3, 5, 8, 17, 0)
TWO_AXES = ("matrix", "embedding", "lm_head", "router", "mlp_in", "mlp_out", "tied_embedding", "vector")
KINDS = ("normal", "zero", "denormal", "huge", "tiny", "rank one", "none", "nan", "infinite")
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "a part": lambda x: torch.cat([x, x])[: len(x)] if x.ndim else x,
}

layouts = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.get)
options = st.fixed_dictionaries(
    {
        "rounding": st.sampled_from(["stochastic", "compensated"]),
        "nesterov": st.booleans(),
        "weight_decay": st.sampled_from([0, 0.1]),
        "momentum_dtype": st.sampled_from(["float32", "bfloat16"]),
    }
)


@st.composite
def weights(draw, dtype):
    """Draw a parameter of any shape and strides, and a role that its number of axes allows."""
    shape = draw(st.lists(st.sampled_from(SIZES), max_size=4))
    W = draw(layouts)(make_tensor(shape, dtype=dtype, device="cpu", low=-1, high=1))
    roles = {2: TWO_AXES, 3: ("expert_in", "expert_out", "vector")}.get(len(shape), ("vector",))
    return nn.Parameter(W), draw(st.sampled_from(roles))


@st.composite
def modules(draw):
    """Draw a module of one to four parameters, and their roles."""
    module = nn.Module()
    module.dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    module.roles = {}
    for k, (p, role) in enumerate(draw(st.lists(weights(module.dtype), min_size=1, max_size=4))):
        module.register_parameter(f"w{k}", p)
        module.roles[f"w{k}"] = role
    return module


@st.composite
def gradients(draw, p):
    """Draw a gradient, or none."""
    kind = draw(st.sampled_from(KINDS))
    G = make_tensor(p.shape, dtype=p.dtype, device="cpu", low=-1, high=1)
    if kind == "none":
        return None
    if kind == "rank one" and p.ndim == 2:
        G = torch.outer(G[:, :1].sum(1), G[:1].sum(0))
    G = G * {"zero": 0, "denormal": 1e-40, "huge": 1e30, "tiny": 1e-30}.get(kind, 1)
    if kind in ("nan", "infinite") and G.numel():
        G.view(-1)[draw(st.integers(0, G.numel() - 1))] = float(kind.replace("infinite", "-inf"))
    return draw(layouts)(G)


def is_ours(error):
    """Tell whether symlm raised an error itself, with what to do about it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return frame.filename.startswith(PACKAGE) and frame.line.startswith("raise") and len(str(error)) > 20


def attempt(action):
    """Return what an action returns, or None where symlm refuses it."""
    try:
        return action()
    except (ValueError, TypeError, RuntimeError) as error:
        if not is_ours(error):
            raise
        return None


def bits(module, opt):
    """Return copies of all weights and states, by name."""
    named = dict(module.named_parameters())
    states = {(name, key): x for name, p in named.items() for key, x in opt.state.get(p, {}).items()}
    return {key: x.detach().clone() for key, x in {**named, **states}.items()}


def same(before, after):
    """Compare all numbers; a state that was not there before is as it begins, see `is_a_beginning`."""
    return all(torch.equal(x, before[key]) if key in before else is_a_beginning(x) for key, x in after.items())


def is_a_beginning(x):
    """Tell whether a state is zeros, a rotation that is none, or KL-SOAP's first eigenvalues."""
    if not x.any() or bool((x == torch.tensor(FIRST_VALUE, dtype=x.dtype)).all()):
        return True
    return torch.equal(x, torch.eye(*x.shape[-2:]).to(x).expand_as(x))


class Training(RuleBasedStateMachine):
    """A run of one preset: steps, and what users and frameworks do between them."""

    def __init__(self, preset):
        super().__init__()
        self.preset = preset

    @initialize(module=modules(), options=options)
    def begin(self, module, options):
        self.module = module
        self.opt = attempt(lambda: symlm.SymOptimizer(module, preset=self.preset, roles=module.roles, **options))
        if self.opt is None:
            reject()

    def parameter(self, data):
        return getattr(self.module, data.draw(st.sampled_from(sorted(self.module.roles))))

    @rule(data=st.data())
    def step(self, data):
        trained = [p for p in self.module.parameters() if p.requires_grad]
        for p in self.module.parameters():
            p.grad = data.draw(gradients(p)) if p.requires_grad else None
        given = {p: p.grad.clone() for p in trained if p.grad is not None}
        finite = all(bool(G.isfinite().all()) for G in given.values())
        before, skipped = bits(self.module, self.opt), self.opt.skipped_steps
        done = attempt(lambda: [self.opt.step()])
        assert not finite or all(torch.equal(p.grad, G) for p, G in given.items())
        if done is None or not finite:
            assert same(before, bits(self.module, self.opt))
        assert done is None or self.opt.skipped_steps == skipped + (not finite)

    @rule(data=st.data())
    def freeze_or_thaw(self, data):
        p = self.parameter(data)
        p.requires_grad_(not p.requires_grad)

    @rule(data=st.data())
    def add(self, data):
        name, alone = f"w{len(self.module.roles)}", nn.Module()
        p, role = data.draw(weights(self.module.dtype))
        alone.register_parameter(name, p)
        groups = attempt(lambda: symlm.param_groups(alone, roles={name: role}))
        if groups and attempt(lambda: [self.opt.add_param_group(groups[0])]):
            self.module.register_parameter(name, p)
            self.module.roles[name] = role

    @rule(data=st.data())
    def replace(self, data):
        """Put another tensor in the place of a weight, as FSDP2 and quantizers do."""
        p = self.parameter(data)
        torch.utils.swap_tensors(p, nn.Parameter(data.draw(layouts)(p.detach().clone() / 2)))

    @rule(strict=st.booleans())
    def reload(self, strict):
        self.opt.load_state_dict(self.opt.state_dict(), strict=strict)

    @invariant()
    def everything_is_a_number(self):
        assert not [key for key, x in bits(self.module, self.opt).items() if x.isnan().any()]
        assert all(p.isfinite().all() for p in self.module.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("preset", PRESETS)
def test_whatever_is_drawn_is_refused_by_name_or_trained(preset):
    run_state_machine_as_test(lambda: Training(preset))


class Every(nn.Module):
    """A parameter of each of the common roles."""

    def __init__(self, dtype):
        super().__init__()
        self.roles = {f"w{k}": role for k, role in enumerate((*TWO_AXES[:-2], "vector"))}
        for name in self.roles:
            self.register_parameter(name, nn.Parameter(make_tensor((6, 4), dtype=dtype, device="cpu", low=-1, high=1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_at_the_ends_of_fp32_reach_no_weight_as_nan(preset, dtype):
    """Denormals, in which a product with a floor vanishes; and numbers whose sums over rows are infinite."""
    for size in (1e-38, 1e-40, 1e-42, 1.4e-45, 3e38):
        module = Every(dtype)
        opt = symlm.SymOptimizer(module, preset=preset, roles=module.roles)
        before = bits(module, opt)
        for _ in range(3):
            for p in module.parameters():
                p.grad = make_tensor(p.shape, dtype=dtype, device="cpu", low=-1, high=1) * size
            opt.step()
        assert not [key for key, x in bits(module, opt).items() if x.isnan().any()], size
        assert all(p.isfinite().all() for p in module.parameters()), size
        assert opt.skipped_steps == (3 if size > 1 else 0)
        assert size < 1 or same(before, bits(module, opt))


@pytest.mark.parametrize("preset", PRESETS)
@given(module=modules())
def test_a_model_without_memory_gets_the_groups_of_one_with_it(preset, module):
    real = attempt(lambda: symlm.SymOptimizer(module, preset=preset, roles=module.roles))
    meta = attempt(lambda: symlm.SymOptimizer(module.to("meta"), preset=preset, roles=module.roles))
    assert (real is None) == (meta is None)
    if real:
        plain = [[{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] for opt in (real, meta)]
        assert plain[0] == plain[1]
