"""Every reproduction runs, prints its targets, draws its figure and passes its own criteria."""

import subprocess

import pytest
import warm_python
from recipe import ROOT

SLOW = (
    "agd",
    "aro",
    "decays",
    "dion",
    "eight_bits",
    "gradient_conductor",
    "gradient_smoothness",
    "kl_soap",
    "muon_variants",
    "paper_grid",
    "paper_routers",
    "polargrad",
    "polargrad_schedule",
    "qk_clip",
    "scion",
    "softmax_architectures",
    "softmax_radius",
    "softmax_temperature",
    "teleport",
    "teleport_batches",
    "teleport_mlp",
    "width_transfer",
)


# Of those that train for minutes, fewer runs with the same criteria; their pages have the figures of all.
FEWER = {
    "agd": {"SEEDS": 1},
    "aro": {"RATES": (5e-3,), "SEEDS": (0, 1), "STEPS": 40},
    "eight_bits": {"STEPS": 40},
    "width_transfer": {"WIDTHS": (64, 128), "STEPS": 30},
}
SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import {name}
vars({name}).update({changes})
{name}.main()
"""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["auon", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_reproduction_passes(name, tmp_path):
    script = ROOT / "recipes" / "reproduce" / f"{name}.py"
    if name in FEWER:
        fewer = tmp_path / f"fewer_{name}.py"
        fewer.write_text(SCRIPT.format(folder=str(script.parent), name=name, changes=FEWER[name]))
        script = fewer
    command = [warm_python.executable(), str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert (tmp_path / "runs" / "reproduce" / f"{name}.png").stat().st_size > 5000
