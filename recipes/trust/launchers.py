"""Real processes under the repository's launchers, each a fork of a server that has imported once.

`accelerate launch` runs as it is, torchrun's agent with it; only the ranks are forked where it would start Python anew.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from torch.distributed.elastic.utils.distributed import get_free_port

RECIPES = Path(__file__).parents[1]
ON_CPUS = RECIPES.parent / "tests" / "fsdp2_on_cpus.py"
IMPORTED_ONCE = (
    "accelerate.commands.launch",
    "accelerate.utils.fsdp_utils",
    "datasets",
    "deepspeed",
    "jsonargparse",
    "matplotlib.pyplot",
    "pandas",
    "scipy.stats",
    "tabulate",
    "tokenizers",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.distributed.tensor.parallel",
    "torch.utils.tensorboard",
    "transformers.generation.utils",
    "transformers.integrations.deepspeed",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.tokenization_utils_tokenizers",
    "transformers.trainer",
)
ALONE = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}  # a fork has no other threads
ALONE |= {"DS_ACCELERATOR": "cpu", "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}
SERVER = multiprocessing.get_context("forkserver")
Before = Callable[[], None]  # what a rank does to itself before its script runs


@dataclass(frozen=True)
class Launcher:
    """How a script is started: alone, or by `accelerate launch` with a configuration of the repository."""

    config: str = ""
    machines: int = 1
    flags: tuple[str, ...] = ()
    script: str = "pretrain.py"

    @property
    def processes(self) -> int:
        return 2 if self.config else 1

    def commands(self, arguments: Sequence[str]) -> list[list[str]]:
        """Return the command of each machine: a script and its arguments, behind what `accelerate launch` is given."""
        script = [str(RECIPES / self.script), *arguments]
        if not self.config:
            return [script]
        script = [str(ON_CPUS), *script] if self.config.startswith("fsdp") else script
        flags = [f"--config_file={RECIPES / 'accelerate' / self.config}.yaml", "--num_processes=2"]
        flags += ["--mixed_precision=no", f"--main_process_port={get_free_port()}", *self.flags]
        if self.machines == 1:
            return [[*flags, *script]]
        flags += [f"--num_machines={self.machines}", "--main_process_ip=127.0.0.1"]
        return [[*flags, f"--machine_rank={rank}", *script] for rank in range(self.machines)]


LAUNCHERS = {
    "one process": Launcher(),
    "DDP": Launcher("cpu2"),
    "FSDP2": Launcher("fsdp8"),
    "ZeRO-2": Launcher("zero2"),
    "ZeRO-3": Launcher("zero3"),
    "two machines": Launcher("cpu2", machines=2),
    "Trainer": Launcher(script="finetune_trainer.py"),
}


class Job:
    """A script under a launcher, running: a process group a machine, what they print in one file.

    Args:
        launcher: How it is started.
        arguments: The script's.
        log: The file.
        before: What each rank does to itself first.
        environment: What its processes have beside this one's.
    """

    def __init__(
        self,
        launcher: Launcher,
        arguments: Sequence[str],
        log: Path,
        before: Before | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.launcher, self.log = launcher, log
        self.began = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        settings = (bool(launcher.config), log, before, environment or {})
        self.machines = [SERVER.Process(target=_become, args=(c, *settings)) for c in launcher.commands(arguments)]
        for machine in self.machines:
            machine.start()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return any(machine.is_alive() for machine in self.machines)

    def ranks(self) -> list[psutil.Process]:
        """Return the processes that train: without a launcher its only one, none where they have not begun."""
        if not self.launcher.config:
            return [psutil.Process(machine.pid) for machine in self.machines if machine.is_alive()]
        agents = [psutil.Process(machine.pid) for machine in self.machines if machine.is_alive()]
        return [rank for agent in agents for rank in agent.children()]

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes, as a terminal or a machine's end does."""
        for machine in self.machines:
            try:
                os.killpg(machine.pid, number)
            except ProcessLookupError:
                continue

    def wait(self, limit: float) -> list[int | None]:
        """Return the exit codes, None for what still ran after `limit` seconds and is killed then."""
        end = time.monotonic() + limit
        for machine in self.machines:
            machine.join(max(0.0, end - time.monotonic()))
        codes = [machine.exitcode for machine in self.machines]
        self.signal(signal.SIGKILL)
        for machine in self.machines:
            machine.join()
        return codes


def warm_up() -> None:
    """Start the server, and wait until its imports are behind it."""
    SERVER.set_forkserver_preload(list(IMPORTED_ONCE))
    os.environ.update(ALONE)
    first = SERVER.Process(target=int)
    first.start()
    first.join()


def _become(command: list[str], launched: bool, log: Path, before: Before | None, environment: dict[str, str]) -> None:
    """Run a machine's command in this process, which leads a group of its own."""
    os.setsid()
    os.environ.update(environment)
    for name in [name for name in sys.modules if name.split(".")[0] == "pretraining"]:  # what reads the environment
        del sys.modules[name]
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what a kill would leave unwritten
    if not launched:
        return _script(before, *command)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import run
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    class Forked(elastic_launch):
        """The agent, whose ranks are forks of it."""

        def __init__(self, config: LaunchConfig, entrypoint: str) -> None:
            config.start_method = "fork"
            super().__init__(config, _script)

        def __call__(self, *words: str) -> object:
            return super().__call__(before, *(word for word in words if word != "-u"))

    run.elastic_launch = Forked
    launch_command(launch_command_parser().parse_args(command))
    return None


def _script(before: Before | None, path: str, *arguments: str) -> None:
    """Run a script as Python does."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    if before:
        before()
    runpy.run_path(path, run_name="__main__")
