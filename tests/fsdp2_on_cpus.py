"""Run a script with accelerate's FSDP2 on CPUs, where accelerate itself turns it on only with an accelerator.

accelerate launch --config_file recipes/accelerate/fsdp8.yaml --num_processes 2 tests/fsdp2_on_cpus.py SCRIPT ...
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

begin = AcceleratorState.__init__


def begin_sharded(state, *arguments, **options):
    begin(state, *arguments, **options)
    if state.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)  # the rest comes from the launcher's environment
        state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}


AcceleratorState.__init__ = begin_sharded
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
