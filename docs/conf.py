"""The site: ``nox -s docs``. Nothing is fetched when it is built or read."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import tables  # noqa: E402

project = "zndraw-joblib"
copyright = "the authors of zndraw-joblib"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["structures"]
language = "en"
html_theme = "furo"
html_title = project
html_show_sphinx = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["tables.css"]
# every heading can be linked to, and a link to one that is not there fails
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"exclude-members": "model_config"}
napoleon_google_docstring = False


def fill_in(app, name, source):
    """Put what is made from the code where a page asks for it."""
    for what, make in tables.GENERATED.items():
        mark = f"<!-- generated: {what} -->"
        if mark in source[0]:
            source[0] = source[0].replace(mark, make())


def setup(app):
    app.connect("source-read", fill_in)
