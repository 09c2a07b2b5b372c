"""The site that `make docs` builds: the pages of the repository, and the reference from docstrings.

The source folder is the repository, so that links and figures are the same here and where the
repository is read. Nothing is loaded from the network, neither by the build nor by the pages.
"""

import shutil
from pathlib import Path

import fused_bce

project = "fused_bce"
author = copyright = "The fused_bce developers"
version = release = fused_bce.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "benchmarks/README.md"]
exclude_patterns = [".*", "build", "dist", "demo-output"]

# The navigation. It is no part of README.md, which is read without Sphinx, too.
PAGES = {
    "Using it": [
        "guide",
        "lightning",
        "transformers",
        "extras",
        "focal",
        "head",
        "pairwise",
        "troubleshooting",
    ],
    "What it does": ["coverage", "accuracy", "speed", "how-it-works"],
    "Building it": ["install"],
    "Reference": ["reference"],
}
PROJECT = ["benchmarks/README", "CONTRIBUTING", "docs/promises", "CHANGELOG"]

html_theme = "furo"
html_title = f"fused_bce {version}"
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 3  # as links to headings are written, docs/speed.md#by-size

# Google's sections, and the one that torch's docstrings have.
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape", "Not replaced"]
autodoc_typehints = "none"  # the signature of torch's, with the types in words below it
# A reference that does not exist is an error; those of torch and Python are not on this site.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"torch\..*|typing\..*")]


def setup(app):
    app.connect("source-read", add_navigation)
    app.connect("build-finished", add_index)


def add_navigation(app, name: str, source: list[str]) -> None:
    if name != root_doc:
        return
    groups = {title: [f"docs/{page}" for page in pages] for title, pages in PAGES.items()}
    for title, pages in (groups | {"The project": PROJECT}).items():
        source[0] += "\n".join(
            ["", "```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```", ""]
        )


def add_index(app, exception) -> None:
    """README.html is the front page; a web server looks for index.html."""
    if exception is None and app.builder.name == "html":
        shutil.copyfile(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))
