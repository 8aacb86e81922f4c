"""The table of all benchmarks: how it is collected and drawn, and that each script starts."""

import importlib.util
import json
import pathlib
import re
import runpy
import sys
import xml.etree.ElementTree as ET

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(
    path.name for path in BENCHMARKS.glob("*.py") if "ArgumentParser" in path.read_text("utf-8")
)


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("benchmark_table", BENCHMARKS / "table.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_table", module)  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def row(table, what, against):
    (found,) = [row for row in table.ROWS if (row.what, row.against) == (what, against)]
    return found


STEP = {
    "MLP 784-512-512-10, batch 128": {
        "torch, AdamW(fused=True)": {"rounds": [1.0, 2.0, 4.0]},
        "puretrain, donated": {"rounds": [1.5, 2.0, 4.0]},
    }
}


DETAILS = {
    "MLP, batch 128": {
        "torch": {"ratio": 1.0, "quartiles": [1.0, 1.0], "seconds": 0.00406},
        "ours": {"ratio": 1.02, "quartiles": [1.01, 1.031], "seconds": 4.2e-05, "bytes": 1.5e6},
    }
}


def stored(**changes):
    """What a run has written: a row that reached its aim, one that did not, and one of nobody."""
    line = {
        "script": "step",
        "what": "step, MLP",
        "against": "torch loop",
        "ratio": 1.0,
        "quartiles": [0.98, 1.02],
        "rounds": 15,
        "aim": 1.03,
        "reached": True,
    }
    missed = line | {"what": "step, tiny", "ratio": 1.5, "aim": 1.3, "reached": False}
    absent = line | {"what": "load a state", "against": "orbax", "script": "checkpoint"}
    absent |= {"ratio": None, "quartiles": None, "reached": None, "rounds": 0}
    return {
        "date": "2030-01-02T03:04:05+00:00",
        "machine": {"processor": "abacus", "cores": 2},
        "versions": {"torch": "2.13.0", "jax": None},
        "quick": True,
        "rows": [line, missed, absent],
        "notes": ["checkpoint.py: not installed: orbax.checkpoint"],
        "details": {"step": DETAILS},
        **changes,
    }


def test_a_row_is_the_median_of_the_ratios_of_the_rounds(table):
    line = table.row_of(row(table, "step, MLP", "torch loop"), STEP)
    # The rounds' ratios are 1.5, 1 and 1; that of the medians would be 1 as well, their mean 1.17.
    assert line["ratio"] == 1.0
    assert line["quartiles"] == [1.0, 1.5]
    assert (line["aim"], line["reached"], line["rounds"]) == (1.03, True, 3)


def test_a_row_above_its_aim_has_missed_it(table):
    slow = json.loads(json.dumps(STEP).replace("[1.5, 2.0, 4.0]", "[1.5, 3.0, 4.0]"))
    line = table.row_of(row(table, "step, MLP", "torch loop"), slow)
    assert (line["ratio"], line["reached"]) == (1.5, False)


@pytest.mark.parametrize(
    "results", [None, {}, {"save": {"puretrain": {"rounds": [1.0]}}}, {"save": None}]
)
def test_a_row_without_its_peer_is_empty(table, results):
    line = table.row_of(row(table, "save a state", "orbax"), results)
    assert line["ratio"] is line["quartiles"] is line["reached"] is None
    assert (line["what"], line["against"], line["rounds"]) == ("save a state", "orbax", 0)


def test_each_row_names_a_script_that_is_there_and_is_one_of_a_kind(table):
    assert {row.script for row in table.ROWS} <= set(table.SCRIPTS)
    assert all((BENCHMARKS / script.file).is_file() for script in table.SCRIPTS.values())
    assert len({(row.what, row.against) for row in table.ROWS}) == len(table.ROWS)


