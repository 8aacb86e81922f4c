"""Functions of test files, called in several real processes that talk to each other.

Starting them takes a while, so a test file makes many checks in one call, and shares what came of
them between its tests::

    def checks(mesh): ...                       # in each process; returns what JSON can hold

    @pytest.fixture(scope="module")
    def found(tmp_path_factory):
        return shared(tmp_path_factory, "ddp-2", lambda: on_processes(2, checks))
"""

import fcntl
import importlib.util
import json
import os
import signal
import socket
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from forking import start


def on_processes(count, function, *arguments, timeout=120):
    """Call a function at the top of a test file in ``count`` processes that talk through gloo.

    Args:
        count: how many.
        function: ``function(mesh, *arguments)``; what it returns goes through JSON.
        arguments: go through JSON as well.
        timeout: seconds until all are killed, which is a failure.

    Returns:
        What each process returned, by rank. If one raises, an AssertionError shows the tracebacks.
    """
    place = Path(sys.modules[function.__module__].__file__)
    with tempfile.TemporaryDirectory() as directory:
        together(
            [__file__, place, function.__name__, directory, json.dumps(arguments)], count, timeout
        )
        return [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(count)]


def together(command, count, timeout=120):
    """Run ``python COMMAND`` in ``count`` processes that meet as those of torchrun do, if several.

    If one fails, the others are ended, and an AssertionError shows what it has said.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(count):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        where |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        alone = count == 1  # as if nobody had thought of several
        environment = {} if alone else {name: str(value) for name, value in where.items()}
        running.append(start(*command, environment=environment))
    end = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in running):
            assert not any(process.returncode for process in running)
            assert time.monotonic() < end, f"not done after {timeout} s"
            time.sleep(0.005)
        assert not any(process.returncode for process in running)
    except AssertionError as error:
        time.sleep(0.5)  # the others may have something to say about it
        said = [f"rank {rank}:\n{process.errors()}" for rank, process in enumerate(running)]
        raise AssertionError("\n".join([str(error), *said])) from None
    finally:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)


def shared(tmp_path_factory, name, make):
    """What a function returned (through JSON), called once for all workers of a test session."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    path = base / f"{name}.json"
    with locked(base / f"{name}.lock"):
        if not path.exists():
            path.write_text(json.dumps(make()))
        return json.loads(path.read_text())


@contextmanager
def locked(path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(file, name, directory, arguments):
    """In each process: import the test file, call the function, leave the result."""
    from puretrain.sharding import processes

    rank = os.environ.get("RANK", "0")
    sys.path.insert(0, str(Path(file).parent))
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    with processes(timeout=60) as mesh:
        result = getattr(module, name)(mesh, *json.loads(arguments))
        Path(directory, f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
