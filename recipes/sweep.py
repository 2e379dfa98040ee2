"""Sweep the one dial over widths and depths, and draw loss against it:  python recipes/sweep.py --out runs/sweep

Each point is a run of pretrain.py in a process of its own; points that are finished are not run again. What follows
`--` goes to every run, for example `-- --train.steps=200 --optimizer.preset=adamw`.
"""

import json
import math
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from pretraining.folder import is_finished, read_metrics
from tqdm import tqdm

HEAD = 32


def train(out: Path, width: int, depth: int, lr: float, more: list[str]) -> float:
    """Return the final validation loss of one point."""
    name, heads = f"width{width}-depth{depth}-lr{lr:g}", width // HEAD
    folder = out / name
    sizes = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": HEAD,
    }
    fields = [f"--name={name}", f"--out={out}", f"--resume={json.dumps((folder / 'config.json').exists())}"]
    fields += [f"--model.sizes={json.dumps(sizes)}", f"--optimizer.lr={lr}", "--train.tracker=none", *more]
    if not is_finished(folder, fields):
        command = [sys.executable, str(Path(__file__).with_name("pretrain.py")), *fields]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and not (folder / "summary.json").exists():  # what blew up has one, and a loss that says so
            raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return read_metrics(folder)[-1]["val/loss"]


def best_of(points: dict[float, float]) -> float:
    """Return the rate of the lowest loss; one that blew up has none."""
    return min(points, key=lambda lr: (math.isnan(points[lr]), points[lr]))


def draw(losses: dict[tuple[int, int], dict[float, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, ((width, depth), points) in enumerate(sorted(losses.items())):
        rates = sorted(points)
        axes.plot(rates, [points[lr] for lr in rates], color=f"C{number}", label=f"width {width}, depth {depth}")
        best = best_of(points)
        axes.plot(best, points[best], marker="o", color=f"C{number}")
    axes.set(xscale="log", xlabel="lr", ylabel="validation loss", title="loss against the one dial (best marked)")
    rates = sorted({lr for points in losses.values() for lr in points})
    axes.set_xticks(rates, labels=[f"{lr:g}" for lr in rates])
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def read() -> tuple[Namespace, list[str]]:
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--lr", type=float, nargs="+", default=[0.005, 0.01, 0.02, 0.04, 0.08])
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--depth", type=int, nargs="+", default=[2, 4, 8])
    arguments = parser.parse_args(own)
    if any(width % (2 * HEAD) for width in arguments.width):
        parser.error(f"widths are multiples of {2 * HEAD}, two heads of {HEAD}")
    return arguments, more


def main() -> None:
    arguments, more = read()
    base = 4 if 4 in arguments.depth else arguments.depth[0]
    middle = 128 if 128 in arguments.width else arguments.width[0]
    shapes = sorted({(width, base) for width in arguments.width} | {(middle, depth) for depth in arguments.depth})
    losses: dict[tuple[int, int], dict[float, float]] = {shape: {} for shape in shapes}
    points = [(width, depth, lr) for lr in arguments.lr for width, depth in shapes]
    for width, depth, lr in tqdm(points, unit="run"):
        losses[width, depth][lr] = train(arguments.out, width, depth, lr, more)
    for (width, depth), found in losses.items():
        best = best_of(found)
        row = "  ".join(f"{lr:g}: {loss:.3f}" for lr, loss in sorted(found.items()))
        print(f"width {width:4} depth {depth:2}  best lr {best:g}   {row}")
    draw(losses, arguments.out / "sweep.png")
    print(arguments.out / "sweep.png")


if __name__ == "__main__":
    main()
