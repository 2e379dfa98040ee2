"""A Python that has its imports behind it: every process that starts through it is a fork of one that imported once.

`executable()` returns a command that takes a script, or `-m` and a module, as Python itself does. The process it starts
has its own arguments, environment, folder and streams, and imports the modules of this repository anew; what is shared
is third-party code alone. What it starts by `sys.executable` starts the same way. It dies with the command. Where there
is no pidfd, as outside Linux, the command is Python itself.
"""

import array
import atexit
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile

IMPORTED_ONCE = (
    "accelerate.commands.launch",
    "accelerate.utils.fsdp_utils",
    "datasets",
    "deepspeed",  # which accelerate imports in every run
    "jsonargparse",
    "matplotlib.backends.backend_agg",
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
    "tqdm",
    "transformers.generation.utils",
    "transformers.integrations.deepspeed",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "transformers.models.olmoe.modeling_olmoe",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.tokenization_utils_tokenizers",
    "transformers.trainer",
)
SETTINGS = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}  # a fork keeps one
SETTINGS["DS_ACCELERATOR"] = "cpu"
_server: subprocess.Popen | None = None
_command = ""


def executable() -> str:
    """Return the path of the command, its server started if it is not there yet."""
    global _server, _command
    if not hasattr(os, "pidfd_open"):
        return sys.executable
    if _server is None:
        folder = tempfile.mkdtemp(prefix="symlm-python-")
        _command = os.path.join(folder, "python")
        start = f"exec '{sys.executable}' -S -E '{__file__}' '{folder}' \"$@\""
        with open(_command, "w", opener=lambda path, flags: os.open(path, flags, 0o700)) as file:
            file.write(f"#!/bin/sh\n{start}\n")
        told = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {**os.environ, **SETTINGS}}
        _server = subprocess.Popen([sys.executable, __file__, "--serve", folder], **told)
        if _server.stdout.readline() != b"ready\n":
            raise RuntimeError("the warm Python did not start: see its errors above")
        atexit.register(stop)
    return _command


def stop() -> None:
    """End the server, which waits for nothing that still runs."""
    _server.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        _server.wait(60)
    shutil.rmtree(os.path.dirname(_command))


def serve(folder: str) -> None:
    """Import once, and fork a process for every connection until standard input closes."""
    import importlib
    import select
    import signal
    import threading

    sys.path.pop(0)  # this file's folder
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    if threading.active_count() > 1:
        raise RuntimeError(f"an import started {threading.enumerate()[1:]}: no fork is safe then")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(folder, "socket"))
    listener.listen(64)
    signal.signal(signal.SIGCHLD, reap)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(1, b"ready\n")
    while 0 not in (ready := select.select([0, listener.fileno()], [], [])[0]) and ready:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            attend(connection, os.path.join(folder, "python"))
        connection.close()


def reap(*_: object) -> None:
    """Wait for the forks that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def attend(connection: socket.socket, command: str) -> None:
    """Fork what a connection asks for, and wait until it or its command has ended."""
    import select
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little")
    streams = array.array("i")
    data, told, *_ = connection.recvmsg(1, socket.CMSG_LEN(3 * streams.itemsize))
    streams.frombytes(told[0][2])
    request = json.loads(data + connection.recv(size - 1, socket.MSG_WAITALL))
    if (pid := os.fork()) == 0:
        connection.close()
        become(request, list(streams), command)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(pid)
    ready, *_ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(code.to_bytes(4, "little", signed=True))
    os._exit(0)


def become(request: dict, streams: list[int], command: str) -> None:
    """Turn this fork into the process that was asked for, and end with it."""
    import runpy
    import signal
    import threading
    import traceback

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    module, arguments = request["module"], request["arguments"]
    sys.argv, sys.executable = arguments, command
    first = request["folder"] if module else os.path.dirname(os.path.abspath(arguments[0]))
    sys.path[:0] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    code = 0
    try:
        if module:
            sys.modules.pop(arguments[0], None)  # else runpy warns of it
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ask(folder: str, *arguments: str) -> None:
    """Have the server start a process with this one's streams, folder and environment, and end as it ends."""
    import signal

    told = [argument for argument in arguments if argument != "-u"] if arguments[:1] == ("-u",) else list(arguments)
    module = told[:1] == ["-m"]
    if not module and told[0].startswith("-"):
        os.execv(sys.executable, [sys.executable, *arguments])
    request = {"module": module, "arguments": told[module:], "folder": os.getcwd(), "environment": dict(os.environ)}
    data = json.dumps(request).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.path.join(folder, "socket"))
    connection.sendall(len(data).to_bytes(8, "little"))
    sent = connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
    connection.sendall(data[sent:])
    code = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "little", signed=True)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == "--serve" else ask(*sys.argv[1:])