def test_a_stored_run_is_shown_in_80_columns(table, tmp_path, capsys):
    path = tmp_path / "found.json"
    path.write_text(json.dumps(stored()))
    assert table.main(["--from", str(path)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert "step, MLP torch loop 1.00 0.980–1.02 1.03 reached" in lines
    assert "step, tiny torch loop 1.50 0.980–1.02 1.3 missed" in lines
    assert "load a state orbax – 1.03 absent" in lines
    assert "checkpoint.py: not installed: orbax.checkpoint" in lines
    assert "abacus" in text
    assert "jax" not in text  # it is not installed, so there is no version of it to tell


def test_the_pages_quote_what_was_measured(table):
    found = json.loads((BENCHMARKS / "measured.json").read_text(encoding="utf-8"))
    marked = set()
    for path in (BENCHMARKS.parent / "docs").glob("*.md"):
        page = path.read_text(encoding="utf-8")
        assert table.renewed(page, found) == page, path.name
        marked |= set(re.findall(r"<!-- measured: (\w+) -->", page))
    only_rows = {"import", "async", "lightning"}
    assert marked == {"rows", *table.SCRIPTS} - only_rows


def test_a_page_gets_the_tables_of_what_was_measured(table, tmp_path, capsys):
    path, page = tmp_path / "found.json", tmp_path / "page.md"
    path.write_text(json.dumps(stored()))
    page.write_text("# A\n\n<!-- measured: step -->\nold\n<!-- end -->\n\nB\n")
    for _ in range(2):  # to renew it again changes nothing
        table.main(["--from", str(path), "--page", str(page)])
        assert page.read_text() == (
            "# A\n\n<!-- measured: step -->\n\n"
            "| MLP, batch 128 | ratio | time | MB |\n|---|---|---|---|\n"
            "| torch | 1 | 4.06 ms |  |\n| ours | 1.02x [1.01, 1.03] | 42 µs | 1.50 |\n"
            "\n<!-- end -->\n\nB\n"
        )


def test_comparisons_are_found_on_each_storey(table):
    step = {"ratio": 1.0, "quartiles": [1.0, 1.0], "seconds": 2.0, "rounds": [2.0]}
    bare = {"ratio": 1.0, "quartiles": [1.0, 1.0], "seconds": 2.0}
    results = {
        "a": {"x": step, "compilation": {"graphs": 1}},
        "facts": {"cores": 2},
        "tasks": {"b": {"rows": {"y": step | {"bytes": None}}, "parameters": 3}},
    }
    assert table.details_of(results) == {"a": {"x": bare}, "b": {"y": bare}}


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4e-6, "4 µs")])
def test_a_duration_has_a_fitting_unit(table, seconds, text):
    assert table.duration(seconds) == text


def test_only_takes_some_rows_of_a_stored_run(table, tmp_path, capsys):
    path, copy = tmp_path / "found.json", tmp_path / "copy.json"
    path.write_text(json.dumps(stored()))
    table.main(["--from", str(path), "--only", "checkpoint", "--json", str(copy)])
    assert [line["what"] for line in json.loads(copy.read_text())["rows"]] == ["load a state"]


def test_a_run_that_failed_says_so_by_its_exit_status(table, tmp_path):
    path = tmp_path / "found.json"
    path.write_text(json.dumps(stored(notes=["step.py: failed with exit status 1: MemoryError"])))
    assert table.main(["--from", str(path)]) == 1


def test_the_chart_has_a_bar_for_each_measured_row_and_is_the_same_each_time(table, tmp_path):
    for name in ("a.svg", "b.svg"):
        table.draw(stored(), tmp_path / name)
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.svg").read_text(encoding="utf-8")
    words = {"".join(node.itertext()).strip() for node in ET.fromstring(text).iter()}
    assert {
        "step, MLP / torch loop",
        "step, tiny / torch loop",
        "aim reached",
        "aim missed",
    } <= words
    assert "load a state / orbax" not in words
    assert text.count("#059669") == text.count("#d97706") == 2  # a bar, and its place in the legend


def test_a_script_that_fails_is_a_note_and_not_a_row(table, monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise ValueError('no disk')")
    monkeypatch.setitem(table.SCRIPTS, "step", table.Script(str(broken)))
    found = table.measure(["step"], quick=True, say=lambda *_, **__: None)
    assert found["notes"] == [f"{broken}: failed with exit status 1: ValueError: no disk"]
    assert {line["ratio"] for line in found["rows"]} == {None}


def test_what_a_script_measured_is_collected(table, monkeypatch, tmp_path):
    """A script may end with another exit status than 0 to say that an aim was missed."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        f"json.dump({{'results': {STEP}}}, open(sys.argv[sys.argv.index('--json') + 1], 'w'))\n"
        "sys.exit(1)\n"
    )
    monkeypatch.setitem(table.SCRIPTS, "step", table.Script(str(script)))
    found = table.measure(["step"], quick=False, say=lambda *_, **__: None)
    assert found["notes"] == []
    ratios = {line["what"]: line["ratio"] for line in found["rows"]}
    assert ratios == {"step, MLP": 1.0, "step, tiny": None, "fit, progress, TensorBoard, ema": None}
    assert set(found) == {"date", "machine", "versions", "quick", "rows", "notes", "details"}


def test_what_was_measured_is_kept_after_each_script(table, monkeypatch):
    monkeypatch.setitem(table.SCRIPTS, "step", table.Script("nothing.py", needs=("nobody.has",)))
    monkeypatch.setitem(table.SCRIPTS, "scan", table.Script("nothing.py", needs=("nobody.has",)))
    kept = []
    table.measure(
        ["step", "scan"],
        quick=True,
        say=lambda *_, **__: None,
        keep=lambda found: kept.append(len(found["notes"])),
    )
    assert kept == [1, 2]


def test_a_script_without_its_peer_is_not_started(table, monkeypatch):
    monkeypatch.setitem(table.SCRIPTS, "step", table.Script("nothing.py", needs=("nobody.has",)))
    found = table.measure(["step"], quick=True, say=lambda *_, **__: None)
    assert found["notes"] == ["nothing.py: not installed: nobody.has"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_says_what_it_takes(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    before = set(sys.modules)
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    finally:
        for module in {"interleaved", "step", "live_memory"} - before:
            sys.modules.pop(module, None)
    assert ended.value.code in {0, None}
    assert "usage:" in capsys.readouterr().out
