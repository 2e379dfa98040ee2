"""A campaign of faults:  python recipes/faults.py --out runs/faults

Every fault happens to real processes of a tiny run, under the launchers of the repository, at a moment that the seed
draws; the same command line goes on afterwards, and its end is compared with an undisturbed run's. What is recorded is
not repeated: start it again after a kill. Disks that fill need a user who may mount one; others leave those faults out.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from jsonargparse import CLI
from pretraining.folder import origin
from tabulate import tabulate
from tqdm import tqdm
from trust import damage, disks, kills, ranks, texts
from trust.launchers import warm_up
from trust.runs import Lost, Run, make_whole, write_text

RESULTS = Path(__file__).parent / "results" / "faults.json"
ONE, DDP, FSDP2, ZERO2, ZERO3, NODES, TRAINER = (
    *("one process", "DDP", "FSDP2", "ZeRO-2", "ZeRO-3", "two machines", "Trainer"),
)
Act = Callable[[Run, Random, int], kills.Outcome]
# Each fault, and how often it is tried under each launcher; most come in chains of three or five.
PLAN: dict[str, tuple[Act, dict[str, int]]] = {
    "SIGKILL of all": (kills.kill_all, {ONE: 4, DDP: 3, FSDP2: 3, ZERO2: 2, ZERO3: 1, NODES: 2, TRAINER: 3}),
    "SIGKILL of one rank": (kills.kill_one, {DDP: 2, FSDP2: 2, ZERO2: 1, ZERO3: 1, NODES: 2}),
    "SIGKILL in a save": (kills.kill_in_a_save, {ONE: 4, DDP: 4, FSDP2: 3, ZERO2: 2, ZERO3: 1, NODES: 2, TRAINER: 3}),
    "SIGKILL in an asynchronous save": (kills.asynchronous(kills.kill_in_a_save), {ONE: 2, DDP: 1, FSDP2: 1}),
    "SIGTERM": (kills.terminate, {ONE: 4, DDP: 3, FSDP2: 2, ZERO2: 2, ZERO3: 1, NODES: 2, TRAINER: 2}),
    "SIGINT": (kills.interrupt, {ONE: 4, DDP: 3, FSDP2: 2, ZERO2: 2, ZERO3: 1, NODES: 2, TRAINER: 2}),
    "SIGSTOP of one rank": (kills.freeze, {DDP: 3, FSDP2: 2, ZERO2: 2}),
    "a rank exits": (ranks.exits, {DDP: 3, FSDP2: 2, ZERO2: 2}),
    "a rank with another table": (ranks.other_table, {DDP: 2, FSDP2: 2, ZERO2: 2}),
    "a rank on another version": (ranks.other_version, {DDP: 1, FSDP2: 1, ZERO2: 1}),
    "the disk fills": (disks.full, {ONE: 12, DDP: 6}),
    "the folder becomes read-only": (disks.read_only, {ONE: 3, DDP: 2}),
    "the folder is gone": (disks.gone, {ONE: 3, DDP: 2}),
    "the disk fills, saves asynchronous": (kills.asynchronous(disks.full), {ONE: 1}),
    "the folder is gone, saves asynchronous": (kills.asynchronous(disks.gone), {ONE: 1}),
    "no more open files": (disks.no_more_files, {ONE: 3, DDP: 2}),
    "a bit flipped": (damage.flip, {ONE: 12, FSDP2: 8, ZERO2: 6}),
    "a file cut": (damage.cut, {ONE: 8, FSDP2: 6, ZERO2: 4}),
    "a file missing": (damage.missing, {ONE: 8, FSDP2: 6, ZERO2: 4}),
    "files of two checkpoints": (damage.mixed, {ONE: 6, FSDP2: 4, ZERO2: 3}),
    "a pickle in a checkpoint": (damage.hostile, {ONE: 7, FSDP2: 5, ZERO2: 5}),
    "a pickle elsewhere": (texts.pickles, {ONE: 10}),
    "a bad gradient": (ranks.bad_gradient, {ONE: 4, DDP: 4, FSDP2: 4, ZERO2: 3, ZERO3: 2, NODES: 2, TRAINER: 2}),
    "a bad loss": (ranks.bad_loss, {ONE: 4, DDP: 4, FSDP2: 3, ZERO2: 2, ZERO3: 1, NODES: 1, TRAINER: 2}),
    "hostile text": (texts.text, {ONE: len(texts.TEXTS)}),
    "a growing file": (texts.growing, {ONE: 2}),
}
ROOTS = (
    "the disk fills",
    "the disk fills, saves asynchronous",
    "the folder becomes read-only",
)  # what only root can do to a disk


@dataclass(frozen=True)
class Fault:
    """The `number`-th try of a fault under a launcher."""

    name: str
    launcher: str
    number: int

    @property
    def key(self) -> str:
        return f"{self.name}, {self.launcher}, {self.number}"

    def happen(self, folder: Path, seed: int, links: int | None = None) -> dict[str, Any]:
        """Let it happen to a run in a folder of its own, which stays if it is lost; return what is recorded."""
        run = Run(folder / "now" / self.key.replace(", ", "-").replace(" ", "_"), self.launcher, folder, links)
        shutil.rmtree(run.folder, ignore_errors=True)
        make_whole(self.launcher, folder)
        try:
            outcome = PLAN[self.name][0](run, Random(f"{seed}, {self.key}"), self.number)
        except Lost as lost:
            return {"tried": 1, "survived": 0, "note": str(lost)}
        finally:
            if run.job:
                run.job.wait(0)
        shutil.rmtree(run.folder)
        steps, seconds = zip(*outcome, strict=True)
        return {"tried": len(outcome), "survived": len(outcome), "lost": list(steps), "seconds": round(seconds[0], 2)}


def faults(names: tuple[str, ...], launchers: tuple[str, ...], most: int) -> Iterator[Fault]:
    """Yield the plan's faults, every kind once before any twice."""
    for number in range(min(most, max(max(counts.values()) for _, counts in PLAN.values()))):
        for name, (_, counts) in PLAN.items():
            for launcher, count in counts.items():
                wanted = (not names or name in names) and (not launchers or launcher in launchers)
                if wanted and number < count:
                    yield Fault(name, launcher, number)


