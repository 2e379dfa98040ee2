"""The wheel holds two packages and nothing else; importing symlm needs torch alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_symlm_and_symlm_kernels(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        tmp_path,
        ROOT,
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"symlm", "symlm_kernels"}
    assert "symlm/py.typed" in names


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_needs_torch_alone():
    code = "import sys, symlm; print({'transformers', 'accelerate', 'triton', 'datasets'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
