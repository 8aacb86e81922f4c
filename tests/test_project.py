"""The repository's own promises: its commands, pins, version and links."""

import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import puretrain

ROOT = pathlib.Path(__file__).parents[1]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text, *languages):
    """The fenced blocks of a Markdown text in one of the languages."""
    fences = re.findall(r"^```(\S*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [body for language, body in fences if language in languages]


def commands(text):
    found = blocks(text, "", "sh", "bash", "shell", "console", "powershell")
    return [line for body in found for line in body.splitlines() if line.strip()]


def test_readme_has_two_commands_and_ci_runs_them():
    demo, tests = commands(read("README.md"))
    assert demo == "python3 noxfile.py -s demo"
    assert tests == "python3 noxfile.py -s tests"
    steps = re.findall(r"^run (.*)$", read(".ci/run"), flags=re.MULTILINE)
    assert demo in steps
    assert steps[-1] == tests


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = max(blocks(read("README.md"), "python"), key=len)
    assert "pt.fit" in example
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "state.ckpt").is_file()


def requirements():
    project = tomllib.loads(read("pyproject.toml"))
    groups = [
        *project["dependency-groups"].values(),
        *project["project"]["optional-dependencies"].values(),
    ]
    lines = [line for group in groups for line in group if isinstance(line, str)]
    return [Requirement(line) for line in project["project"]["dependencies"] + lines]


def pins():
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): v for name, v in (line.split("==") for line in lines)}


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_each_dependency_is_pinned_within_its_range(requirement):
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_functorch_is_asked_for_nowhere():
    names = {canonicalize_name(requirement.name) for requirement in requirements()}
    assert "functorch" not in names | set(pins())


def test_each_dependency_has_its_reason():
    section = read("pyproject.toml").partition("\ndependencies")[2].partition("[tool.")[0]
    lines = re.findall(r'^    ".*$', section, flags=re.MULTILINE)
    assert len(lines) == len(requirements())
    assert all(re.search(r'", +# \S', line) for line in lines)


def test_the_version_stands_in_one_place():
    project = tomllib.loads(read("pyproject.toml"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "puretrain/__init__.py"
    newest = re.search(r"^## \[(.+?)\]", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == puretrain.__version__


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(name):
    links = re.findall(r"\]\(([^)#]+)", read(name))
    assert links
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing
