"""Asks the process that forks (`forked_commands.py`) for a command; also as a stand-in for one.

The stand-ins are scripts named `python`, `mlflow` and `mlflow-dr`, first on the path of forks. Each
is a process of its own, with the fork's output and exit code, that passes signals on to the fork.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

STAND_IN = """#!{python} -ISE
import sys
sys.path.insert(0, {folder!r})
import asking
asking.stand_in({name!r}, {address!r})
"""
NAMES = ("python", "mlflow", "mlflow-dr")
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ask(address: str, order: Mapping[str, object], files: Sequence[int]) -> socket.socket:
    """A connection that says the fork's process id, then how it ended; the fork dies with it.

    Args:
        address: of the process that forks.
        order: as `forked_commands.Order`.
        files: its input, output and error output.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    message = json.dumps(order).encode() + b"\n"
    sent = socket.send_fds(connection, [message], files)
    connection.sendall(message[sent:])
    return connection


def write_stand_ins(folder: Path, address: str) -> None:
    """Write the scripts into a folder."""
    for name in NAMES:
        script = folder / name
        values = {"python": sys.executable, "folder": str(Path(__file__).parent)}
        script.write_text(STAND_IN.format(name=name, address=address, **values))
        script.chmod(0o755)


def stand_in(name: str, address: str) -> None:
    """Have the command done by a fork, and end as it does."""
    asked: list[int] = []
    fork: list[int] = []

    def pass_on(number: int, _: object) -> None:
        if fork:
            os.kill(fork[0], number)
        else:
            asked.append(number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    order = {
        "argv": [name, *sys.argv[1:]],
        "variables": dict(os.environ),
        "directory": os.getcwd(),  # noqa: PTH109 - it starts sooner without pathlib
    }
    with ask(address, order, [0, 1, 2]).makefile() as answers:
        fork.append(int(answers.readline()))
        for number in asked:
            os.kill(fork[0], number)
        code = int(answers.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
