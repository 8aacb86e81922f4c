"""Programs of Python in processes of their own, without the second and a half that torch takes.

:func:`start` is ``python ARGUMENTS`` in a new process: a process id to send signals to, arguments,
environment, working directory, output and exit status of its own, and a ``__main__`` that is the
program's. Only, it is a fork of a server that has imported torch, and nothing else, before. So a
test whose matter is the start of Python itself, or what is imported, uses subprocess instead.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


# ── In a test ─────────────────────────────────────────────────────────────────────────────────────


class Process:
    """A program that was started; its outputs are kept in files until it has ended."""

    def __init__(self, arguments, *, cwd=None, environment=None):
        self.args = [str(argument) for argument in arguments]
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115 - is read after the end
        self._err = tempfile.TemporaryFile("w+")  # noqa: SIM115
        receive, send = os.pipe()
        self._told = os.fdopen(receive)
        whole = os.environ | ENVIRONMENT | (environment or {})
        request = json.dumps([self.args, str(cwd or os.getcwd()), whole]).encode()
        files = [self._out.fileno(), self._err.fileno(), send]
        connection = server()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], files)
        connection.sendall(request)
        os.close(send)
        self.pid = int(self._told.readline())
        self.returncode = None

    def poll(self):
        """The exit status as that of subprocess, or None while it runs."""
        return self.wait(0)

    def wait(self, timeout):
        """Wait for the end for so many seconds; the exit status, or None if it still runs."""
        if self.returncode is None and select.select([self._told], [], [], timeout)[0]:
            self.returncode = int(self._told.readline())
        return self.returncode

    def send_signal(self, number):
        """Send it a signal."""
        os.kill(self.pid, number)

    def finished(self, timeout=120):
        """Wait for the end. If it does not come, everything is killed, and that is a failure."""
        if self.wait(timeout) is None:
            for pid in [self.pid, *descendants(self.pid)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"not done after {timeout} s\n{self.output()}\n{self.errors()}")
        return subprocess.CompletedProcess(self.args, self.returncode, self.output(), self.errors())

    def output(self):
        """What it has written to stdout so far."""
        return text_of(self._out)

    def errors(self):
        """What it has written to stderr so far."""
        return text_of(self._err)


def start(*arguments, **options):
    """Start ``python ARGUMENTS``: a script, or ``-m`` or ``-c`` and what follows."""
    return Process(arguments, **options)


def run(*arguments, timeout=120, **options):
    """Run ``python ARGUMENTS`` to its end; what subprocess would return, with texts."""
    return Process(arguments, **options).finished(timeout)


def text_of(file):
    file.seek(0)
    return file.read()


def descendants(pid):
    """The processes that a process has started, and those that they have."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    children = [int(word) for word in text.split()]
    return children + [deeper for child in children for deeper in descendants(child)]


running = {}


def server():
    """The connection to the server, which ends when this process does."""
    if os.getpid() not in running:
        running.clear()  # that of the process that this one was forked from
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
        )
        theirs.close()
        running[os.getpid()] = ours
        atexit.register(end, ours, process, os.getpid())
    return running[os.getpid()]


def end(connection, process, owner):
    if os.getpid() == owner:
        connection.close()
        process.wait()


# ── In the server ─────────────────────────────────────────────────────────────────────────────────


def serve(connection):
    """Fork at each request; returns in the new process, with what it shall become."""
    while True:
        header, files, _, _ = socket.recv_fds(connection, 8, 3)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not header:
            os._exit(0)
        length, request = int.from_bytes(header, "big"), b""
        while len(request) < length:
            request += connection.recv(length - len(request))
        if os.fork() == 0:
            connection.close()
            out, err, told = files
            pid = os.fork()
            if pid == 0:
                os.dup2(out, 1)
                os.dup2(err, 2)
                for file in files:
                    os.close(file)
                return json.loads(request)
            os.write(told, f"{pid}\n".encode())
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with suppress(BrokenPipeError):  # nobody waits for it any more
                os.write(told, f"{status}\n".encode())
            os._exit(0)
        for file in files:
            os.close(file)


def prepare(arguments, cwd, environment):
    """Make this process what Python is before it runs its main program; returns how to run that."""
    before = len(os.environ["PYTHONPATH"].split(os.pathsep))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.orig_argv = [sys.executable, *arguments]
    kind, *rest = arguments
    if kind in ("-m", "-c"):
        first, sys.argv = ("" if kind == "-c" else cwd), [kind, *rest[1:]]
    else:
        first, sys.argv = os.path.dirname(os.path.abspath(kind)), arguments
    sys.path[: 1 + before] = [first, *environment["PYTHONPATH"].split(os.pathsep)]
    if kind == "-m":
        return lambda: runpy._run_module_as_main(rest[0])  # what Python itself calls
    if kind == "-c":
        name, source = "<string>", rest[0]
    else:
        main.__file__ = name = kind
        source = Path(kind).read_bytes()
    return lambda: exec(compile(source, name, "exec"), main.__dict__)


if __name__ == "__main__":
    import torch  # noqa: F401 - that is what the server is for

    gc.collect()
    gc.freeze()  # so that a collection in a fork does not copy the pages of all these objects
    # An exception of the program goes through to Python, which ends as it always does.
    prepare(*serve(socket.socket(fileno=int(sys.argv[1]))))()
