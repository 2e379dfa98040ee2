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


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["auon", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_reproduction_passes(name, tmp_path):
    command = [warm_python.executable(), str(ROOT / "recipes" / "reproduce" / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert (tmp_path / "runs" / "reproduce" / f"{name}.png").stat().st_size > 5000
