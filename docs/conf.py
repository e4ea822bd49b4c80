"""Sphinx's configuration; `make docs` builds with it, warnings being errors."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import cupynorm  # noqa: E402
from docs._generate import everything, inventories  # noqa: E402

# What else lies in the checkout is no module: with the folder out/ that `make demo` leaves, the
# parameter `out` of every docstring would be a link to a package that has no page.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]

project = "cupynorm"
author = "the cupynorm developers"
copyright = "the cupynorm developers, Apache-2.0"
release = version = cupynorm.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "numpydoc",
    "myst_nb",
    "sphinx_copybutton",
]
root_doc = "index"
exclude_patterns = ["_generate", "_static", "_templates", "inventories", "generated/parts"]
exclude_patterns += ["**/.ipynb_checkpoints"]

# ---- text ----
nitpicky = True
default_role = "autolink"  # `x` in a docstring: a link where it names something, else italics
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
# Notebooks are shown with the output that they are stored with; the tests run them.
nb_execution_mode = "off"
nb_merge_streams = True

# ---- docstrings ----
autodoc_typehints = "none"  # the docstrings say it, with shapes
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
autosummary_generate = True
numpydoc_show_class_members = False  # the template asks autodoc for them
numpydoc_xref_param_type = False
# Offline: small inventories in the checkout (`python -m docs._generate.inventories` renews them).
intersphinx_mapping = inventories.packed(HERE / "inventories", HERE / "generated" / "inventories")
intersphinx_disabled_reftypes = ["std:*"]

# ---- looks ----
templates_path = ["_templates"]
html_theme = "pydata_sphinx_theme"
html_title = f"cupynorm {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"**": ["site-nav"]}
html_theme_options = {
    "navbar_start": ["navbar-logo"],
    "navbar_center": [],
    "navbar_end": ["theme-switcher"],
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": True,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def setup(app):
    """Write the generated pages, then let every page's links lead to pages of the site."""
    everything.write(HERE / "generated")
    app.connect("source-read", _links_of_the_site)


def _links_of_the_site(app, docname, source):
    source[0] = everything.with_links_of_the_site(source[0], docname)
