"""SymOptimizer: one `torch.optim.Optimizer` in which every role is updated by its own rule."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from types import MappingProxyType
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from symlm.distributed.collectives import check_agreement, world_size
from symlm.distributed.layout import layout_of
from symlm.distributed.partitions import Fragment, fragments_of, is_partition, refuse_settings
from symlm.distributed.tensors import aligned, local
from symlm.roles.role import whole_shape
from symlm.routing.options import DEFAULTS, ROUTED, UNCOMPARED, check_group, key_of, named_parameters, refuse_unknown
from symlm.routing.param_groups import param_groups
from symlm.rules import get_rule
from symlm.step.bucket import Bucket, overlapped
from symlm.step.directions import shares_layer_rotation
from symlm.step.gradients import examine
from symlm.step.layer_rotations import rotate_layers
from symlm.step.member import Member, batches, member_of
from symlm.step.state import new_state, of_fragments
from symlm.update.adamw import adamw_step
from symlm.update.apply import apply
from symlm.update.rounding import store
from symlm.update.size import UpdateSize
from symlm.verification import Verification, verified
from symlm.views.matrix_view import MatrixView

log = logging.getLogger("symlm")


class SymOptimizer(torch.optim.Optimizer):
    """Update every parameter by the rule of its role: `M <- βM + (1−β)G`, `W <- (1 − ηλ)W − η·s·U(M)`.

    params: a model; or the output of `symlm.param_groups(model, ...)`, which then holds rates, preset and overrides.
    lr, preset, overrides, roles: as in `symlm.param_groups`.
    options: defaults of every group, which `overrides` may set by role:
        momentum β (0.95; 0.7 to 0.95 in the default table, by role); nesterov: U((1−β)G + βM) instead (False; True in
        the default table); weight_decay λ (0.0);
        momentum_of: "gradients", or "directions": `M <- βM + (1−β)s·U(G)`, `W <- W − ηM` (PolarGrad's polar-first);
        betas, eps: AdamW's, for roles routed to it; β₂ is also that of `row_adam` and `aro_adam`;
        polar_method, schedule, steps, compute_dtype, kernels: see `symlm.polar`;
        momentum_dtype: "float32", or "bfloat16" to save memory;
        rounding: how a bf16 parameter without an fp32 master is stored, "stochastic" or "compensated";
        nonfinite: "skip" a step whose gradients are not finite (counted in `skipped_steps`), or "raise";
        rotation: of ARO's rules, "own" for one a matrix, or "layer" for one that all matrices of a layer turn together;
        shared: whether plain tensors are the same on all ranks, which then share the work (True).

    Gradient clipping is not felt by rules of degree 0; the update itself is never clipped.

    Raises: ValueError for lr <= 0, unknown names and settings of DeepSpeed that would not run this; TypeError for a
    list of parameters without roles.
    Source: arXiv 2605.18106, section 3.
    """

    # Of the class, since a pickled optimizer comes back without what its constructor set.
    _agreed: frozenset[tuple[str, str]] = frozenset()
    _fragments: Mapping[Tensor, list[Fragment]] = MappingProxyType({})
    update_size: UpdateSize | None = None  # of the last step; None before one and after one that was skipped
    _originals: Mapping[str, ReferenceType[nn.Parameter]] = MappingProxyType({})

    def __init__(
        self,
        params: nn.Module | Iterable[dict[str, Any]],
        lr: float | Tensor = 0.02,
        preset: str = "default",
        overrides: dict[str, dict[str, Any]] | None = None,
        roles: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        refuse_settings()
        for key in options:
            refuse_unknown("option", key, DEFAULTS)
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
        if not isinstance(param_group, dict) or any(key not in param_group for key in ROUTED):
            raise TypeError(
                "SymOptimizer needs to know what each parameter is: pass the model, or symlm.param_groups(model)"
            )
        super().add_param_group(param_group)
        check_group(self.param_groups[-1])
        for _, p in named_parameters(self.param_groups[-1]):
            MatrixView.parse(self.param_groups[-1]["view"]).shape(whole_shape(p))
        # Weak, for wrappers that put other tensors in a parameter's place: FSDP2 to free it, ZeRO to point back at it.
        self._originals = {**self._originals, **{name: ref(p) for name, p in named_parameters(self.param_groups[-1])}}

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
        self._originals = {name: weak for name, weak in self._originals.items() if weak() is not None}
        is_first = self._check_agreement()
        self._create_state()
        members = [(group, list(self._members(group))) for group in self.param_groups]
        finite = self._examine(members)
        if finite is None:
            self.update_size = None
            return loss
        size = self.update_size = self.update_size or UpdateSize()
        buckets: list[Bucket] = []
        loads: dict[Any, list[float]] = {}
        for group, own in members:
            group["step"] = group.get("step", 0) + (1 if group["params"] else 0)
            self._count_step(group, finite)
            if get_rule(group["rule"]).elementwise:
                adamw_step(group, own, finite)
                if own:
                    stepped = [p for p in group["params"] if p.grad is not None]
                    size.of_adamw(group, [(self.state[p], self._held(p)) for p in stepped])
                continue
            for batch in batches(own):
                world = batch[0].layout.size
                buckets.append(Bucket(group, batch, loads.setdefault(world, [0.0] * prod(world)), finite))
        if is_first and (exchanges := [bucket.exchange for bucket in buckets if bucket.exchange]):
            received = sum(exchange.bytes_to_receive(4) for exchange in exchanges)
            log.info("a step brings this rank %.1f MB from others, in %d buckets", received / 1e6, len(exchanges))
        rotate_layers([bucket for bucket in buckets if shares_layer_rotation(bucket.group)], finite)
        size.begin([bucket.group for bucket in buckets if not bucket.fused], finite.device)
        for bucket in overlapped(buckets):
            for updated, rows, updates in bucket.updates():
                squares = apply(bucket.group, updated, rows, updates, bucket.finite)
                size.add(bucket.group, squares, sum(U.numel() for U in updates))
            for member in bucket.batch:
                store(bucket.group, member, bucket.finite)
        return loss

    @torch.no_grad()
    def verify(self, matrices: int = 4) -> Verification:
        """Check that every route's rule really ran, from what the last step left: no step is made, nothing changes.

        Directions are computed again from the momenta, and held to what their rules promise: unit rows, zero column
        sums, singular values near 1 (`symlm.verification.PROMISES`). matrices: how many of a parameter are looked at.

        Returns the checks, a table when printed. Raises: RuntimeError, naming what no step has reached and what
        broke its promise.
        """
        if self._fragments:
            raise RuntimeError("verify() reads whole momenta, which ZeRO keeps nowhere; verify a run of one process")
        return verified(self.param_groups, self.state, matrices)

    @property
    def is_cut(self) -> bool:
        """Tell whether this rank holds parts of parameters."""
        cut = (local(p) is not p for group in self.param_groups for p in group["params"])
        return bool(self._fragments) or any(cut)

    def _held(self, p: Tensor) -> int:
        """Return how many entries of a parameter are on this rank, without padding."""
        parts = self._fragments.get(p)
        return sum(part.stop - part.start for part in parts) if parts else local(p).numel()

    def _create_state(self) -> None:
        """Give every parameter its state at once, so that all ranks and checkpoints agree on the keys."""
        for group in self.param_groups:
            for name, p in named_parameters(group):
                if not self.state.get(p):
                    self.state[p] = new_state(group, name, p, self._fragments_of(group, p))

    def _check_agreement(self) -> bool:
        """At a group's first step, make sure that all ranks have one plan; tell whether there was such a group."""
        groups = [group for group in self.param_groups if group["params"] and key_of(group) not in self._agreed]
        if not groups:
            return False
        lines = [
            f"{name} {shape} {missing} {settings}"
            for group in groups
            for settings in [" ".join(f"{key}={_plain(group[key])}" for key in sorted(group) if key not in UNCOMPARED)]
            for name, shape, missing in self._shapes(group)
        ]
        check_agreement("\n".join(lines), local(groups[0]["params"][0]).device)
        self._agreed |= {key_of(group) for group in groups}
        return True

    def _shapes(self, group: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Yield name, whole shape and whether the gradient is missing of what the ranks must agree on.

        Raises: RuntimeError for a parameter that a wrapper cut in a way that nobody can read back.
        """
        axes = MatrixView.parse(group["view"]).axes
        for name, p in named_parameters(group):
            if fragments := self._fragments_of(group, p):
                yield from ((fragment.name, fragment.layout.shape, p.grad is None) for fragment in fragments)
            elif p.ndim != axes:
                raise RuntimeError(
                    f"{name} has {p.ndim} axes in the step and had {axes} at construction: a wrapper that is none of "
                    "DDP, FSDP2 and DeepSpeed cut it flat; FSDP1 is one, use FSDP2 (fsdp_version: 2)"
                )
            elif group["shared"] or local(p) is not p:
                yield name, tuple(p.shape), p.grad is None

    def _fragments_of(self, group: dict[str, Any], p: Tensor) -> list[Fragment]:
        """Return what a partition of ZeRO's holds, looked up once; nothing for a parameter that is its own."""
        if p in self._fragments:
            return self._fragments[p]
        found = ((name, self._originals.get(name, lambda: None)()) for name in group.get("param_names", ()))
        named = ((name, original) for name, original in found if original is not None)
        first = next(named, None)
        if first is None or not is_partition(p, first[1]):
            return []
        self._fragments = {**self._fragments, p: fragments_of(p, [first, *named])}
        return self._fragments[p]

    def _examine(self, members: list[tuple[dict[str, Any], list[Member]]]) -> Tensor | None:
        """Return whether all gradients are finite, as a tensor on their device; None if the step ends here.

        On a CPU the answer is read, since reading costs nothing there; on a GPU the step goes on and masks itself.
        """
        every = [(group, member) for group, own in members for member in own]
        if not every:
            return None
        several = [group for group in self.param_groups if _skips_without_gradient(group)] if world_size() > 1 else []
        common = {name: shape for group in several for name, shape, _ in self._shapes(group)}
        finite = examine(
            [member for _, member in every], [_skips_without_gradient(group) for group, _ in every], common
        )
        if self.defaults["nonfinite"] == "raise" and not finite:
            bad = [member.name for _, member in every if not member.gradient.isfinite().all()]
            raise FloatingPointError(f"non-finite gradients in {bad or 'other ranks'}; nothing was updated")
        skipped = torch.as_tensor(self.param_groups[0].get("skipped", 0), dtype=torch.int64, device=finite.device)
        self.param_groups[0]["skipped"] = skipped.add_(~finite)  # in place: a captured step counts on in a replay
        return None if finite.device.type == "cpu" and not finite else finite

    def _count_step(self, group: dict[str, Any], finite: Tensor) -> None:
        """Count the step in the state of rules that have one; torch's AdamW counts its own."""
        for p in group["params"] if get_rule(group["rule"]).state else ():
            if p.grad is not None:
                self.state[p]["step"].add_(finite.to(self.state[p]["step"].device))

    def _members(self, group: dict[str, Any]) -> Iterator[Member]:
        for name, p in named_parameters(group):
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError(f"{name} has a sparse gradient; build its nn.Embedding with sparse=False")
            fragments = self._fragments_of(group, p)
            if not fragments or get_rule(group["rule"]).elementwise:  # a partition is as good as its parts
                yield member_of(name, p, aligned(p.grad, p), self.state[p], layout_of(p, group["shared"]))
                continue
            states = of_fragments(group, self.state[p], fragments)
            for fragment, state in zip(fragments, states, strict=True):
                yield member_of(fragment.name, fragment.of(p.detach()), fragment.of(p.grad), state, fragment.layout)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep each state's own dtype: a bf16 parameter's fp32 momentum stays fp32.

        Raises: ValueError, before anything changed, for what is no state of a SymOptimizer's, for parameters in another
        order and for other shapes.
        """
        saved = {index: p for index, _, p in self._matched(state_dict["param_groups"])}
        for index, p in saved.items():
            for key in ("momentum", "exp_avg"):
                value = state_dict["state"].get(index, {}).get(key)
                if value is not None and value.shape != p.shape:
                    raise ValueError(f"parameter {index}: its {key} is {list(value.shape)}, it is {list(p.shape)}")
        groups = [{**DEFAULTS, **group} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        self.update_size = None  # which would hold the states before
        for index, p in saved.items():
            for key, value in state_dict["state"].get(index, {}).items():
                own = self.state[p][key]  # torch leaves a count of steps where the file was read to
                if isinstance(value, Tensor) and (value.dtype != own.dtype or own.device != p.device):
                    self.state[p][key] = value.to(device=p.device, copy=True)
        for group in self.param_groups:
            check_group(group)

    def _matched(self, saved: list[dict[str, Any]]) -> Iterator[tuple[int, str, nn.Parameter]]:
        """Yield each saved index with our parameter.  Raises: ValueError where the groups are not ours."""
        for group in saved:
            if missing := [key for key in ROUTED if key not in group]:
                raise ValueError(f"this is no state of a SymOptimizer: a group of it has no {missing[0]!r}")
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("the state has other groups than this optimizer: load it with the model that it is of")
        for theirs, ours in zip(saved, self.param_groups, strict=True):
            names = theirs.get("param_names", []), ours.get("param_names", [])
            if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
                raise ValueError(f"the state has its parameters in another order: {names[0]}, here {names[1]}")
            if (route := [theirs[key] for key in ("rule", "view")]) != [ours["rule"], ours["view"]]:
                log.warning("group %s goes on with the rule and view of its state, %s", ours["role"], route)
            for index, (name, p) in zip(theirs["params"], named_parameters(ours), strict=True):
                yield index, name, p


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value  # whose text would name the rank's device


def _skips_without_gradient(group: dict[str, Any]) -> bool:
    """Tell whether a group's matrices rest without a gradient: where the direction forgets the momentum's size."""
    rule = get_rule(group["rule"])
    return rule.row_map is None and not rule.elementwise and group["momentum_of"] == "gradients"
