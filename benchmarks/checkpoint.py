"""Saving and loading a state, against the disk itself and against other libraries.

    python benchmarks/checkpoint.py                      # 400 MB in a temporary directory
    python benchmarks/checkpoint.py --size 100 --rounds 5 --directory /mnt/disk

The floor is the same bytes written with plain system calls and fsync, and read with plain system
calls into new memory, by one thread. All contenders take turns. A save is timed until the
bytes are on the disk: those that don't call fsync themselves have it called for them. What is read
is in the operating system's cache, so that the processor's share shows, and it goes into memory
that the process has not had before, as when a run is resumed.

safetensors and orbax-checkpoint take part where they are installed; orbax has arrays of numpy.
"""

import argparse
import ctypes
import gc
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

import torch
from interleaved import compare, machine, write_json

import puretrain as pt

PIECE = 1 << 20


def make_state(megabytes):
    """A state as of AdamW: parameters of several sizes, two moments of each, and small things."""
    generator = torch.Generator().manual_seed(0)
    total = megabytes * 1_000_000 // 4 // 3
    rows = max(total // 8 // 1024, 1)
    shapes = {f"layer{i}.weight": (rows, 1024) for i in range(8)}
    shapes |= {f"layer{i}.bias": (1024,) for i in range(8)}
    trees = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    params, mu, nu = map(pt.FrozenDict, trees)
    return pt.TrainState.create(params, key=pt.random.key(0), opt_state=pt.FrozenDict(mu=mu, nu=nu))


def flat(state):
    """The tensors by name, for libraries that know nothing else."""
    names = [pt.tree.path_string(path) for path in pt.tree.tree_paths(state)]
    return dict(zip(names, pt.tree.tree_leaves(state), strict=True))


def write_floor(path, tensors):
    """The bytes, and nothing else, on the disk under their name."""
    temporary = f"{path}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for tensor in tensors.values():
        view = pt.tree.tensor_bytes(tensor)
        while view:
            view = view[os.write(descriptor, view[:PIECE]) :]
    os.fsync(descriptor)
    os.close(descriptor)
    os.replace(temporary, path)
    sync(os.path.dirname(path))


def read_floor(path, tensors):
    """The bytes, and nothing else, in new memory."""
    found = []
    descriptor = os.open(path, os.O_RDONLY)
    for tensor in tensors.values():
        new = torch.empty_like(tensor)
        view = pt.tree.tensor_bytes(new)
        while view:
            view = view[os.readv(descriptor, [view]) :]
        found.append(new)
    os.close(descriptor)
    return found


def sync(path):
    """Wait until a file or directory, and all below it, is on the disk."""
    paths = [path]
    if os.path.isdir(path):
        paths += [str(inner) for inner in pathlib.Path(path).rglob("*")]
    for each in paths:
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def contenders(directory, state):
    """(save, load) by name; the floor comes first."""
    tensors = flat(state)
    paths = {name: f"{directory}/{name}" for name in ("floor", "pt", "torch", "safetensors")}

    def torch_save():
        torch.save(tensors, paths["torch"])
        sync(paths["torch"])

    found = {
        "floor: the bytes alone": (
            lambda: write_floor(paths["floor"], tensors),
            lambda: read_floor(paths["floor"], tensors),
        ),
        "puretrain": (
            lambda: pt.save(paths["pt"], state),
            lambda: pt.load(paths["pt"], like=state),
        ),
        "torch.save, torch.load": (torch_save, lambda: torch.load(paths["torch"])),
    }
    if importlib.util.find_spec("safetensors"):
        import safetensors.torch

        def safetensors_save():
            safetensors.torch.save_file(tensors, paths["safetensors"])
            sync(paths["safetensors"])

        def safetensors_load():
            # It maps the file; the bytes are in memory of one's own when they have been copied.
            loaded = safetensors.torch.load_file(paths["safetensors"])
            return {name: tensor.clone() for name, tensor in loaded.items()}

        found["safetensors"] = (safetensors_save, safetensors_load)
    if importlib.util.find_spec("orbax") and importlib.util.find_spec("orbax.checkpoint"):
        import orbax.checkpoint

        # It refuses empty arrays; there is one, the memory of a source that keeps its own place.
        arrays = {name: tensor.numpy() for name, tensor in tensors.items() if tensor.numel()}
        checkpointer = orbax.checkpoint.PyTreeCheckpointer()

        def orbax_save():
            checkpointer.save(f"{directory}/orbax", arrays, force=True)
            sync(f"{directory}/orbax")

        found["orbax-checkpoint"] = (
            orbax_save,
            lambda: checkpointer.restore(f"{directory}/orbax"),
        )
    return found


def once(function):
    """A turn of one save or load; what it returns is let go outside of the next one's time."""

    def turn():
        function()
        return 1

    return turn


def forget():
    """Give freed memory back to the operating system, so that everybody begins without."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


MEASURE = """
import re, sys
sys.path.insert(0, sys.argv[1])
import puretrain as pt
from checkpoint import flat, make_state, torch

def memory(what):
    with open("/proc/self/status") as file:
        return int(re.search(what + r":\\s+(\\d+)", file.read())[1]) << 10

def save(state):
    if sys.argv[3] == "puretrain":
        pt.save(sys.argv[4], state)
    else:
        torch.save(flat(state), sys.argv[4])

save(make_state(4))  # the libraries' own code is in memory now
state = make_state(int(sys.argv[2]))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = memory("VmRSS")
save(state)
print(max(memory("VmHWM") - before, 0), sum(tensor.nbytes for tensor in flat(state).values()))
"""


def extra_memory(directory, megabytes, library):
    """How far the peak of memory rises during a save, as a share of the state's size."""
    here = str(pathlib.Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, here, str(megabytes), library, f"{directory}/memory"],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(pt.__file__).parents[1])},
    )
    extra, size = map(int, done.stdout.split())
    return {"bytes": extra, "share": extra / size, "rounds": [extra]}


