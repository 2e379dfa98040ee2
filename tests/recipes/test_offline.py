"""The default recipe opens no connection: it trains where every one is refused."""

import os
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain.py"
REFUSING = """
import runpy, socket, sys

def refuse(self, address, *rest):
    raise RuntimeError(f"a connection to {address}")

socket.socket.connect = socket.socket.connect_ex = refuse
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_default_recipe_trains_without_a_connection(tmp_path):
    sizes = '{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 4096}'
    flags = [
        "--train.steps=2",
        "--train.batch=2",
        "--data.length=32",
        "--data.validation_blocks=4",
        f"--model.sizes={sizes}",
    ]
    command = [sys.executable, "-c", REFUSING, str(RECIPE), *flags, f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "default" / "model" / "model.safetensors").exists()
