"""The programs that a GPU runs, rehearsed where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_gpu_run_rehearses(tmp_path):
    """Each stage writes its record, with shapes that Triton's interpreter can do; `pretrain` trains its ten steps."""
    pytest.importorskip("triton")
    command = [sys.executable, "kernels/benchmarks/gpu.py", "--rehearse", "--out", str(tmp_path), "--commit", "abc"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
    for name in ("tiles", "step", "polar", "row_norm"):
        (path,) = tmp_path.glob(f"{name}-*.json")
        record = json.loads(path.read_text())
        assert record["commit"] == "abc"
        assert record["rows"]
    for name in ("pretrain", "pretrain-triton"):
        rows = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == 10
