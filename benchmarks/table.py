"""Every row of the speed table with its peers, as one table, one JSON file and one chart.

    python benchmarks/table.py                        # all rows
    python benchmarks/table.py --quick                # few rounds and small files
    python benchmarks/table.py --rounds 5             # files in full size, fewer rounds
    python benchmarks/table.py --only step --only import
    python benchmarks/table.py --json table.json --chart table.svg
    python benchmarks/table.py --from table.json --chart table.svg    # measures nothing
    python benchmarks/table.py --from table.json --page page.md       # renews the tables of a page

Each script of this folder runs as a process of its own, one after the other, with --json. A row is
the median ratio of two contenders of the same script, round by round, and the quartiles of these
ratios. Peers that are not installed leave their rows empty, and the table says which. The JSON file
has all other contenders of the scripts as well, and is written anew after each script.

In a page, what stands between the lines ``<!-- measured: NAME -->`` and ``<!-- end -->`` is a table
made of the JSON file: of the rows if NAME is ``rows``, or else of a script, as SCRIPTS names it.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from interleaved import machine, ratios
from rich.console import Console
from rich.table import Table
from rich.text import Text

HERE = pathlib.Path(__file__).parent
WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Script:
    """A script of this folder and its arguments, in full and in a hurry."""

    file: str
    full: str = ""
    quick: str = ""
    needs: tuple[str, ...] = ()  # without them it measures nothing
    rounds: str = "--rounds"  # the option that says how often


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: two contenders of a script."""

    script: str
    what: str
    against: str
    aim: float | None  # the ratio must not be above
    place: tuple[str, ...]  # of the comparison in the script's results
    contender: str
    base: str
    needs: tuple[str, ...] = ()


SCRIPTS = {
    "import": Script("imports.py", quick="--rounds 3"),
    "step": Script("step.py", full="--threads 1", quick="--threads 1 --rounds 3"),
    "compiled": Script(
        "compiled.py", full="--threads 1", quick="--threads 1 --only MLP --rounds 3"
    ),
    "ensemble": Script(
        "ensemble.py",
        full="--threads 1 --only 16 --only dropout",
        quick="--threads 1 --only 16 --rounds 3",
    ),
    "scan": Script("scan.py", full="--threads 1", quick="--threads 1 --rounds 2"),
    "checkpoint": Script("checkpoint.py", quick="--size 40 --rounds 3"),
    "async": Script("async_checkpoint.py", quick="--megabytes 40 --saves 4", rounds="--saves"),
    "lightning": Script("lightning.py", quick="--rounds 2", needs=("pytorch_lightning",)),
    "distributed": Script("distributed.py", quick="--rounds 3 --steps 4"),
    "journal": Script("journal.py", full="--threads 1", quick="--threads 1 --rounds 2"),
    "per_example": Script(
        "per_example.py",
        full="--threads 1",
        quick="--threads 1 --only mlp --rounds 3",
    ),
}

