"""How the site is built: ``make docs``; ``make docs-quick`` leaves out whatever runs code."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

import skipscope

RUN = os.environ.get("SKIPSCOPE_DOCS_RUN", "1") != "0"
# Where notebooks open in the cloud, such as https://colab.research.google.com/github/OWNER/REPO/blob/gh-pages.
notebooks_base = os.environ.get("SKIPSCOPE_DOCS_NOTEBOOKS", "").rstrip("/")

project, author, copyright = "skipscope", "The skipscope developers", "The skipscope developers"
version = release = skipscope.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinx_design",
    "snippets",
    "site_parts",
]
# Tables that a target of make writes need not be in a table of contents.
suppress_warnings = ["toc.not_included"]
exclude_patterns = ["_build", "sg_execution_times.rst", "gallery/sg_execution_times.rst"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3
snippets_run = RUN

templates_path = ["_templates"]
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "__init__, __new__"}
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Options", "params_style")]
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "skipscope"
html_static_path = ["_static"]
html_css_files = ["site.css", "charts.css"]
html_math_renderer = "mathml"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0067a5",
        "color-brand-content": "#0067a5",
    },
    "dark_css_variables": {
        "color-brand-primary": "#6bb8ee",
        "color-brand-content": "#6bb8ee",
    },
}
pygments_style, pygments_dark_style = "friendly", "monokai"

sphinx_gallery_conf = {
    "examples_dirs": ["../examples/gallery"],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"\.py$",
    "plot_gallery": RUN,
    "capture_repr": ("_repr_html_",),
    "image_scrapers": ("matplotlib",),
    "within_subsection_order": "FileNameSortKey",
    "backreferences_dir": "api",
    "doc_module": ("skipscope",),
    "reference_url": {"skipscope": None},
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "min_reported_time": 1000,
    "abort_on_example_error": True,
    "copyfile_regex": r"",
    "first_notebook_cell": "# Needs skipscope and torch.",
}
