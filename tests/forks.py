"""Commands without their imports: each `gatepress` or `python` that a shell starts is a fork of one process.

That one has imported everything, which takes seconds each time.
"""

import array
import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from gatepress.cli.app import app

REQUEST_BYTES = 1 << 18
IMPORTED = ("auto", "bench.endtoend", "evaluation", "export", "inspecting", "recovery", "report.build", "verifying")
CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as call:
    call.connect({address!r})
    told = json.dumps({{"arguments": sys.argv, "directory": os.getcwd(), "environment": dict(os.environ)}})
    socket.send_fds(call, [told.encode()], [0, 1, 2])
    answer = call.recv(1)
sys.exit(answer[0] if answer else 70)
"""


@contextlib.contextmanager
def serving(place: Path, first: str = "") -> Iterator[dict[str, str]]:
    """Yield the environment of a shell in which `gatepress` and `python` are forks, made in a short directory `place`.

    `first` is Python that the one process runs before it answers.
    """
    address = place / "calls"
    for name in ("gatepress", "python"):
        (place / name).write_text(CLIENT.format(python=sys.executable, address=str(address)))
        (place / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{place}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    code = f"{first}\nimport forks; forks.serve({str(address)!r})"
    paths = {"PYTHONPATH": str(Path(__file__).parent), "TQDM_DISABLE": "1"}
    server = subprocess.Popen([sys.executable, "-c", code], env={**environment, **paths})
    try:
        while not address.exists():
            assert server.poll() is None, "the server of forks has ended"
            time.sleep(0.05)
        yield environment
    finally:
        server.kill()
        server.wait()


def serve(address: str) -> None:
    """Import what commands need, then answer each call with a fork that has the caller's streams and directory."""
    for name in IMPORTED:
        importlib.import_module(f"gatepress.{name}")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    tests = os.getppid()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(address)
        server.listen()
        server.settimeout(5)
        while os.getppid() == tests:  # else they were killed, and nobody will call
            try:
                call, _ = server.accept()
            except TimeoutError:
                continue
            if os.fork():
                call.close()
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            call.send(bytes([answer(call)]))
            os._exit(0)


def answer(call: socket.socket) -> int:
    """Run what was asked for; return its exit code."""
    told, streams, _, _ = socket.recv_fds(call, REQUEST_BYTES, 3)
    asked = json.loads(told)
    for number, stream in enumerate(array.array("i", streams)):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["directory"])
    program, *arguments = asked["arguments"]
    sys.argv, sys.path[0] = [program, *arguments], asked["directory"]
    try:
        if Path(program).name == "gatepress":
            app(prog_name="gatepress")
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the caller's stderr is where it belongs
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
