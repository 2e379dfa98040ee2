"""The wheel holds two packages and nothing else, and trains by itself; versions agree; licences are listed."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import licences
import pytest

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


@pytest.mark.slow
def test_wheel_and_sdist_are_built_and_the_wheel_trains_where_nothing_else_of_symlm_is(tmp_path):
    done = subprocess.run([ROOT / ".ci" / "dist", sys.executable, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version = project()["version"]
    built = {path.name for path in tmp_path.iterdir()}
    assert built == {f"symlm-{version}.tar.gz", f"symlm-{version}-py3-none-any.whl"}
    assert re.search(r"/site-packages/symlm/__init__.py: loss \d", done.stdout)


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_changelog_and_tags_agree():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert headings == ["Unreleased"] * (headings[0] == "Unreleased") + sorted(released, key=numbers, reverse=True)
    tags = subprocess.run(["git", "-C", ROOT, "tag", "--list", "v*"], capture_output=True, text=True).stdout.split()
    assert {tag.removeprefix("v") for tag in tags} <= set(released)
    version = project()["version"]
    if headings[0] == "Unreleased":  # what the next release is called
        assert not released or numbers(version) > numbers(released[0])
    else:
        assert version == released[0]


def numbers(version):
    return [int(part) for part in version.split(".")]


def test_every_dependency_is_listed_with_its_licence():
    listed = licences.listed()
    assert list(listed) == licences.pinned()
    assert licences.rows() == {name: listed[name] for name in licences.rows()}
    assert len(licences.rows()) > 50
    assert not [name for name, licence in listed.items() if not licence or re.search("GPL|SSPL|Proprietary", licence)]