def table(records: dict[str, dict[str, Any]]) -> str:
    """Return a row for each fault and launcher."""
    groups = defaultdict(list)
    for record in records.values():
        groups[record["fault"], record["launcher"]].append(record)
    rows = []
    for (name, launcher), group in groups.items():
        lost = [steps for record in group for steps in record.get("lost", [])]
        seconds = [record["seconds"] for record in group if record.get("seconds")]
        rows.append(
            {
                "fault": name,
                "launcher": launcher,
                "tried": sum(record["tried"] for record in group),
                "survived": sum(record["survived"] for record in group),
                "steps lost, at most": max(lost, default=None),
                "seconds to go on": round(median(seconds), 1) if seconds else None,
            }
        )
    order = {(name, launcher): k for k, (name, launcher) in enumerate((n, c) for n in PLAN for c in PLAN[n][1])}
    rows.sort(key=lambda row: order.get((row["fault"], row["launcher"]), len(order)))
    return tabulate(rows, headers="keys", tablefmt="github", missingval="")


def main(
    out: Path = Path("runs/faults"),
    results: Path = RESULTS,
    seed: int = 0,
    names: tuple[str, ...] = (),
    launchers: tuple[str, ...] = (),
    most: int = 1000,
    links: int | None = None,
    again: bool = False,
) -> None:
    """Let faults happen, and print the table of all that are recorded.

    Args:
        out: the folder of the runs.
        results: the file of records.
        seed: of every moment and every choice.
        names: the faults, for example '["SIGKILL of all"]'; all by default.
        launchers: the launchers, for example '["DDP"]'; all by default.
        most: how many of each fault under each launcher.
        links: faults in a row of a chain; three where there is a launcher, else five, by default.
        again: try once more what was not survived, the failure staying in its record.
    """
    out = out.absolute()
    write_text(out / "text")
    warm_up()
    records = json.loads(results.read_text())["faults"] if results.exists() else {}
    left = [f for f in faults(names, launchers, most) if f.key not in records]
    if again:
        left += [f for f in faults(names, launchers, most) if not records.get(f.key, {"survived": 1})["survived"]]
    if not disks.may_change_disks(out / "disk"):
        left = [fault for fault in left if fault.name not in ROOTS]
    with tqdm(left, unit="fault", disable=None) as bar:
        for fault in bar:
            bar.set_description(fault.key)
            record = {"fault": fault.name, "launcher": fault.launcher, **fault.happen(out, seed, links), **origin()}
            before = records.get(fault.key, {})
            failures = [*before.get("failures", []), *([before["note"]] if "note" in before else [])]
            records[fault.key] = record | ({"failures": failures} if failures else {})
            bar.write(f"{fault.key}: {record.get('note', 'survived')}")
            store(results, seed, records)
    print(table(records))
    tried, survived = (sum(record[key] for record in records.values()) for key in ("tried", "survived"))
    print(f"{survived} of {tried} faults survived")


def store(results: Path, seed: int, records: dict[str, dict[str, Any]]) -> None:
    """Write the records, whole or not at all."""
    temporary = results.with_suffix(".unfinished")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps({"seed": seed, "faults": records}, indent=1))
    temporary.replace(results)


if __name__ == "__main__":
    CLI(main, as_positional=False)
