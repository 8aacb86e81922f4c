"""Sphinx configuration: Markdown pages, and a reference drawn from the docstrings."""

import pathlib
import sys
from inspect import isclass, isroutine

import puretrain

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import draw_rooms

project = "puretrain"
author = copyright = "The puretrain developers"
version = release = puretrain.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "myst_parser",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"puretrain {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]

# Each reference page is one automodule; what a page shows is the module's __all__.
autodoc_default_options = {
    "members": True,
    "imported-members": True,
    "special-members": "__call__",
    "show-inheritance": True,
}
autodoc_member_order = "bysource"
autosummary_generate = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# A reference that leads nowhere is an error, except for what has no page: other packages, type
# variables, and what annotations name out of the inside of a room.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!puretrain\.).*"),
    ("py:class|py:obj", r"puretrain\..*\.[A-Z]"),
    ("py:class", r"puretrain\.(\w+\.\w+\.|.*\._).*"),
]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3


def plain_attribute(app, what, name, obj, options, lines):
    """Keep napoleon from reading "Note: text" in an attribute's docstring as "type: text"."""
    if what in ("attribute", "data", "property"):
        if lines and lines[0].startswith("Alias for field number"):  # a named tuple's filler
            lines.clear()
        lines[:0] = ["..", ""]  # an empty comment, so that the first line has no colon


def list_names(app, what, name, obj, options, lines):
    """Begin the page of a module with what its functions and classes do, a line each."""
    if what != "module" or not options.get("members"):
        return
    values = {each: getattr(obj, each) for each in obj.__all__}
    names = [each for kind in (isroutine, isclass) for each in values if kind(values[each])]
    if len(names) > 3:
        lines += ["", ".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {each}" for each in names]


def draw_architecture(app, name, source):
    """Put the picture of the rooms into its page."""
    if name == "architecture":
        source[0] = draw_rooms.with_picture(source[0])


def find_room(app, env, node, content):
    """Let a reference to a public name, as ``puretrain.fit``, lead to the room that has it."""
    names = node.get("reftarget", "").split(".")
    if node.get("refdomain") != "py" or names[0] != "puretrain":
        return None
    domain = env.get_domain("py")
    for name in domain.objects:
        parts = name.split(".")
        if parts[0] == "puretrain" and parts[2:] == names[1:]:
            place = (env, node["refdoc"], app.builder, node["reftype"], name, node, content)
            return domain.resolve_xref(*place)
    return None


def setup(app):
    app.connect("missing-reference", find_room)
    app.connect("source-read", draw_architecture)
    app.connect("autodoc-process-docstring", list_names)
    app.connect("autodoc-process-docstring", plain_attribute, priority=400)  # before napoleon's 500
