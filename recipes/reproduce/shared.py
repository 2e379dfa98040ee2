"""What every reproduction prints and leaves behind: targets beside what came out, a figure, and an exit status."""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure


@dataclass
class Check:
    """One line of the table: what, the published or measured target, what came out, and whether it must hold."""

    what: str
    target: float | str
    found: float | str
    passed: bool | None = None


def finish(script: str, checks: list[Check], figure: Figure | None = None) -> None:
    """Print the table, save the figure under runs/reproduce, and exit with 1 if a criterion failed."""
    widths = [max(len(_text(getattr(check, key))) for check in checks) for key in ("what", "target", "found")]
    for check in checks:
        cells = (check.what.ljust(widths[0]), _text(check.target).rjust(widths[1]), _text(check.found).rjust(widths[2]))
        print("  ".join(cells), {None: "", True: "  passed", False: "  FAILED"}[check.passed], sep="")
    if figure is not None:
        path = Path("runs") / "reproduce" / f"{Path(script).stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        print(path)
    sys.exit(int(any(check.passed is False for check in checks)))


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
