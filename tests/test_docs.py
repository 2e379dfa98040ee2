"""The docs hold: their Python runs, and the commands, files, names and tests that they mention exist."""

import ast
import importlib
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from benchmarks.speedrun import config as speedrun
from models import tiny
from pretraining import config
from pretraining.models import build_model

import symlm
from symlm.step import bucket

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"]
# A comment `<!-- python ... -->` before a block is its setup, which a reader does not see.
PYTHON = re.compile(r"^(?:```python|<!-- python)\n(.*?)\n(?:```|-->)$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```(?:bash|console)\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$|<!--.*?-->", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
FOLDERS = ("recipes", "tests", "kernels", "docs", "symlm")


def name_of(page):
    return str(page.relative_to(ROOT))


def commands(page):
    """Return a page's commands, each as its words without variables."""
    lines = [line for block in COMMANDS.findall(page.read_text()) for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def is_missing(path):
    return not (ROOT / path).exists() and not any(ROOT.glob(path))


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """Run in a folder of its own, and leave torch's random state as it was."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON.search(page.read_text())], ids=name_of)
def test_every_python_block_runs_in_the_order_of_its_page(page, quiet):
    namespace = {}
    for match in PYTHON.finditer(page.read_text()):
        line = page.read_text().count("\n", 0, match.start(1))
        exec(compile("\n" * line + match[1], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_every_command_names_files_and_targets_that_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        if words[0] == "make":
            assert set(words[1:]) <= targets, words
        files = [word for word in words if word.split("/")[0] in FOLDERS or word.endswith((".md", ".txt", ".toml"))]
        assert not [path for path in files if is_missing(path)], words


@pytest.mark.parametrize(("program", "read", "least"), [("pretrain", config.read, 6), ("speedrun", speedrun.read, 2)])
def test_every_flag_of_a_recipe_that_a_command_gives_is_one(program, read, least, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = f"recipes/{program}.py"
    runs = [words for page in TEXTS for words in commands(page) if script in words]
    assert len(runs) >= least
    for words in runs:
        read(words[words.index(script) + 1 :])


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_every_path_in_backticks_or_links_exists(page):
    text = FENCED.sub("", page.read_text())
    words = [word.rstrip(".,:") for code in INLINE.findall(text) for word in code.split()]
    paths = [word for word in words if word.startswith(tuple(f"{folder}/" for folder in FOLDERS))]
    assert not [path for path in paths if is_missing(path)]
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", INLINE.sub("", text))
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_every_name_of_symlm_in_backticks_resolves(page):
    for code in INLINE.findall(page.read_text()):
        for name in re.findall(r"(?<![\w./-])symlm(?:_kernels)?(?:\.[A-Za-z_]\w*)+", code):
            resolve(name)


def resolve(name):
    """Import the longest module of a dotted name, and look the rest up in it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise AssertionError(name)


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_every_test_that_a_page_cites_exists(page):
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    cited = [match[1] for code in INLINE.findall(page.read_text()) if (match := re.match(r"(test_\w+)(?:\[|$)", code))]
    assert not [test for test in cited if f"def {test}(" not in sources]


def test_no_sentence_is_in_two_places():
    found = Counter()
    for page in TEXTS:
        prose = re.sub(r"^(\||#|!\[|:::).*$", "", FENCED.sub("", page.read_text()), flags=re.MULTILINE)
        parts = re.split(r"(?<=[.:!?])\s+|\n\n|\n[-\d]", prose)
        found.update(" ".join(part.split()) for part in parts if len(part.split()) >= 7)
    assert not [sentence for sentence, times in found.items() if times > 1]


def test_every_error_message_has_its_line_in_troubleshooting():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    folders = ("symlm", "kernels/symlm_kernels", "recipes")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    programs = {"reproduce", "benchmarks", "trust"}
    sources = [path for path in sources if not programs & set(path.parts) or path.parent.name == "speedrun"]
    missing = [message for path in sources for message in messages(path) if message not in page]
    assert not missing, "\n".join(missing)


def messages(path):
    """Return a file's error messages as the docs write them, `…` for what is filled in."""
    raised = [node.exc for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
    texts = [written(call.args[0]) for call in raised if isinstance(call, ast.Call) and call.args]
    return [" ".join(text.split()) for text in texts if re.search("[a-z]{3}", text)]


def written(node):
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(written(value) for value in node.values)
    return written(node.left) + written(node.right) if isinstance(node, ast.BinOp) else "…"


def test_the_table_on_the_routing_page_is_the_one_that_is_printed():
    """But for the columns that the page says it leaves out."""
    page = (ROOT / "docs" / "routing.md").read_text()
    shown = re.search(r"^```text\n(role .*?)\n```$", page, re.MULTILINE | re.DOTALL)[1].splitlines()
    default = config.read([])
    model = build_model(default.model.preset, None, {}, default.data.vocab_size, 0)
    found, printed = (
        [re.split(r"  +", line.strip()) for line in lines]
        for lines in (shown, str(symlm.describe_routing(model)).splitlines())
    )
    places = [printed[0].index(column) for column in found[0]]  # before the one column that may be empty
    assert found[2:] == [[cells[k] for k in places] for cells in printed[2:]]


WALK = (
    "optimizer.py",
    "routing/param_groups.py",
    "step/bucket.py",
    "step/directions.py",
    "rules/spectral.py",
    "polar/factor.py",
    "update/apply.py",
)


def test_the_walk_of_one_weight_is_the_one_that_the_architecture_page_draws(monkeypatch):
    monkeypatch.setattr(bucket, "JOINED_ELEMENTS", 0)  # a small bucket's polar factors may be computed with others'
    model, package = tiny("qwen3"), Path(symlm.__file__).parent
    visited = []

    def watch(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(package)):
            visited.append(str(Path(frame.f_code.co_filename).relative_to(package)))

    model.model.layers[0].mlp.up_proj.weight.grad = torch.randn(48, 32)
    sys.setprofile(watch)
    try:
        symlm.SymOptimizer(model).step()
    finally:
        sys.setprofile(None)
    order = [name for name in dict.fromkeys(visited) if name in WALK]
    assert order == list(WALK)
    drawn = (ROOT / "docs" / "images" / "walk.svg").read_text()
    listed = re.findall(r"^\d\. \*\*`symlm/(.*?)`\*\*", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert listed == list(WALK)
    assert all(name in drawn for name in WALK)


def test_the_readme_is_two_minutes_long():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
