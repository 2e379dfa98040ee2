"""Run all that only a GPU can show, the most important first; each stage writes its record before the next begins.

    make gpu                                              # or: python kernels/benchmarks/gpu.py
    python kernels/benchmarks/gpu.py --rehearse           # tiny shapes in Triton's interpreter, no GPU

A stage that fails or takes too long is named at the end, and the others run. It needs torch, triton, transformers and
pytest; the last stage, of `recipes/pretrain.py`, needs the recipes' packages too.
"""

import os
import subprocess
import sys
import time
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PRETRAIN = ("recipes/pretrain.py", "--overwrite=true", "--train.steps=10", "--train.tracker=none")


@dataclass(frozen=True)
class Stage:
    """One program of the run.

    Args:
        name: The name of its log.
        command: Its arguments behind `python`.
        rehearsal: What is appended in a rehearsal.
        seconds: How long it may take.
    """

    name: str
    command: tuple[str, ...]
    rehearsal: tuple[str, ...]
    seconds: int


STAGES = (
    Stage("tests", ("-m", "pytest", "-q", "-rfE", "tests/kernels/test_gpu.py"), (), 150),
    Stage(
        "step",
        ("kernels/benchmarks/bench_step.py", "--profile"),
        ("--layers=1", "--width=32", "--models=qwen3-tiny"),
        120,
    ),
    Stage("tiles", ("kernels/benchmarks/bench_tiles.py",), ("--quick",), 120),
    Stage("polar", ("kernels/benchmarks/bench_polar.py",), ("--quick",), 120),
    Stage("row-norm", ("kernels/benchmarks/bench_row_norm.py",), ("--quick",), 90),
    Stage("pretrain", (*PRETRAIN, "--train.mixed_precision=bf16"), ("--train.mixed_precision=no",), 60),
    Stage(
        "pretrain-triton",
        (*PRETRAIN, "--train.mixed_precision=bf16", '--optimizer.options={"kernels": "triton"}'),
        ("--train.mixed_precision=no", '--optimizer.options={"kernels": "torch"}'),
        60,
    ),
)


def run(stage: Stage, out: Path, rehearse: bool, commit: str | None) -> str:
    """Run a stage, its output in a log; return how it ended."""
    records: tuple[str, ...] = ()
    if "benchmarks" in stage.command[0]:
        records = ("--out", str(out), *(("--commit", commit) if commit else ()))
    if "pretrain" in stage.name:
        records = (f"--out={out / 'runs'}", f"--name={stage.name}")
    command = [sys.executable, *stage.command, *records, *(stage.rehearsal if rehearse else ())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"), *sys.path[1:]))}
    if rehearse:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (out / f"{stage.name}.log").open("w") as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=stage.seconds
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {stage.seconds} s"
    return "done" if done.returncode == 0 else f"failed with {done.returncode}, see {log.name}"


def main() -> None:
    """Run the stages and say how each ended."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, without a GPU")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of records and logs")
    parser.add_argument("--commit", help="of the measured tree, where git cannot tell")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], help="these stages alone")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = False
    for stage in STAGES:
        if options.only and stage.name not in options.only:
            continue
        began = time.perf_counter()
        print(f"{stage.name}: ", end="", flush=True)
        ended = run(stage, out, options.rehearse, options.commit)
        print(f"{ended}, {time.perf_counter() - began:.0f} s", flush=True)
        failed |= ended != "done"
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
