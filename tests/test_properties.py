"""Random modules, gradients and what users do between steps: no exception but symlm's, no NaN, no half of a step."""

import random
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import make_tensor

import symlm
from symlm.rules.soap import FIRST_VALUE

PACKAGE = str(Path(symlm.__file__).parent)
SIZES = (0, 1, 1, 2, 3, 5, 8, 17)
TWO_AXES = ("matrix", "embedding", "lm_head", "router", "mlp_in", "mlp_out", "tied_embedding", "vector")
STRIDES = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "a part": lambda x: torch.cat([x, x])[: len(x)] if x.ndim else x,
}


def gradient(rng, p):
    """Return a gradient and whether it is finite."""
    generator = {"dtype": p.dtype, "device": p.device}
    kind = rng.choice(["normal"] * 4 + ["zero", "denormal", "huge", "tiny", "rank one", "none", "nan", "infinite"])
    G = make_tensor(p.shape, low=-1, high=1, **generator)
    if kind == "none":
        return None, True
    if kind == "rank one" and p.ndim == 2:
        G = torch.outer(G[:, :1].sum(1), G[:1].sum(0))
    G = G * {"zero": 0, "denormal": 1e-40, "huge": 1e30, "tiny": 1e-30}.get(kind, 1)
    if kind in ("nan", "infinite") and G.numel():
        G.view(-1)[rng.randrange(G.numel())] = float(kind.replace("infinite", "-inf"))
    return STRIDES[rng.choice(list(STRIDES))](G), bool(G.isfinite().all())


class Drawn(nn.Module):
    """A module of some parameters of any shape, dtype and strides, and their roles."""

    def __init__(self, rng):
        super().__init__()
        self.dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
        self.roles = {}
        for k in range(rng.randint(1, 4)):
            self.draw(rng, f"w{k}")

    def draw(self, rng, name):
        shape = [rng.choice(SIZES) for _ in range(rng.choice([0, 1, 2, 2, 2, 2, 3, 4]))]
        W = STRIDES[rng.choice(list(STRIDES))](make_tensor(shape, dtype=self.dtype, device="cpu", low=-1, high=1))
        self.register_parameter(name, nn.Parameter(W))
        roles = {2: TWO_AXES, 3: ("expert_in", "expert_out", "vector")}
        self.roles[name] = rng.choice(roles.get(len(shape), ("vector",)))


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


def step(rng, module, opt):
    """Make one step of drawn gradients and check what it wrote."""
    finite = True
    for p in module.parameters():
        p.grad = None
        if p.requires_grad:
            p.grad, good = gradient(rng, p)
            finite &= good
    given = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    before, skipped = bits(module, opt), opt.skipped_steps
    done = attempt(lambda: [opt.step()])
    after = bits(module, opt)
    assert all(torch.equal(p.grad, given[n]) or not finite for n, p in module.named_parameters() if n in given)
    if done is None or not finite:
        assert same(before, after)
    assert done is None or opt.skipped_steps == skipped + (not finite)
    assert not [key for key, x in after.items() if x.isnan().any()]
    assert all(p.isfinite().all() for p in module.parameters())


def freeze(rng, module, opt):
    p = rng.choice(list(module.parameters()))
    p.requires_grad_(not p.requires_grad)


def add(rng, module, opt):
    name = f"more{len(module.roles)}"
    module.draw(rng, name)
    alone = nn.Module()
    alone.register_parameter(name, getattr(module, name))
    groups = attempt(lambda: symlm.param_groups(alone, roles={name: module.roles[name]}))
    if groups is None or attempt(lambda: [opt.add_param_group(groups[0])]) is None:
        delattr(module, name)


def replace(rng, module, opt):
    """Put another tensor in the place of a weight, as FSDP2 and quantizers do."""
    p = rng.choice(list(module.parameters()))
    torch.utils.swap_tensors(p, nn.Parameter(STRIDES[rng.choice(list(STRIDES))](p.detach().clone() / 2)))


def reload(rng, module, opt):
    opt.load_state_dict(opt.state_dict(), strict=rng.random() < 0.5)


@pytest.mark.parametrize("preset", sorted(symlm.PRESETS))
def test_whatever_is_drawn_is_refused_by_name_or_trained(preset):
    refused = 0
    for seed in range(6):
        rng = random.Random(f"{preset} {seed}")
        torch.manual_seed(seed)
        module = Drawn(rng)
        options = {"rounding": rng.choice(["stochastic", "compensated"]), "nesterov": rng.random() < 0.3}
        options |= {"weight_decay": rng.choice([0, 0.1]), "momentum_dtype": rng.choice(["float32", "bfloat16"])}
        opt = attempt(lambda m=module, o=options: symlm.SymOptimizer(m, preset=preset, roles=m.roles, **o))
        refused += opt is None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(8 if opt else 0):
                rng.choice([step, step, step, step, freeze, add, replace, reload])(rng, module, opt)
    assert refused < 4  # or nothing was tried


class Every(nn.Module):
    """A parameter of each of the common roles."""

    def __init__(self, dtype):
        super().__init__()
        self.roles = {f"w{k}": role for k, role in enumerate((*TWO_AXES[:-2], "vector"))}
        for name in self.roles:
            self.register_parameter(name, nn.Parameter(make_tensor((6, 4), dtype=dtype, device="cpu", low=-1, high=1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", sorted(symlm.PRESETS))
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


@pytest.mark.parametrize("preset", sorted(symlm.PRESETS))
def test_a_model_without_memory_gets_the_groups_of_one_with_it(preset):
    rng = random.Random(preset)
    for _ in range(5):
        module = Drawn(rng)
        real = attempt(lambda m=module: symlm.SymOptimizer(m, preset=preset, roles=m.roles))
        meta = attempt(lambda m=module: symlm.SymOptimizer(m.to("meta"), preset=preset, roles=m.roles))
        assert (real is None) == (meta is None)
        if real:
            plain = [[{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] for opt in (real, meta)]
            assert plain[0] == plain[1]
