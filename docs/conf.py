"""The site of the documentation: `make docs` builds it from the Markdown pages, warnings are errors."""

import re
from pathlib import Path

from panorama_vlm import __version__
from sphinx.errors import ExtensionError

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "readme.md",
    "SECURITY.md": "security.md",
    "docs/search.md": "searching.md",  # search.html is the field that searches the site
}

project = "PanoramaVLM"
copyright = "the PanoramaVLM maintainers, Apache-2.0"
version = release = __version__
html_title = f"PanoramaVLM {__version__}"
html_theme = "furo"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 4  # links such as views.md#the-table
exclude_patterns = ["search.md"]

# The docstrings are Google's, with Markdown's single backticks for code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
add_module_names = False
nitpicky = False  # types of torch and transformers have no pages here


def page_of(path, anchor, words, where):
    """A Markdown link to a file of the repository, as the site has it: to its page; of code, the path."""
    if not (ROOT / path).exists():
        raise ExtensionError(f"{where} links to {path}, which is not there")
    if path in PAGES or path.startswith("docs/"):
        page = PAGES.get(path, path.removeprefix("docs/"))
        return f"[{words}]({page}{anchor or ''})"
    return f"`{path}`" if words.strip("`").rstrip("/") in (path, Path(path).name) else f"{words} (`{path}`)"


def of_pages(app, name, source):
    """Pages link to other files of the repository by `../FILE`."""
    link = r"\[([^\]]+)\]\(\.\./([\w./-]+)(#[\w-]+)?\)"
    text = re.sub(link, lambda match: page_of(match[2], match[3], match[1], f"{name}.md"), source[0])
    source[0] = text.replace("](search.md", "](searching.md")


def of_root(app, path, name, source):
    """CHANGELOG and the like, included into a page, lie at the root and link from there."""
    if Path(path).name in PAGES:
        link = r"(?<!!)\[([^\]]+)\]\(([\w./-]+)(#[\w-]+)?\)"
        text = re.sub(r"\A---\n.*?\n---\n", "", source[0], flags=re.DOTALL)  # what the Hub reads
        text = re.sub(link, lambda match: page_of(match[2], match[3], match[1], Path(path).name), text)
        source[0] = text.replace("](docs/", "](")  # pictures


def fences(app, what, name, obj, options, lines):
    """A block between ``` in a docstring is a literal block."""
    inside, made = False, []
    for line in lines:
        if line.strip() == "```":
            inside = not inside
            made += [".. code-block:: text", ""] if inside else [""]
        else:
            made.append("   " * inside + line)
    lines[:] = made


def setup(app):
    app.connect("source-read", of_pages)
    app.connect("include-read", of_root)
    app.connect("autodoc-process-docstring", fences)
