"""The benchmark of a step prints every arm beside its floor and its peers, and writes the same as a record."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_one_table_has_every_arm_and_column(tmp_path):
    command = [sys.executable, "recipes/benchmarks/benchmark_step.py", "--layers", "1", "--hidden", "64"]
    command += ["--vocabulary", "96", "--out", str(tmp_path / "record.json"), "--commit", "abc"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["commit"] == "abc"
    rows = {row["step"]: row for row in record["rows"]}
    assert len(rows) == 6
    for name, row in rows.items():
        assert f"| 1 layers | {name} |" in done.stdout
        assert row["× floor"] == row["s"] / row["floor s"]
        assert row["× fused AdamW"] == row["s"] / rows["fused AdamW"]["s"]
    assert rows["symlm default"]["GB"] > rows["symlm default, gram_every=4"]["GB"] > rows["symlm muon"]["GB"]
    assert rows["fused AdamW"]["launches"] == 2
