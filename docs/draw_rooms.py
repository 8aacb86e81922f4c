"""Draw which room of the package imports which, as the page on the architecture shows it.

``python docs/draw_rooms.py > rooms.svg`` writes the picture; conf.py puts it into the page.
"""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PLACE = "<!-- here docs/draw_rooms.py draws which room imports which -->"
CELL, LABELS = 18, 110  # pixels


def rooms(text):
    """The rooms in the order of the line."""
    (line,) = re.findall(r"^errors → .*$", text, flags=re.MULTILINE)
    return line.split(" → ")


def paragraphs(text):
    """What the page says of each room, by its name."""
    found = re.findall(r"(?:^|\n\n)\*\*(\w+)\*\*: (.+?)(?=\n\n|\Z)", text, flags=re.DOTALL)
    return {room: " ".join(said.split()) for room, said in found}


def imports(order):
    """Pairs of rooms of which the first imports the second."""
    pairs = set()
    for room in order:
        place = ROOT / "puretrain" / room
        files = place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
        for file in files:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module == "puretrain":
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [(node.module or "").removeprefix("puretrain.")]
                elif isinstance(node, ast.Import):
                    names = [alias.name.removeprefix("puretrain.") for alias in node.names]
                else:
                    continue
                pairs.update((room, name.split(".")[0]) for name in names)
    return {(one, other) for one, other in pairs if other in order and one != other}


def picture(order, pairs):
    """An SVG: a dot in a room's row and the column of a room that it imports."""
    size = len(order) * CELL
    width, height = LABELS + size + LABELS // 2, size + LABELS
    place = {room: number * CELL + CELL // 2 for number, room in enumerate(order)}
    style = (
        ".rooms {max-width: 100%; height: auto; fill: currentColor; font: 12px sans-serif} "
        ".guide {stroke: currentColor; stroke-opacity: 0.15; fill: none}"
    )
    box = f'width="{width}" viewBox="0 0 {width} {height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="rooms" role="img" {box}>',
        f"<style>{style}</style>",
        "<title>Which room imports which: all dots lie below the diagonal</title>",
    ]
    for room, middle in place.items():
        x, y = LABELS + middle, LABELS + middle
        lines += [
            f'<text x="{LABELS - 8}" y="{y + 4}" text-anchor="end">{room}</text>',
            f'<text transform="translate({x + 4} {LABELS - 8}) rotate(-60)">{room}</text>',
            f'<path d="M{LABELS} {y}H{x}V{LABELS + size}" class="guide"/>',
            f'<rect x="{x - 4}" y="{y - 4}" width="8" height="8" fill-opacity="0.3"/>',
        ]
    for one, other in sorted(pairs, key=lambda pair: (place[pair[0]], place[pair[1]])):
        x, y = LABELS + place[other], LABELS + place[one]
        lines.append(f'<circle cx="{x}" cy="{y}" r="4"><title>{one} → {other}</title></circle>')
    return "\n".join([*lines, "</svg>"])


def with_picture(text):
    """The page with the picture in its place."""
    order = rooms(text)
    drawn = picture(order, imports(order))
    return text.replace(PLACE, f"```{{raw}} html\n{drawn}\n```")


if __name__ == "__main__":
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    print(picture(rooms(page), imports(rooms(page))))
