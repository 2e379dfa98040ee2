"""SymOptimizer: one `torch.optim.Optimizer` in which every role is updated by its own rule."""

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from symlm.distributed.partitions import refuse_settings
from symlm.distributed.tensors import local
from symlm.polar.precision import without_autocast
from symlm.routing.options import DEFAULTS, ROUTED, check_group, refuse_unknown, with_momentum, with_rate
from symlm.routing.param_groups import param_groups
from symlm.routing.values import check_options, check_values
from symlm.rules import get_rule
from symlm.state.agreement import Agreement, shapes_of_several_ranks
from symlm.state.checks import check_parameters, warn_of_no_gradient
from symlm.state.creation import count_step, create_state
from symlm.state.loading import FORMAT, fitting, matched, refuse_other_than_mapping, restore_dtypes
from symlm.state.originals import Originals
from symlm.state.schedules import Schedules
from symlm.step.buckets import buckets_of, bytes_to_receive, join, overlapped
from symlm.step.directions import shares_layer_rotation
from symlm.step.gradients import examine, refuse_nonfinite, skips_without_gradient
from symlm.step.layer_rotations import rotate_layers
from symlm.step.member import Member, members_of
from symlm.update.adamw import adamw_step
from symlm.update.rounding import set_clocks
from symlm.update.size import UpdateSize
from symlm.update.spectral_decay import refuse_cut
from symlm.update.whole_buckets import update
from symlm.verification import Verification, verified

log = logging.getLogger("symlm")