MLP, TINY = "MLP 784-512-512-10, batch 128", "tiny MLP 32-64-10, batch 32"
LOOP = "torch, AdamW(fused=True)"
ROWS = (
    Row("step", "step, MLP", "torch loop", 1.03, (MLP,), "puretrain, donated", LOOP),
    Row(
        "step",
        "fit, progress, TensorBoard, ema",
        "torch loop",
        1.10,
        ("the same through fit",),
        "puretrain.fit, progress, TensorBoard, ema",
        "torch, AdamW(fused=True), nothing else",
    ),
    Row("step", "step, tiny", "torch loop", 1.3, (TINY[5:],), "puretrain, donated", LOOP),
    Row(
        "lightning",
        "Lightning adapter's overhead",
        "pytorch-lightning's",
        0.35,
        ("what a trainer adds to the step by hand",),
        "puretrain.lightning",
        "pytorch-lightning",
    ),
    *(
        Row(
            "compiled",
            f"compiled step, {name}",
            "jax + optax",
            aim,
            (title,),
            "puretrain.compiled",
            "jax and optax",
            needs=("jax", "optax"),
        )
        for name, title, aim in (("MLP", MLP, 1.2), ("tiny", TINY, 3.0))
    ),
    *(
        Row(
            "compiled",
            f"compiled step, {name}",
            "torch loop",
            None,
            (title,),
            "puretrain.compiled",
            LOOP,
        )
        for name, title in (("MLP", MLP), ("tiny", TINY))
    ),
    *(
        Row(
            "ensemble",
            what,
            "16 torch loops",
            0.33,
            ("MLP 32-64-10, batch 32, 16",),
            contender,
            "16 torch loops",
        )
        for what, contender in (
            ("16 tiny models in one step", "ensemble_step"),
            ("the same, compiled", "ensemble_step, compiled"),
        )
    ),
    *(
        Row(
            "checkpoint",
            f"{kind} a state",
            against,
            aim,
            (kind,),
            "puretrain",
            base,
            needs=needs,
        )
        for kind in ("save", "load")
        for against, base, aim, needs in (
            ("the bytes alone", "floor: the bytes alone", 1.15, ()),
            (f"torch.{kind}", "torch.save, torch.load", 1.0, ()),
            ("safetensors", "safetensors", 1.0, ("safetensors",)),
            ("orbax", "orbax-checkpoint", 1.0, ("orbax.checkpoint",)),
        )
    ),
    Row(
        "checkpoint",
        "extra memory while saving",
        "the state's size",
        0.02,
        ("extra memory while saving",),
        "puretrain",
        "the state",
    ),
    Row(
        "async",
        "loop stall, save in background",
        "save at once",
        0.05,
        ("the loop stands still",),
        "in the background",
        "at once",
    ),
    Row("import", "import puretrain", "import torch", 1.10, ("import",), "puretrain", "torch"),
    Row(
        "distributed",
        "step over two processes, ddp",
        "DDP of torch",
        1.05,
        ("tasks", "MLP 784-512-512-10", "rows"),
        "across=ddp(mesh)",
        "DistributedDataParallel",
    ),
    Row(
        "journal", "step with a journal", "without", 1.02, (MLP,), "a step with a journal", "a step"
    ),
    Row(
        "per_example",
        "per-example gradients, 64, MLP",
        "loop over examples",
        None,
        ("gradients of 64 examples, mlp",),
        "per_example.gradients",
        "a loop over the examples, plain torch",
    ),
)


def installed(name):
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it is not there
        return False


def missing(needs):
    return [name for name in needs if not installed(name)]


def versions():
    """The versions of ours and of the peers; None where one is not installed."""
    names = ("puretrain", "torch", "numpy", "pytorch-lightning", "safetensors", "orbax-checkpoint")
    found = {}
    for name in (*names, "jax", "optax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def row_of(row, results):
    """A line of the table as it goes into the JSON file, out of the results of its script.

    Without results (None), or without the contender in them, its ratio is None.
    """
    line = {
        "script": row.script,
        "what": row.what,
        "against": row.against,
        "ratio": None,
        "quartiles": None,
        "rounds": 0,
        "aim": row.aim,
        "reached": None,
    }
    report = results
    for name in row.place:
        report = report and report.get(name)
    if not report or row.contender not in report or row.base not in report:
        return line
    own, base = report[row.contender]["rounds"], report[row.base]["rounds"]
    ratio, quartiles = ratios(own, base)
    reached = None if row.aim is None else ratio <= row.aim
    return line | {
        "ratio": ratio,
        "quartiles": quartiles,
        "rounds": len(own),
        "reached": reached,
    }


def details_of(results, title=""):
    """All comparisons in the results of a script, by their titles, without the single rounds."""
    found = {}
    for name, report in results.items():
        if not isinstance(report, dict):
            continue
        rows = {key: row for key, row in report.items() if isinstance(row, dict) and "ratio" in row}
        if rows:
            kept = ("ratio", "quartiles", "seconds", "bytes")
            found[title or name] = {
                key: {field: row[field] for field in kept if row.get(field) is not None}
                for key, row in rows.items()
            }
        else:  # the comparisons are one storey below
            found |= details_of(report, name if "rows" in report else "")
    return found


def run(script, *, quick, rounds=None):
    """Run a script; returns its results, or None and why there are none."""
    absent = missing(script.needs)
    if absent:
        return None, f"not installed: {', '.join(absent)}"
    with tempfile.TemporaryDirectory(prefix="puretrain-bench-") as directory:
        path = pathlib.Path(directory) / "results.json"
        arguments = (script.quick if quick else script.full).split()
        arguments += [script.rounds, str(rounds)] if rounds else []
        done = subprocess.run(
            [sys.executable, str(HERE / script.file), *arguments, "--json", str(path)],
            check=False,
            capture_output=True,
            text=True,
        )
        # A script that has measured may still say by its exit status that an aim was missed.
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))["results"], None
    last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    return None, f"failed with exit status {done.returncode}: {last}"


