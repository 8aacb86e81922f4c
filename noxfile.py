"""Everything that is done with this repository: ``python3 noxfile.py -s SESSION [-- ARGUMENTS]``.

Run as a script it needs nothing but Python: it makes one private environment under ``.nox/``,
installs nox there and runs itself with it. All sessions share that environment, because torch is
large; ``nox -s SESSION`` works too where nox is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".nox" / "py{}{}".format(*sys.version_info)
CONSTRAINTS = ROOT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def interpreter(environment: pathlib.Path) -> str:
    """The path of an environment's Python."""
    folder, suffix = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")
    return str(environment / folder / f"python{suffix}")


PYTHON = interpreter(ENVIRONMENT)


def make_environment(environment: pathlib.Path) -> None:
    """Make a virtual environment with pip and nox, unless it exists and is whole."""
    whole = environment / "whole"
    python = interpreter(environment)
    if whole.exists() and pathlib.Path(python).exists():
        return
    print(f"making {environment}", flush=True)
    make = [sys.executable, "-m", "venv", "--clear", str(environment)]
    if importlib.util.find_spec("ensurepip"):
        pip = [python, "-m", "pip"]
    else:  # Debian without python3-venv: let the pip outside install one inside
        make.append("--without-pip")
        pip = [sys.executable, "-m", "pip", "--python", python]
    try:
        subprocess.run(make, check=True)
        subprocess.run([*pip, "install", "-q", "-c", str(CONSTRAINTS), "pip", "nox"], check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"noxfile.py: {' '.join(error.cmd[:4])} … failed, see above. It needs the network, and "
            "either Python's venv module with ensurepip (on Debian: python3-venv) or pip >= 22.3."
        )
    whole.touch()


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036  # that is what it asks
        sys.exit("noxfile.py: puretrain needs Python 3.11 or newer; this is " + sys.version)
    make_environment(ENVIRONMENT)
    command = [PYTHON, "-m", "nox", "--noxfile", __file__, *sys.argv[1:]]
    sys.exit(subprocess.run(command, check=False).returncode)


import nox  # noqa: E402

nox.needs_version = ">=2025.2"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_missing_interpreters = True


def cpu_build(session: nox.Session, python: str, pin: str) -> list[str] | None:
    """The options with which pip finds the CPU build of the pinned torch, if it does with any.

    A build without CUDA saves gigabytes. It may be at hand already (a wheelhouse, an index in pip's
    configuration); otherwise PyTorch's own index has it. Asking takes pip a second and downloads
    nothing. An index that can't be reached would cost ``pip install`` eight seconds per package,
    so it is offered only when it has answered.
    """
    for options in ([], ["--extra-index-url", CPU_INDEX]):
        ask = [python, "-m", "pip", "index", "versions", "torch", "--timeout=10", "--retries=0"]
        answer = session.run(*ask, *options, silent=True, success_codes=[0, 1], log=False)
        if pin.removeprefix("torch==") + "+cpu" in str(answer).replace(",", " ").split():
            return options
    return None


def install_torch(session: nox.Session, environment: pathlib.Path) -> None:
    """Install the pinned torch; without CUDA where there is no NVIDIA GPU and it can be had."""
    pin = next(p for p in CONSTRAINTS.read_text().splitlines() if p.startswith("torch=="))
    done = environment / f"installed-{pin}"
    if done.exists():
        return
    python = interpreter(environment)
    options: list[str] = []
    has_gpu = os.path.exists("/dev/nvidiactl") or shutil.which("nvidia-smi")
    if sys.platform == "linux" and not has_gpu:
        found = cpu_build(session, python, pin)
        if found is None:
            session.warn("no CPU build of torch in reach; the default build may be several GB")
        else:
            pin, options = pin + "+cpu", found
    session.run(python, "-m", "pip", "install", "-c", str(CONSTRAINTS), pin, *options)
    done.touch()


def install(
    session: nox.Session,
    *groups: str,
    package: bool = True,
    environment: pathlib.Path = ENVIRONMENT,
) -> None:
    """Install dependency groups, torch and the package itself (editable), unless that was done."""
    project = ROOT / "pyproject.toml"
    recipe = bytes(ROOT) + project.read_bytes() + CONSTRAINTS.read_bytes()
    digest = hashlib.sha256(recipe).hexdigest()
    done = environment / f"installed-{'-'.join(groups)}"
    make_environment(environment)
    if done.exists() and done.read_text() == digest:
        return
    wanted = nox.project.dependency_groups(nox.project.load_toml(project), *groups)
    if package:
        install_torch(session, environment)
        wanted += ("-e", str(ROOT))
    python = interpreter(environment)
    session.run(python, "-m", "pip", "install", "-c", str(CONSTRAINTS), *wanted)
    done.write_text(digest)


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    install(session, "lint", package=False)
    session.run(PYTHON, "-m", "ruff", "check", ".")
    session.run(PYTHON, "-m", "ruff", "format", "--check", ".")


@nox.session(python=False)
def types(session: nox.Session) -> None:
    """Check the package's types with mypy --strict."""
    install(session, "types", "test")  # the optional packages that the tests use have types too
    session.run(PYTHON, "-m", "mypy", *session.posargs)


def everything() -> list[str]:
    """Pytest's arguments that run all tests on all cores."""
    return ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "worksteal"]


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """Run all tests and the doctests; with arguments, pytest with those."""
    install(session, "test")
    arguments = session.posargs or everything()
    # One thread per worker: small tensors gain nothing from more, and they would fight for cores.
    session.run(PYTHON, "-m", "pytest", *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=False)
def coverage(session: nox.Session) -> None:
    """Say which lines and branches of the package no test reaches; takes twice as long as tests."""
    install(session, "coverage")
    arguments = session.posargs or everything()
    measure = [PYTHON, "-m", "coverage"]
    session.run(*measure, "erase")
    session.run(*measure, "run", "-m", "pytest", *arguments, env={"OMP_NUM_THREADS": "1"})
    session.run(*measure, "combine", "-q")  # one file of each process that the tests have started
    session.run(*measure, "html", "-q")
    session.run(*measure, "report")
    session.log(f"see {ROOT / 'build' / 'coverage' / 'index.html'}")


@nox.session(python=False)
def lightning(session: nox.Session) -> None:
    """Compare the Lightning interface with the real pytorch-lightning, to the bit."""
    install(session, "test", "lightning", "services")
    arguments = session.posargs or [
        "tests/lightning/test_against_lightning.py",
        "tests/lightning/test_real_instances.py",
        "tests/lightning/test_details.py",  # a metric of torchmetrics, which comes with Lightning
        "tests/lightning/test_services.py",
    ]
    session.run(PYTHON, "-m", "pytest", *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=False)
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build; every warning is an error."""
    install(session, "docs")
    session.run(PYTHON, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", "docs/_build")
    session.log(f"see {ROOT / 'docs' / '_build' / 'index.html'}")


@nox.session(python=False)
def demo(session: nox.Session) -> None:
    """Train a small ConvNet on real images of handwritten digits."""
    install(session, "examples")
    session.run(PYTHON, "examples/digits.py", *session.posargs)


@nox.session(python=False)
def bench(session: nox.Session) -> None:
    """Measure every row of the speed table with its peers; --quick: roughly."""
    install(session, "peers")
    session.run(PYTHON, "benchmarks/table.py", *session.posargs)


@nox.session(python=False)
def dev(session: nox.Session) -> None:
    """Make .venv with everything that a contributor needs."""
    install(session, "dev", environment=ROOT / ".venv")
    session.log("activate it with: . .venv/bin/activate")
