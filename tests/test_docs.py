"""What the pages claim: the tests and files that they name, and the picture of the architecture."""

import pathlib
import re
import runpy
import types
import xml.etree.ElementTree as ET

import pytest

ROOT = pathlib.Path(__file__).parents[1]
draw_rooms = types.SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "draw_rooms.py")))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"\b(?:tests|examples|benchmarks|puretrain|docs)/[\w/-]+\.\w+", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_tests_that_a_page_names_are_there(page):
    text = " ".join(page.read_text(encoding="utf-8").split())  # a command may be wrapped
    for file, quoted, word in re.findall(r'`(tests/[\w/]+\.py) -k (?:"([^"]+)"|(\w+))`', text):
        source = (ROOT / file).read_text(encoding="utf-8")
        tests = re.findall(r"^ *def (test_\w+)", source, flags=re.MULTILINE)
        for part in (quoted or word).split(" or "):
            assert any(part in test for test in tests), f"{file} has no test {part!r}"


def prose(page):
    """The text of a page without its blocks of code."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """The anchors of a page's headings, as both Sphinx and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path)
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_each_room_has_its_paragraph():
    assert sorted(draw_rooms.paragraphs(ARCHITECTURE)) == sorted(draw_rooms.rooms(ARCHITECTURE))


def test_the_picture_shows_the_imports():
    order = draw_rooms.rooms(ARCHITECTURE)
    pairs = draw_rooms.imports(order)
    assert {("step", "optim"), ("loop", "state"), ("cli", "checkpoint")} <= pairs
    page = draw_rooms.with_picture(ARCHITECTURE)
    (drawn,) = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    space = "{http://www.w3.org/2000/svg}"
    svg = ET.fromstring(drawn)
    assert sorted(text.text for text in svg.iter(f"{space}text")) == sorted(2 * order)
    dots = list(svg.iter(f"{space}circle"))
    assert len(dots) == len(pairs)
    assert all(float(dot.get("cx")) < float(dot.get("cy")) for dot in dots)  # below the diagonal