def measure(names, *, quick, say, rounds=None, keep=lambda found: None):
    """Run scripts one after the other, and make what the JSON file holds; keep it after each."""
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"load": list(os.getloadavg()) if os.name == "posix" else None},
        "versions": versions(),
        "quick": quick,
        "rows": [],
        "notes": [],
        "details": {},
    }
    lines, notes = found["rows"], found["notes"]
    order = [(row.what, row.against) for row in ROWS]
    for name in names:
        begin = time.perf_counter()
        say(f"{SCRIPTS[name].file} …", end=" ")
        results, trouble = run(SCRIPTS[name], quick=quick, rounds=rounds)
        say(trouble or f"{time.perf_counter() - begin:.0f} s")
        if trouble:
            notes.append(f"{SCRIPTS[name].file}: {trouble}")
        mine = [row for row in ROWS if row.script == name]
        lines += [row_of(row, results) for row in mine]
        if results is not None:
            absent = {need for row in mine for need in missing(row.needs)}
            notes += [f"{SCRIPTS[name].file}: not installed: {need}" for need in sorted(absent)]
            found["details"][name] = details_of(results)
        lines.sort(key=lambda line: order.index((line["what"], line["against"])))
        keep(found)
    return found


def number(value):
    """A ratio with three digits that say something."""
    return f"{value:.3f}" if value < 0.995 else f"{value:.2f}"


def verdict(line):
    """In a word, whether a line reached its aim."""
    if line["ratio"] is None:
        return "absent"
    return {None: "", True: "reached", False: "missed"}[line["reached"]]


def show(found, console):
    """Print the table, in 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), width=WIDTH)
    table.add_column("what", ratio=1)
    table.add_column("against", max_width=19)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("quartiles", no_wrap=True)
    table.add_column("aim", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    colors = {"reached": "green", "missed": "red", "absent": "dim", "": ""}
    for line in found["rows"]:
        measured = line["ratio"] is not None
        table.add_row(
            line["what"],
            line["against"],
            number(line["ratio"]) if measured else "–",
            "–".join(map(number, line["quartiles"])) if measured else "",
            "" if line["aim"] is None else f"{line['aim']:g}",
            Text(verdict(line), style=colors[verdict(line)]),
        )
    facts = {**found["machine"], "date": found["date"]}
    console.print("  ".join(f"{name} {value}" for name, value in facts.items()), style="dim")
    have = {name: version for name, version in found["versions"].items() if version}
    console.print("  ".join(f"{name} {version}" for name, version in have.items()), style="dim")
    if found["quick"]:
        console.print("A quick run: few rounds and small files; the numbers are rough.")
    console.print(table)
    for note in found["notes"]:
        console.print(note)


def markdown(found):
    """The table for a page."""
    lines = ["| what | against | ratio | aim | |", "|---|---|---|---|---|"]
    for line in found["rows"]:
        measured = "not measured"
        if line["ratio"] is not None:
            low, high = map(number, line["quartiles"])
            measured = f"{number(line['ratio'])}x [{low}, {high}]"
        aim = "" if line["aim"] is None else f"{line['aim']:g}x"
        words = {"reached": "reached", "missed": "**missed**", "absent": "", "": ""}
        cells = (line["what"], line["against"], measured, aim, words[verdict(line)])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def tables(comparisons):
    """The comparisons of a script for a page, a table for each."""
    found = []
    for title, report in comparisons.items():
        columns = ["ratio"]
        columns += ["time"] if any("seconds" in row for row in report.values()) else []
        columns += ["MB"] if any("bytes" in row for row in report.values()) else []
        lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for number_of_row, (name, row) in enumerate(report.items()):
            low, high = map(number, row["quartiles"])
            ratio = f"{number(row['ratio'])}x [{low}, {high}]" if number_of_row else "1"
            cells = {
                "ratio": ratio,
                "time": duration(row["seconds"]) if "seconds" in row else "",
                "MB": f"{row['bytes'] / 1e6:.2f}" if "bytes" in row else "",
            }
            lines.append(f"| {name} | {' | '.join(cells[column] for column in columns)} |")
        found.append("\n".join(lines) + "\n")
    return "\n".join(found)


def duration(seconds):
    """Seconds in a unit that leaves three digits before or behind the point."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def renewed(page, found):
    """A page with the tables of what was measured in the place of those that it has."""

    def table(match):
        name = match["name"]
        text = markdown(found) if name == "rows" else tables(found["details"].get(name, {}))
        return f"{match['begin']}\n{text}\n{match['end']}"

    marks = r"(?P<begin><!-- measured: (?P<name>\w+) -->\n).*?(?P<end><!-- end -->)"
    return re.sub(marks, table, page, flags=re.DOTALL)


