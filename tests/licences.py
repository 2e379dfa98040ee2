"""The licences of all that constraints.txt installs, as the packages state them:  python tests/licences.py"""

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pinned():
    """Return the names of the packages."""
    return [line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]


def licence_of(name):
    """Return a package's licence: its expression, or else its text if that is a name, or else its classifier.

    Raises: PackageNotFoundError for one that is not installed.
    """
    data = metadata(name)
    text = (data.get("License") or "").strip()
    classifiers = [word for word in data.get_all("Classifier", []) if word.startswith("License ::")]
    names = [classifier.rpartition(" :: ")[2] for classifier in classifiers]
    short = text if text and "\n" not in text and len(text) < 60 and text != "UNKNOWN" else None
    return data.get("License-Expression") or short or ", ".join(names)


def rows():
    """Return `{package: licence}` of what is installed here."""
    found = {}
    for name in pinned():
        try:
            found[name] = licence_of(name)
        except PackageNotFoundError:  # for another platform
            continue
    return found


def listed():
    """Return `{package: licence}` as docs/licences.md has it."""
    _, _, table = (ROOT / "docs" / "licences.md").read_text().partition("|---|---|\n")
    return dict(re.findall(r"^\| (\S+) \| (.+?) \|$", table, re.MULTILINE))


if __name__ == "__main__":
    print("\n".join(f"| {name} | {licence} |" for name, licence in rows().items()))
