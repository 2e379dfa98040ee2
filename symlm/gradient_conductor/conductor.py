"""The conductor: one backward pass a loss, one gradient for the optimizer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from symlm.gradient_conductor.conflicts import Arbiter, Arbitration, Conflict
from symlm.gradient_conductor.rows import Rows, places_of


@dataclass(frozen=True)
class Report:
    """Report one step.

    Args:
        finite: Whether all gradients were finite; if not, nothing was written.
        norms: The norm of each loss's gradient, before the cap.
        cosine: The lowest cosine of two gradients; 1 if fewer than two are nonzero.
        conflicts: The conflicts in the order in which they were resolved.
    """

    finite: bool
    norms: dict[str, float]
    cosine: float
    conflicts: tuple[Conflict, ...]


class GradientConductor:
    """Give the optimizer the sum of several losses' gradients with their conflicts removed, as `p.grad`.

    `backward` accumulates each loss's gradient apart; `step` resolves conflicts between them (see `Arbitration`), and
    writes `Σ_k g_k`, or its mean `m <- βm + (1−β) Σ_k g_k` over `1 − β^t`. Where nothing conflicts and β = 0 it is the
    gradient of the plain sum. All that is used of the gradients are their inner products: the conductor commutes with
    any orthogonal map of the flat gradient, and the order of the losses does not matter but for ties.

    It stores two rows a loss of the trainable parameters' size, one more with momentum, and costs a backward pass a
    loss, a pass over the rows, and one exchange of small numbers and one read of the device a step.

    Under DDP it reduces in the model's place, once a step; FSDP2 reduces in each backward pass.
    Inner products are of whole gradients, summed over the ranks, and all ranks resolve alike.

    Args:
        model: The model, as the training loop calls it: wrap it before, since wrappers replace parameters.
        losses: The names of the losses, two or more.
        rules: How conflicts are resolved.
        momentum: β of the mean; the source has 0.85, before an optimizer that has none.
        dtype: The dtype of the rows; the source has bfloat16. None is the parameters', at least fp32.

    Raises:
        ValueError: Fewer than two losses, a name that is there twice, a momentum out of [0, 1), a dtype that no row
            has, or a model without a trainable parameter.

    Source:
        Limarenko et al., arXiv 2509.07252.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Sequence[str],
        rules: Arbitration | None = None,
        momentum: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        names = list(losses) if isinstance(losses, Sequence) and not isinstance(losses, str) else []
        if len(names) < 2 or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"a conductor needs the names of two losses or more, each once, got {losses!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"0 <= momentum < 1 for a conductor, got {momentum}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"a conductor's rows have a floating-point dtype such as torch.bfloat16, got {dtype!r}")
        self.model, self.losses, self.beta, self.dtype = model, tuple(losses), momentum, dtype
        self.last: Report | None = None
        self.skipped_steps = 0
        self._arbiter = Arbiter(len(losses), rules or Arbitration())
        self._places = places_of(model)
        self._rows: Rows | None = None
        self._steps = 0
        modules: Iterable[Any] = model.modules()
        for wrapper in (module for module in modules if hasattr(module, "require_backward_grad_sync")):
            wrapper.require_backward_grad_sync = False  # DDP's

    def backward(
        self,
        losses: Mapping[str, Tensor],
        run: Callable[..., Any] = Tensor.backward,
        output: Tensor | None = None,
    ) -> None:
        """Run a backward pass for each loss, and add its gradients to those that it has already in this step.

        All losses of one forward pass, or one loss of each micro-batch ("stochastic": as cheap as one loss). As in
        torch, gradients are summed: divide by the number of passes that a loss gets. What is in `p.grad` before is
        dropped.

        Args:
            losses: The losses by name; those of one call may share their graph.
            run: Runs a backward pass, called as `run(loss, retain_graph=...)`; accelerate's is `accelerator.backward`.
            output: A scalar of the model's output, the losses' sum if None. FSDP2 gathers weights where a backward pass
                comes by a module's output, so that there zero times this is added to each loss.

        Raises:
            ValueError: A name that the conductor was not given, or a loss that is no scalar with a graph.
            RuntimeError: A loss reaches no trainable parameter.
        """
        if unknown := [name for name in losses if name not in self.losses]:
            raise ValueError(f"unknown losses {unknown}; the conductor was given {list(self.losses)}")
        for name, loss in losses.items():
            if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
                got = f"{[*loss.shape]}, requires_grad={loss.requires_grad}" if isinstance(loss, Tensor) else repr(loss)
                raise ValueError(f"the loss {name!r} must be one number with a graph for its backward pass, got {got}")
        rows = self._made()
        sharded: list[Any] = [x for x in self.model.modules() if hasattr(x, "set_requires_gradient_sync")]
        if sharded:
            path = 0.0 * (sum(losses.values()) if output is None else output)
            losses = {name: loss + path for name, loss in losses.items()}
        for module in sharded:
            module.set_requires_gradient_sync(True, recurse=False)  # nobody could tell whose the ones that wait are
        for place in rows.places:
            place.parameter.grad = None
        for left, (name, loss) in zip(reversed(range(len(losses))), losses.items(), strict=True):
            run(loss, retain_graph=left > 0)
            if not rows.take(self.losses.index(name)):
                raise RuntimeError(
                    f"the loss {name!r} gave no parameter of the conductor a gradient: build the conductor after the "
                    "model is wrapped, and give it losses of this model"
                )

    def _made(self) -> Rows:
        """Return the rows, made at the first use, when the parameters are where they are trained."""
        if self._rows is None:
            self._rows = Rows(self._places, len(self.losses), self.beta > 0, self.dtype)
        return self._rows

    @torch.no_grad()
    def step(self) -> Report:
        """Resolve the conflicts of what was accumulated, and write the sum to `p.grad`. All ranks call this together.

        If a gradient is not finite on any rank, nothing is written, no state changes, and the step is counted in
        `skipped_steps`: skip the optimizer's step too.

        Returns:
            What happened, also in `last`.

        Raises:
            RuntimeError: A loss had no backward pass since the last step, or shares no parameter with any other.
        """
        rows = self._made()
        given = rows.reached.any(1).tolist()
        if missing := [name for name, has in zip(self.losses, given, strict=True) if not has]:
            raise RuntimeError(f"the losses {missing} had no backward pass since the last step of the conductor")
        rows.average()
        products, reached = rows.examine()
        rows.reached.zero_()
        self._refuse_strangers(reached)
        K = len(self.losses)
        norms = dict(zip(self.losses, products.diagonal()[:K].sqrt().tolist(), strict=True))
        if not products[:K, :K].isfinite().all():
            self.skipped_steps += 1
            self.last = Report(False, norms, float("nan"), ())
            return self.last
        weights, found = self._arbiter.judge(products)
        total = rows.combined(weights)
        self._steps += 1
        if self.beta:
            rows.mean.lerp_(total.to(rows.mean.dtype), 1 - self.beta)
            total = rows.mean / (1 - self.beta**self._steps)
        rows.write(total, reached.any(0).tolist())
        conflicts = tuple(Conflict(self.losses[w], self.losses[lost], cosine) for w, lost, cosine in found)
        self.last = Report(True, norms, _lowest_cosine(products[:K, :K]), conflicts)
        return self.last

    def _refuse_strangers(self, reached: Tensor) -> None:
        """Raise for a loss that shares no parameter with any other, with which it can have no conflict."""
        shared = (reached.int() @ reached.int().T).fill_diagonal_(0).sum(1)
        if alone := [name for name, count in zip(self.losses, shared.tolist(), strict=True) if not count]:
            raise RuntimeError(f"the losses {alone} share no parameter with any other: add each to another loss")

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two steps, of plain data and whole tensors, which any number of ranks can load.

        All ranks call this together.

        Returns:
            The state.
        """
        gradients = self._rows.gather() if self._rows is not None and self._steps else []
        plain = {"losses": list(self.losses), "steps": self._steps, "skipped_steps": self.skipped_steps}
        return {**plain, **self._arbiter.state_dict(), "gradients": gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state; all ranks call this together.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: Before anything changed: the state is of other losses, another momentum or another model.
        """
        if list(state["losses"]) != list(self.losses):
            raise ValueError(f"the conductor's state is of the losses {state['losses']}, not of {list(self.losses)}")
        if state["gradients"]:
            self._made().load(state["gradients"])
        self._arbiter.load_state_dict(state)
        self._steps, self.skipped_steps = state["steps"], state["skipped_steps"]


def _lowest_cosine(products: Tensor) -> float:
    """Return the lowest cosine of two nonzero gradients; 1 if there are none."""
    sizes = products.diagonal().sqrt()
    scale = sizes[:, None] * sizes
    return float(torch.where(torch.triu(scale > 0, diagonal=1), products / scale, 1.0).min())
