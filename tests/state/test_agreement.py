"""Ranks of another program are noticed: a copy of the package has the same digest until one line of it changes."""

import importlib.util
import shutil
from pathlib import Path

import symlm
from symlm.state import agreement


def program_of(package):
    """Return what the copy of the package says that it is."""
    spec = importlib.util.spec_from_file_location("copied_agreement", package / "state" / "agreement.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.program()


def test_another_source_is_another_program(tmp_path):
    package = tmp_path / "symlm"
    shutil.copytree(Path(symlm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert program_of(package) == agreement.program()
    with (package / "rules" / "spectral.py").open("a") as file:
        file.write("# another version\n")
    assert program_of(package) != agreement.program()
