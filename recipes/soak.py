"""A soak:  python recipes/soak.py  makes many steps of a tiny model, and looks at memory, time and the loss.

Resident memory and the time of a step are to stay flat; bf16 weights, rounded at random or with a compensation, are to
end where fp32 weights do, within what seeds differ by.
"""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from jsonargparse import CLI
from pretraining.folder import origin
from scipy.stats import linregress, t
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import symlm

ARMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16, stochastic rounding": (torch.bfloat16, {"rounding": "stochastic"}),
    "bf16, compensation": (torch.bfloat16, {"rounding": "compensated"}),
}
TOKENS, WIDTH, BATCH = 64, 32, 64
WARM_UP = 1000  # steps before memory and time are looked at


class Bigram(nn.Module):
    """The next token of one token, by an MLP between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(TOKENS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        return self.lm_head(h + self.down(self.up(self.norm(h)).relu()))


def text(seed: int) -> Tensor:
    """Return the probabilities of the next token, (TOKENS, TOKENS), the same for all arms of a seed."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(TOKENS, TOKENS, generator=generator)).softmax(-1)


def soak(arm: str, steps: int, seed: int) -> dict[str, Any]:
    """Train one model and return what it shows.

    Returns: `loss` over the last tenth of the run, above the text's entropy; `bytes_a_step`, the slope of resident
        memory behind the warm-up; `seconds`, the median of the processor's for a step, in each tenth of the run.
    """
    dtype, options = ARMS[arm]
    torch.manual_seed(seed)
    P, model = text(seed), Bigram().to(dtype)
    entropy = torch.special.entr(P).sum(-1)
    optimizer = symlm.SymOptimizer(model, lr=0.01, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, 2 * (1 - k / steps)))
    generator, process = torch.Generator().manual_seed(seed), psutil.Process()
    seconds, sizes, losses = [], [], []
    for step in tqdm(range(steps), desc=f"{arm}, seed {seed}", disable=None):
        x = torch.randint(TOKENS, (BATCH,), generator=generator)
        began = time.thread_time()
        optimizer.zero_grad()
        loss = -(P[x] * model(x).float().log_softmax(-1)).sum(-1).mean() - entropy[x].mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds.append(time.thread_time() - began)
        if step >= 0.9 * steps:
            losses.append(loss.item())
        if step % 50 == 0:
            sizes.append((step, process.memory_info().rss))
    behind = [pair for pair in sizes if pair[0] >= min(WARM_UP, steps // 2)]
    tenths = [round(k * steps / 10) for k in range(11)]
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "loss": sum(losses) / len(losses),
        "bytes_a_step": linregress(*zip(*behind, strict=True)).slope,
        "seconds": [sorted(seconds[a:b])[(b - a) // 2] for a, b in pairwise(tenths)],
    }


def interval(losses: list[float]) -> str:
    """Return the mean of several seeds' losses with its 95 % interval."""
    x = torch.tensor(losses, dtype=torch.float64)
    half = t.ppf(0.975, len(x) - 1) * x.std().item() / len(x) ** 0.5 if len(x) > 1 else float("nan")
    return f"{x.mean():.5f} ± {half:.5f}"


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each arm."""
    rows = []
    for arm in dict.fromkeys(record["arm"] for record in records):
        runs = [record for record in records if record["arm"] == arm]
        rows.append(
            {
                "weights": arm,
                "runs": len(runs),
                "steps": runs[0]["steps"],
                "memory, bytes a step": ", ".join(f"{run['bytes_a_step']:+.0f}" for run in runs),
                "processor's ms a step, second tenth": ", ".join(f"{1e3 * run['seconds'][1]:.2f}" for run in runs),
                "last tenth": ", ".join(f"{1e3 * run['seconds'][-1]:.2f}" for run in runs),
                "loss above the entropy": interval([run["loss"] for run in runs]),
            }
        )
    return tabulate(rows, headers="keys", tablefmt="github")


def main(steps: int = 20_000, seeds: tuple[int, ...] = (0, 1, 2), out: Path = Path("runs/soak.json")) -> None:
    """Soak every arm with every seed, and print the table.

    Args:
        steps: of each run, 60 or more.
        seeds: one run of each arm for each.
        out: the file of records, written behind every run; one that is there is gone on with.
    """
    if steps < 60:
        raise SystemExit(f"a soak needs 60 steps or more for its slopes; got {steps}")
    records = json.loads(out.read_text())["runs"] if out.exists() else []
    done = {(record["arm"], record["seed"], record["steps"]) for record in records}
    out.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for arm in ARMS:
            if (arm, seed, steps) not in done:
                records.append(soak(arm, steps, seed))
                out.write_text(json.dumps({**origin(), "runs": records}, indent=1))
    print(table(records))


if __name__ == "__main__":
    CLI(main, as_positional=False)