def show(title, report, size, target):
    """Print one comparison."""
    print(f"\n{title}  (to reach: {target})")
    for name, row in report.items():
        low, high = row["quartiles"]
        print(
            f"  {name:<26} {row['seconds'] * 1e3:>8.0f} ms {size / row['seconds'] / 1e9:>6.2f} GB/s"
            f"   {row['ratio']:>6.3f}x  [{low:.3f}, {high:.3f}]"
        )
    sys.stdout.flush()


def disk_of(directory):
    """The file system that a directory is on."""
    if not shutil.which("findmnt"):
        return "unknown"
    command = ["findmnt", "-n", "-o", "FSTYPE,SOURCE", "--target", directory]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return " ".join(found.stdout.split())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=400, metavar="MB", help="of the state")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--directory", help="where to write; by default a temporary one")
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    options = parser.parse_args()
    state = make_state(options.size)
    size = sum(tensor.nbytes for tensor in flat(state).values())
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="puretrain-bench-") as directory:
        facts = {**machine(), "file system": disk_of(directory), "bytes": size}
        print(", ".join(f"{key} {value}" for key, value in facts.items()))
        functions = contenders(directory, state)
        for save, _ in functions.values():
            save()
        saves = {name: once(save) for name, (save, _) in functions.items()}
        saves = compare(saves, options.rounds, before=forget)
        show("save", saves, size, "1.15x, and faster than the others")
        loads = {name: once(load) for name, (_, load) in functions.items()}
        loads = compare(loads, options.rounds, before=forget)
        show("load", loads, size, "1.15x, and faster than the others")
        results = {"save": saves, "load": loads, "facts": facts}
        if platform.system() == "Linux":
            del state, functions
            memory = {
                name: extra_memory(directory, options.size, name) for name in ("puretrain", "torch")
            }
            results["extra memory while saving"] = memory | {"the state": {"rounds": [size]}}
            print("\nextra memory while saving  (to reach: 2 % of the state)")
            for name, row in memory.items():
                print(f"  {name:<26} {row['bytes'] / 1e6:>8.1f} MB  {row['share']:.2%}")
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
