"""Text of installed packages: the same tokens again, whole packages held out, no block twice."""

from types import SimpleNamespace

import numpy as np
import pytest
from pretraining import corpus, installed


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(installed, "CACHE", tmp_path)
    monkeypatch.setattr("pretraining.packing.CACHE", tmp_path)
    monkeypatch.setattr(installed, "TRAINING", ("tabulate", "iniconfig"))
    monkeypatch.setattr(installed, "VALIDATION", ("pluggy",))


def test_prose_is_the_docstrings_in_order():
    text = '"""First."""\nx = 1\nclass A:\n    """Second\n    line."""\n    def f(self):\n        """Third."""\n'
    assert installed.prose(text) == "First.\n\nSecond\nline.\n\nThird."
    assert installed.prose("def broken(:") == installed.prose("x = 1") == ""


@pytest.mark.parametrize("kind", installed.KINDS)
def test_tokens_are_made_once_and_alike(kind, tmp_path):
    tokenizer, train, held = installed.load_tokens(kind, 300)
    assert len(tokenizer) <= 300
    assert train.max() < 300 > held.max()
    assert len(train) > len(held) > 0
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    _, again, _ = installed.load_tokens(kind, 300)
    assert np.array_equal(train, again)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    text = tokenizer.decode(held[:4000])
    assert "pluggy" in text or "plugin" in text
    assert "tabulate" not in text


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(installed, "TRAINING", ("tabulate", "no-such-package"))
    with pytest.raises(ValueError, match=r"\['no-such-package'\]; run `make setup`"):
        installed.load_tokens("installed", 300)


def test_no_block_is_repeated():
    data = SimpleNamespace(dataset="installed", tokenizer=None, vocab_size=300, length=64, validation_blocks=4)
    _, train, held = corpus.load(data, seed=0, samples=20)
    assert len(train) == 20
    assert len(held) == 4
    with pytest.raises(ValueError, match=r"the run takes 64,000,000 tokens and 'installed' has"):
        corpus.load(data, seed=0, samples=10**6)
