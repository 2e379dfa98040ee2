"""How tests start recipes/pretrain.py: a small text, small sizes, and the command."""

from pathlib import Path

import warm_python
from torch.distributed.elastic.utils.distributed import get_free_port

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "recipes" / "accelerate"
CONFIGS = ROOT / "recipes" / "configs"
SCRIPT = ROOT / "recipes" / "pretrain.py"
SMALL = {
    "train.steps": 12,
    "train.batch": 2,
    "train.validate_every": 6,
    "train.save_every": 2,
    "train.log_every": 3,
    "data.length": 64,
    "data.validation_blocks": 4,
    "data.vocab_size": 400,
    "train.tracker": "none",
}


def write_text(folder):
    for k in range(40):
        (folder / f"{k:02}.txt").write_text(f"document {k}: " + "the quick brown fox jumps. " * (20 + k))
    return folder


def command(text, out, *more, python=None):
    """Return the command of a run, in the warm Python unless another is given."""
    configs = [argument for argument in more if argument.startswith("--config")]  # before what changes them
    rest = [argument for argument in more if argument not in configs]
    fields = [f"--{key}={value}" for key, value in SMALL.items()] + [f"--data.dataset={text}", f"--out={out}"]
    return [python or warm_python.executable(), str(SCRIPT), *configs, *fields, *rest]


def launch(config, *flags, python=None):
    """Return the command that starts a script under a launch configuration of the repository, on a free port."""
    options = [f"--config_file={LAUNCH / config}", f"--main_process_port={get_free_port()}", *flags]
    return [python or warm_python.executable(), "-m", "accelerate.commands.launch", *options]