def draw(found, path):
    """The ratios as bars to both sides of 1, with the quartiles, and the aims as marks."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    lines = [line for line in found["rows"] if line["ratio"] is not None]
    colors = {"reached": "#059669", "missed": "#d97706", "": "#aab3c2"}
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "puretrain", "font.size": 9}):
        figure = Figure(figsize=(7.6, 1.0 + 0.27 * len(lines)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        for name, color in colors.items():
            at = [i for i, line in enumerate(lines) if verdict(line) == name]
            mine = [lines[i] for i in at]
            if not mine:
                continue
            spread = [
                [max(line["ratio"] - line["quartiles"][0], 0) for line in mine],
                [max(line["quartiles"][1] - line["ratio"], 0) for line in mine],
            ]
            lengths = [line["ratio"] - 1 for line in mine]
            label = {"reached": "aim reached", "missed": "aim missed", "": "no aim"}[name]
            axes.barh(at, lengths, 0.7, left=1, xerr=spread, color=color, label=label, capsize=2)
        aims = [(i, line["aim"]) for i, line in enumerate(lines) if line["aim"] is not None]
        if aims:
            axes.plot(*zip(*[(aim, i) for i, aim in aims], strict=True), "k|", ms=11, label="aim")
        axes.axvline(1, color="#475569", linewidth=0.8)
        names = [f"{line['what']} / {line['against']}" for line in lines]
        axes.set_yticks(range(len(lines)), names)
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("ratio; left of 1 is less than the peer takes (logarithmic)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, loc="outside upper left", ncols=4)
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def keep(found, path):
    """Write what was measured to a file, if it is wanted."""
    if path:
        text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
        pathlib.Path(path).write_text(text, encoding="utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds and small files")
    parser.add_argument("--rounds", type=int, help="instead of what each script takes, from 3 on")
    parser.add_argument("--only", choices=SCRIPTS, action="append", help="may be repeated")
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    parser.add_argument("--chart", metavar="FILE", help="draw the ratios there (.svg, .png)")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there")
    parser.add_argument(
        "--page", metavar="FILE", action="append", default=[], help="renew its tables"
    )
    parser.add_argument("--from", dest="source", metavar="FILE", help="show an earlier --json")
    options = parser.parse_args(arguments)
    console = Console(width=WIDTH, highlight=False)
    if options.source:
        found = json.loads(pathlib.Path(options.source).read_text(encoding="utf-8"))
        if options.only:
            found["rows"] = [line for line in found["rows"] if line["script"] in options.only]
    else:
        names = options.only or list(SCRIPTS)
        rounds = max(options.rounds, 3) if options.rounds else None
        found = measure(
            names,
            quick=options.quick,
            rounds=rounds,
            say=console.print,
            keep=lambda found: keep(found, options.json),
        )
    show(found, console)
    keep(found, options.json)
    if options.markdown:
        pathlib.Path(options.markdown).write_text(markdown(found), encoding="utf-8")
    for page in map(pathlib.Path, options.page):
        page.write_text(renewed(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    if options.chart:
        draw(found, options.chart)
    return 1 if any("failed" in note for note in found["notes"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