class SymOptimizer(torch.optim.Optimizer):
    """Update every parameter by the rule of its role: `M <- βM + (1−β)G`, `W <- (1 − ηλ)W − η·s·U(M)`.

    Gradient clipping weighs a step inside the momentum; the update itself is never clipped.

    Args:
        params: A model; or the output of `symlm.param_groups(model, ...)`, which then holds rates and overrides.
        lr: The one dial η; every role's rate is a multiple of it.
        preset: The table's name, see `symlm.PRESETS`.
        overrides: Absolute values by role, `{"lm_head": {"lr": 5e-3}}`.
        roles: Ordered `{pattern: role}` for parameters whose role the structure does not show.
        options: Defaults of every group, which `overrides` may set by role:

            - `momentum` β (0.95; by role in the default table); `nesterov`: `U((1−β)G + βM)` instead; `weight_decay` λ;
            - `momentum_warmup`: over how many steps β grows from 0.85 (0); not AdamW's β₁;
            - `momentum_of`: "gradients", or "directions": `M <- βM + (1−β)s·U(G)`, `W <- W − ηM`, of PolarGrad times ν;
            - `betas`, `eps`: AdamW's, for roles routed to it; β₂ is also that of `row_adam` and `aro_adam`;
            - `polar_method`, `schedule`, `steps`, `compute_dtype`, `kernels`: see `symlm.polar.polar`;
            - `momentum_dtype`: "float32", or "bfloat16" or "int8" (blocks of 64 with a scale) to save memory;
            - `rounding`: how a bf16 parameter without an fp32 master is stored, "stochastic" or "compensated";
            - `nonfinite`: "skip" a step whose gradients are not finite (counted in `skipped_steps`), or "raise";
            - `gram_every`: every how many steps a whitened rule (the default head's) computes a Gram matrix (1);
            - `rotation`: of ARO's rules, "own" for one a matrix, or "layer" for one that a layer's matrices share;
            - `constraint` (by role in the table), `floor` of "relative" (0.57): see `symlm.sizes.constraints`;
            - `gamma`, `retained`: AuON's γ, and ARO's ε of the old rotation (0 in the source); None for the rule's own;
            - `shared`: whether plain tensors are replicated on all ranks, which then share the work (True).

    Raises:
        ValueError: lr <= 0, unknown names, values of the wrong type, or a DeepSpeed setting that would not run this.
        TypeError: A list of parameters without roles.

    Source:
        arXiv 2605.18106, section 3.
    """

    # Of the class, since a pickled optimizer comes back without what its constructor set.
    _moved: Collection[Tensor] | None = None  # those with a gradient in the last step; None where nobody knows
    _warned = False
    update_size: UpdateSize | None = None  # of the last step; None before one and after one that was skipped

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
        self._originals, self._schedules, self._agreement = Originals(), Schedules(), Agreement()
        for key in options:
            refuse_unknown("option", key, DEFAULTS)
        if isinstance(params, nn.Module):
            params = param_groups(params, lr, preset, overrides, roles)
            for group in params:
                for key in set(options) - set((overrides or {}).get(group["role"], ())):
                    group.pop(key, None)  # an argument comes before what the preset would have
        elif preset != "default" or overrides or roles:
            raise ValueError("preset, overrides and roles belong to symlm.param_groups when groups are given")
        check_values("SymOptimizer", {"lr": lr, **options})
        super().__init__(params, {"lr": lr, **DEFAULTS, **options})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_originals", Originals())
        self.__dict__.setdefault("_agreement", Agreement())
        self.__dict__.setdefault("_schedules", Schedules()).remember(self.param_groups, self.defaults["lr"])
        if "_loading" in self.__dict__:  # before torch calls the hooks that come after a load
            restore_dtypes(self.state, self._loading["state"], self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group made by `symlm.param_groups`.

        Raises:
            TypeError: The group has no route.
            ValueError: The group has values that no step can use.
        """
        if not isinstance(param_group, dict) or any(key not in param_group for key in ROUTED):
            raise TypeError(
                "SymOptimizer needs to know what each parameter is: pass the model, or symlm.param_groups(model)"
            )
        self._originals.register(getattr(param_group["params"], "holders", ()))
        super().add_param_group(param_group)
        check_group(self.param_groups[-1])
        self._schedules.remember(self.param_groups, self.defaults["lr"])

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped for non-finite gradients (reads the device); under DeepSpeed of all groups."""
        return sum(int(group.get("skipped", 0)) for group in self.param_groups)

    def count_skipped_step(self) -> None:
        """Count a step that DeepSpeed or a loss scaler skipped by itself, which `step` never learns of."""
        self.param_groups[0]["skipped"] = torch.as_tensor(self.param_groups[0].get("skipped", 0)).add_(1)
        self.update_size, self._moved = None, frozenset()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Do one step, in three phases for each batch of equal shapes: momentum, direction, update.

        Args:
            closure: Computes the loss again, with gradients, and returns it.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: A gradient is sparse, or a parameter changed its dtype or shape. Nothing was updated.
            FloatingPointError: A gradient is not finite and `nonfinite="raise"`. Nothing was updated.
        """
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg="a step is Python's choices around few launches: it runs as it is")
            return torch.compiler.disable(type(self).step)(self, closure)
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        with without_autocast():
            self._step()
        return loss

    def _step(self) -> None:
        for group in self.param_groups:
            check_options(group)
        self._schedules.follow(self.param_groups, self.defaults["lr"])
        is_first = self._agreement.compare(self.param_groups, self._originals)
        for group in self.param_groups:
            create_state(group, self.state, self._originals)
            check_parameters(group, self.state)
        members = [(group, list(members_of(group, self.state, self._originals))) for group in self.param_groups]
        for group, some in members:
            refuse_cut(group, some)
        if (finite := self._examine(members)) is None:
            self.update_size, self._moved = None, frozenset()
            return
        self._moved = {p for group in self.param_groups for p in group["params"] if p.grad is not None}
        size = self.update_size = self.update_size or UpdateSize()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + (1 if group["params"] else 0)
            count_step(group, self.state, finite)
        set_clocks([member for _, some in members for member in some], self.state, finite)
        members = [(with_momentum(group), some) for group, some in members]
        for group, some in members:
            if get_rule(group["rule"]).elementwise and some:
                adamw_step(with_rate(group), some, finite)
                size.of_adamw(with_rate(group), self.state, self._originals)
        buckets = buckets_of(members, finite)
        if is_first and (received := bytes_to_receive(buckets)):
            log.info("a step brings this rank %.1f MB from others, in %d buckets", received / 1e6, len(buckets))
        rotate_layers([bucket for bucket in buckets if shares_layer_rotation(bucket.group)], finite)
        join(buckets)
        size.begin([bucket.group for bucket in buckets])
        for bucket in overlapped(buckets):  # phase 1, momentum, and phase 2, directions
            update(bucket, size)  # phase 3

    @torch.no_grad()
    def verify(self, matrices: int = 4) -> Verification:
        """Check that every route's rule really ran, from what the last step left. No step is made, nothing changes.

        Directions are computed again from the momenta and compared to `symlm.verification.PROMISES`.

        Args:
            matrices: How many matrices of a parameter are checked.

        Returns:
            The checks, a table when printed.

        Raises:
            RuntimeError: Names the parameters that got no update, and those whose direction breaks its promise.
        """
        if self._originals.partitioned:
            raise RuntimeError("verify() reads whole momenta, which ZeRO stores nowhere; verify a run of one process")
        with without_autocast():
            return verified(self.param_groups, self.state, matrices, self._moved)

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds parts of parameters."""
        return self._originals.partitioned or any(local(p) is not p for g in self.param_groups for p in g["params"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data and tensors, with its format's number."""
        return {**super().state_dict(), "format": FORMAT}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Load a state by the parameters' names; each state keeps its own dtype: fp32 momentum stays fp32.

        Args:
            state_dict: What `state_dict()` of an optimizer with the same table returned; its rates come with it.
            strict: False takes what fits of another table's or model's state, warns of the rest, and leaves the groups.

        Raises:
            ValueError: Before anything changed: another table, other parameters or shapes, or an incomplete state.
        """

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            self._loading = (matched if strict else fitting)(given, self.param_groups)
            return self._loading

        refuse_other_than_mapping(state_dict)  # which torch copies before it calls hooks
        hook = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
            self.update_size = self._moved = None  # which would hold the states before
        finally:
            hook.remove()
            self.__dict__.pop("_loading", None)

    def _examine(self, members: list[tuple[dict[str, Any], list[Member]]]) -> Tensor | None:
        """Return whether all gradients are finite, as a tensor on their device; None if the step ends here.

        On a CPU the answer is read, since reading costs nothing there; on a GPU the step goes on and masks itself.
        """
        pairs = [(group, member) for group, some in members for member in some]
        if not pairs:
            self._warned = self._warned or warn_of_no_gradient(self.param_groups)
            return None
        skippable = [group for group in self.param_groups if skips_without_gradient(group)]
        finite = examine(pairs, shapes_of_several_ranks(skippable, self._originals))
        if self.defaults["nonfinite"] == "raise":
            refuse_nonfinite([member for _, member in pairs], finite)
        skipped = torch.as_tensor(self.param_groups[0].get("skipped", 0), dtype=torch.int64, device=finite.device)
        self.param_groups[0]["skipped"] = skipped.add_(~finite)  # in place: a captured step counts on in a replay
        return None if finite.device.type == "cpu" and not finite else finite
