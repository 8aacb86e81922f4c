"""Functions of test files, called in several real processes that torchrun has started.

Starting takes seconds, so a test file makes many checks in one call, and shares what came of them
between its tests::

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
import subprocess
import sys
import tempfile
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def on_processes(count, function, *arguments, timeout=120, environment=None):
    """Call a function at the top of a test file in ``count`` processes that talk through gloo.

    Args:
        count: how many; 1 is started without torchrun.
        function: ``function(mesh, *arguments)``; what it returns goes through JSON.
        arguments: go through JSON as well.
        timeout: seconds until all are killed, which is a failure.
        environment: further variables.

    Returns:
        What each process returned, by rank. If one raises, an AssertionError shows the tracebacks.
    """
    place = Path(sys.modules[function.__module__].__file__)
    with tempfile.TemporaryDirectory() as directory:
        call = [__file__, str(place), function.__name__, directory, json.dumps(arguments)]
        command = [sys.executable, *torchrun(count), *call]
        done = finished(command, timeout, environment)
        results = [Path(directory, f"{rank}.json") for rank in range(count)]
        errors = [f"rank {path.stem}: {path.read_text()}" for path in Path(directory).glob("*.err")]
        text = "\n".join([*errors, *([] if errors else [done.stdout, done.stderr])])
        if done.returncode or errors:
            raise AssertionError(f"status {done.returncode}\n{text}")
        return [json.loads(path.read_text()) for path in results]


def torchrun(count):
    """The arguments of Python that start a file on several processes; none for one process."""
    if count == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]


def finished(command, timeout, environment=None, cwd=None):
    """Run a command that starts processes; all of them are gone when this returns or raises."""
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | ENVIRONMENT | (environment or {}),
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        everyone = [process.pid, *descendants(process.pid)]
        for pid in everyone:  # torchrun puts its processes into sessions of their own
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"not done after {timeout} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def descendants(pid):
    """The processes that a process has started, and those that they have."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    children = [int(word) for word in text.split()]
    return children + [deeper for child in children for deeper in descendants(child)]


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
    try:
        with processes(timeout=60) as mesh:
            result = getattr(module, name)(mesh, *json.loads(arguments))
            Path(directory, f"{rank}.json").write_text(json.dumps(result))
    except BaseException:
        Path(directory, f"{rank}.err").write_text(traceback.format_exc())
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
