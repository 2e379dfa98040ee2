"""SymOptimizer: one `torch.optim.Optimizer` in which every role is updated by its own rule."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any
from zlib import crc32

import torch
from symlm_kernels.selection import CHOICES
from torch import Tensor, nn
from torch.optim.adamw import adamw

from symlm.coefficients import get_schedule
from symlm.polar import METHODS, polar
from symlm.routes import param_groups
from symlm.rules import PROMISES, Rule, get_rule
from symlm.scaling import SCALES
from symlm.views import WHOLE, MatrixView

DEFAULTS: dict[str, Any] = {
    "momentum": 0.95,
    "nesterov": False,
    "weight_decay": 0.0,
    "weight_decay_multiplier": 1.0,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "polar_method": "auto",
    "schedule": "polar_express",
    "steps": 5,
    "compute_dtype": "auto",
    "kernels": "auto",
    "momentum_dtype": "float32",
    "rounding": "stochastic",
    "nonfinite": "skip",
}
BATCH_ELEMENTS = 2**26  # a batch of equal shapes holds at most this many, so that temporaries stay bounded
CPU_BLOCK_ELEMENTS = 2**22  # rows that do not mix are updated in blocks that stay near a CPU's cache


@dataclass
class Member:
    """One parameter in a step: its name, gradient and state, and the fp32 tensor that the update is done in."""

    name: str
    parameter: nn.Parameter
    gradient: Tensor
    state: dict[str, Any]
    master: Tensor


@dataclass
class Section:
    """A parameter, or one block of a fused one, with the view that makes it matrices."""

    view: MatrixView
    gradient: Tensor
    momentum: Tensor
    master: Tensor


class SymOptimizer(torch.optim.Optimizer):
    """Update every parameter by the rule of its role: `M <- βM + (1−β)G`, `W <- (1 − ηλ)W − η·s·U(M)`.

    params: a model; or the output of `symlm.param_groups(model, ...)`, which then holds rates, preset and overrides.
    lr, preset, overrides, roles: as in `symlm.param_groups`.
    options: defaults of every group, which `overrides` may set by role:
        momentum β (0.95); nesterov: U((1−β)G + βM) instead (False); weight_decay λ (0.0);
        betas, eps: AdamW's, for roles routed to it;
        polar_method, schedule, steps, compute_dtype, kernels: see `symlm.polar`;
        momentum_dtype: "float32", or "bfloat16" to save memory;
        rounding: how a bf16 parameter without an fp32 master is stored, "stochastic" or "compensated";
        nonfinite: "skip" a step whose gradients are not finite (counted in `skipped_steps`), or "raise".

    Gradient clipping is not felt by rules of degree 0; the update itself is never clipped.

    Raises: ValueError for lr <= 0 and unknown names; TypeError for a list of parameters without roles.
    Source: arXiv 2605.18106, section 3.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[dict[str, Any]],
        lr: float | Tensor = 0.02,
        preset: str = "default",
        overrides: dict[str, dict[str, Any]] | None = None,
        roles: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        for key in options:
            _refuse_unknown("option", key, DEFAULTS)
        for role, values in (overrides or {}).items():
            for key in values:
                _refuse_unknown(f"overrides[{role!r}] key", key, {**DEFAULTS, **dict.fromkeys(_ROUTED)})
        if isinstance(params, nn.Module):
            params = param_groups(params, lr, preset, overrides, roles)
            for group in params:
                for key in set(options) - set((overrides or {}).get(group["role"], ())):
                    group.pop(key, None)  # said here: it comes before what the preset would have
        elif preset != "default" or overrides or roles:
            raise ValueError("preset, overrides and roles belong to symlm.param_groups when groups are given")
        super().__init__(params, {"lr": lr, **DEFAULTS, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group made by `symlm.param_groups`.  Raises: TypeError without a route, ValueError for bad values."""
        if not isinstance(param_group, dict) or any(key not in param_group for key in _ROUTED):
            raise TypeError(
                "SymOptimizer needs to know what each parameter is: pass the model, or symlm.param_groups(model)"
            )
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

    @property
    def skipped_steps(self) -> int:
        """Return how many steps were skipped for non-finite gradients (reads the device)."""
        return int(self.param_groups[0].get("skipped", 0))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Do one step, in three phases for each batch of equal shapes: momentum, direction, update.

        Raises: RuntimeError for sparse gradients; FloatingPointError for non-finite ones if `nonfinite="raise"`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._create_state()
        finite = self._finite()
        if finite is None:
            return loss
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            members = list(self._members(group))
            if get_rule(group["rule"]).stateful:
                _adamw_step(group, members, finite)
                continue
            for batch in _batches(_sections(group, members)):
                momenta = _update_momentum(group, batch, finite)
                for rows, U in directions(group, batch[0].view, momenta):
                    _apply(group, batch, rows, U, finite)
            for member in members:
                _store(group, member, finite)
        return loss

    @torch.no_grad()
    def verify(self, matrices: int = 4) -> "Verification":
        """Check that every route's rule really ran, from what the last step left: no step is made, nothing changes.

        Directions are computed again from the momenta, and held to what their rules promise: unit rows, zero column
        sums, singular values near 1 (`symlm.rules.PROMISES`). matrices: how many of each parameter are looked at.

        Returns the checks, a table when printed. Raises: RuntimeError, naming what no step has reached and what
        broke its promise.
        """
        checks, failures = Verification(), []
        for group in self.param_groups:
            rule = get_rule(group["rule"])
            for name, p in _named(group):
                state = self.state.get(p, {})
                if not state or group.get("step", 0) < 1:
                    failures.append(f"{name} ({group['role']}): no step has reached it")
                elif p.numel() and not rule.stateful:
                    for promise, departure in _departures(group, rule, state["momentum"], matrices).items():
                        checks.append(Check(name, group["role"], rule.name, promise, departure))
        failures += [str(check) for check in checks if not check.kept]
        if failures:
            raise RuntimeError("the optimizer did not do what its table says:\n  " + "\n  ".join(failures))
        return checks

    def _create_state(self) -> None:
        """Give every parameter its state at once, so that all ranks and checkpoints agree on the keys."""
        for group in self.param_groups:
            stateful = get_rule(group["rule"]).stateful
            for p in group["params"]:
                if self.state.get(p):
                    continue
                dtype = torch.promote_types(p.dtype, torch.float32)
                momentum_dtype = getattr(torch, group["momentum_dtype"]) if dtype == torch.float32 else dtype
                keys = ("exp_avg", "exp_avg_sq") if stateful else ("momentum",)
                kind = dtype if stateful else momentum_dtype
                state = {key: torch.zeros_like(p, dtype=kind, memory_format=torch.preserve_format) for key in keys}
                if stateful:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                if p.dtype != dtype and group["rounding"] == "compensated":
                    state["compensation"] = torch.zeros_like(p)
                self.state[p] = state

    def _finite(self) -> Tensor | None:
        """Return whether all gradients are finite, as a tensor on their device; None if the step ends here.

        On a CPU the answer is read, since reading costs nothing there; on a GPU the step goes on and masks itself.
        """
        named = [(name, p.grad) for group in self.param_groups for name, p in _named(group) if p.grad is not None]
        for name, gradient in named:
            if gradient.is_sparse:
                raise RuntimeError(f"{name} has a sparse gradient; build its nn.Embedding with sparse=False")
        gradients = [gradient for _, gradient in named if gradient.numel()]
        if not gradients:
            return None
        device = gradients[0].device
        finite = torch.stack([extreme.to(device) for extreme in _extremes(gradients)]).isfinite().all()
        if self.defaults["nonfinite"] == "raise" and not finite:
            bad = [name for name, gradient in named if not gradient.isfinite().all()]
            raise FloatingPointError(f"non-finite gradients in {bad}; nothing was updated")
        self.param_groups[0]["skipped"] = self.param_groups[0].get("skipped", 0) + (~finite).to(torch.int64)
        return None if device.type == "cpu" and not finite else finite

    def _members(self, group: dict[str, Any]) -> Iterator[Member]:
        for name, p in _named(group):
            if p.grad is None:
                continue
            state = self.state[p]
            wide = p.dtype in (torch.float32, torch.float64)
            master = p if wide else p.float()
            if "compensation" in state:
                master = master + state["compensation"].float()
            yield Member(name, p, p.grad, state, master)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep each state's own dtype: a bf16 parameter's fp32 momentum stays fp32."""
        super().load_state_dict(state_dict)
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        ours = (p for group in self.param_groups for p in group["params"])
        for index, p in zip(saved, ours, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[p][key].dtype:
                    self.state[p][key] = value.to(device=p.device, copy=True)
        for group in self.param_groups:
            _check_group(group)


_ROUTED = ("role", "view", "rule", "scale", "outputs", "lr")


def _refuse_unknown(what: str, key: str, known: dict[str, Any]) -> None:
    if key not in known:
        near = get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; choose one of {sorted(known)}"
        raise ValueError(f"unknown {what} {key!r}{hint}")


def _check_group(group: dict[str, Any]) -> None:
    role = group["role"]
    get_rule(group["rule"])
    get_schedule(group["schedule"]).steps(group["steps"])
    choices = {
        "scale": tuple(SCALES),
        "polar_method": METHODS,
        "kernels": CHOICES,
        "rounding": ("stochastic", "compensated"),
        "nonfinite": ("skip", "raise"),
        "momentum_dtype": ("float32", "bfloat16"),
        "outputs": ("rows", "columns"),
    }
    for key, allowed in choices.items():
        if group[key] not in allowed:
            raise ValueError(f"group {role}: unknown {key} {group[key]!r}; choose one of {allowed}")
    if group["lr"] < 0 or not 0 <= group["momentum"] < 1 or group["weight_decay"] < 0:
        raise ValueError(f"group {role}: lr and weight_decay are not negative, 0 <= momentum < 1")
    view = MatrixView.parse(group["view"])
    for name, p in _named(group):
        if p.dtype not in (torch.float64, torch.float32, torch.bfloat16):
            raise ValueError(f"{name} is {p.dtype}: train it in float32 or bfloat16 (autocast may compute in float16)")
        if p.numel():
            view.shape(tuple(p.shape))


def _named(group: dict[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
    names = group.get("param_names") or [f"{group['role']}[{k}]" for k in range(len(group["params"]))]
    return zip(names, group["params"], strict=True)


def _sections(group: dict[str, Any], members: list[Member]) -> Iterator[Section]:
    view = MatrixView.parse(group["view"])
    for member in members:
        if member.parameter.numel():
            tensors = (member.gradient, member.state["momentum"], member.master)
            parts = zip(*(view.sections(tensor) for tensor in tensors), strict=True)
            for (part_view, G), (_, M), (_, W) in parts:
                yield Section(part_view, G, M, W)


def _batches(sections: Iterator[Section]) -> Iterator[list[Section]]:
    """Gather sections of one shape, dtype and device in batches, each within BATCH_ELEMENTS."""
    alike: dict[tuple[Any, ...], list[Section]] = {}
    for section in sections:
        W = section.master
        alike.setdefault((W.shape, W.dtype, W.device), []).append(section)
    for batch in alike.values():
        size = max(1, BATCH_ELEMENTS // batch[0].master.numel())
        for start in range(0, len(batch), size):
            yield batch[start : start + size]


def _extremes(tensors: list[Tensor]) -> list[Tensor]:
    """Return scalars that are all finite when every entry is: in one pass over the tensors, and few launches."""
    if tensors[0].device.type == "cpu":
        return [extreme for tensor in tensors for extreme in torch.aminmax(tensor)]  # norms are ten times slower
    return list(torch._foreach_norm(tensors, torch.inf))


def _masked(gradient: Tensor, otherwise: Tensor, finite: Tensor) -> Tensor:
    """Return the gradient, or `otherwise` on a device whose step must not happen."""
    gradient = gradient.to(otherwise.dtype)
    return gradient if gradient.device.type == "cpu" else torch.where(finite, gradient, otherwise)


def _update_momentum(group: dict[str, Any], batch: list[Section], finite: Tensor) -> list[Tensor]:
    """Phase 1: `M <- βM + (1−β)G`; return what the rule sees, M or its Nesterov look-ahead."""
    beta = group["momentum"]
    seen = []
    for section in batch:
        M = section.momentum
        G = _masked(section.gradient, M, finite)
        M.lerp_(G, 1 - beta)
        seen.append(G.lerp(M, beta) if group["nesterov"] else M)
    return seen


def directions(group: dict[str, Any], view: MatrixView, momenta: list[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Phase 2: yield rows and their `U = rule(M)`, one for each momentum of a batch of equal shapes.

    All rows come at once, from one stack (k·b, m, n); those of a lone matrix whose rows do not mix come by blocks.
    """
    rule, shape = get_rule(group["rule"]), tuple(momenta[0].shape)
    M = _wide(momenta[0])
    if rule.row_map and view == WHOLE and len(momenta) == 1:
        block_elements = CPU_BLOCK_ELEMENTS if M.device.type == "cpu" else BATCH_ELEMENTS
        yield from ((rows, [U]) for rows, U in rule.blocks(M, block_elements))
        return
    stacks = [view.to_matrices(_wide(M)) for M in momenta]
    stack = stacks[0] if len(stacks) == 1 else torch.cat(stacks)

    def polar_factor(X: Tensor) -> Tensor:
        return polar(
            X,
            group["polar_method"],
            schedule=group["schedule"],
            steps=group["steps"],
            compute_dtype=group["compute_dtype"],
            kernels=group["kernels"],
        )

    U = rule(stack, polar=polar_factor)
    yield slice(None), [view.from_matrices(part, shape) for part in U.split(len(stacks[0]))]


def _wide(M: Tensor) -> Tensor:
    return M if M.dtype == torch.float64 else M.float()


def _apply(group: dict[str, Any], batch: list[Section], rows: slice, updates: list[Tensor], finite: Tensor) -> None:
    """Phase 3: `W <- (1 − ηλ)W − η·s·U`, on these rows of the fp32 master."""
    lr = group["lr"] if batch[0].master.device.type == "cpu" else group["lr"] * finite
    decay = group["weight_decay"] * group["weight_decay_multiplier"]
    size = lr * scale_of(group, batch[0].view, tuple(batch[0].master.shape))
    for section, U in zip(batch, updates, strict=True):
        W = section.master[rows]
        if decay:
            W.mul_(1 - lr * decay)
        if isinstance(size, Tensor):
            W.addcmul_(U, size.to(U.dtype), value=-1)
        else:
            W.sub_(U, alpha=size)


@dataclass(frozen=True)
class Check:
    """One promise of one parameter's rule, and how far the last step's direction is from it."""

    name: str
    role: str
    rule: str
    promise: str
    departure: float

    @property
    def kept(self) -> bool:
        """Tell whether the departure is within the promise's bound."""
        return self.departure <= PROMISES[self.promise]

    def __str__(self) -> str:
        bound = PROMISES[self.promise]
        return f"{self.name} ({self.role}, {self.rule}): {self.promise} off by {self.departure:.2g}, bound {bound:g}"


class Verification(list[Check]):
    """The checks of `SymOptimizer.verify`, a list; printed, the worst of each role."""

    def __str__(self) -> str:
        worst: dict[tuple[str, str, str], float] = {}
        for check in self:
            key = (check.role, check.rule, check.promise)
            worst[key] = max(worst.get(key, 0.0), check.departure)
        return "\n".join(
            f"{role:16} {rule:20} {promise:18} off by at most {departure:.1e} (bound {PROMISES[promise]:g})"
            for (role, rule, promise), departure in worst.items()
        )


def _departures(group: dict[str, Any], rule: Rule, momentum: Tensor, matrices: int) -> dict[str, float]:
    worst: dict[str, float] = {}
    for view, M in MatrixView.parse(group["view"]).sections(momentum):
        U = torch.cat([part for _, (part,) in directions(group, view, [M])])
        stacks = [view.to_matrices(_wide(tensor))[:matrices] for tensor in (M, U)]
        for promise, departure in rule.departures(*stacks).items():
            worst[promise] = max(worst.get(promise, 0.0), departure)
    return worst


def scale_of(group: dict[str, Any], view: MatrixView, shape: tuple[int, ...]) -> float:
    """Return the scale s of a stored shape: a route's view tells which side of its matrices the outputs are."""
    _, m, n = view.shape(shape)
    outputs, inputs = (n, m) if group["outputs"] == "columns" else (m, n)
    return SCALES[group["scale"]](outputs, inputs)


def _adamw_step(group: dict[str, Any], members: list[Member], finite: Tensor) -> None:
    """Run torch's own fused AdamW on the group; `found_inf` masks the step on a device."""
    members = [member for member in members if member.parameter.numel()]
    if not members:
        return
    on_cpu = members[0].master.device.type == "cpu"
    adamw(
        [member.master for member in members],
        [member.gradient.to(member.master.dtype) for member in members],
        [member.state["exp_avg"] for member in members],
        [member.state["exp_avg_sq"] for member in members],
        [],
        [member.state["step"] for member in members],
        fused=True,
        found_inf=None if on_cpu else (~finite).float(),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"] * group["weight_decay_multiplier"],
        eps=group["eps"],
        maximize=False,
    )
    for member in members:
        _store(group, member, finite)


def _store(group: dict[str, Any], member: Member, finite: Tensor) -> None:
    """Write a low-precision parameter back from its fp32 master; nothing to do where the two are one."""
    p, master = member.parameter, member.master
    if master is p:
        return
    if "compensation" in member.state:
        rounded = master.to(p.dtype)
        member.state["compensation"].copy_(master - rounded.float())
    else:
        rounded = stochastic_round(master, crc32(f"{group['step']} {member.name}".encode()))
    p.copy_(rounded if p.device.type == "cpu" else torch.where(finite, rounded, p))


def stochastic_round(x: Tensor, seed: int) -> Tensor:
    """Round fp32 to bf16, up or down with the probability that makes the mean exact.

    A bf16 is the upper half of an fp32, so 16 random bits are added below and the lower half is cut. Infinities and
    NaN pass unchanged. Shapes: any -> same. Source: Zamirai et al., arXiv 2010.06192, section 4.
    """
    generator = torch.Generator(device=x.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits = (x.contiguous().view(torch.int32) + noise) & -65536
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)
