"""The documentation site: `python -m nox -s docs` builds it into build/site, from README, docs and docstrings."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_site"))
_project = tomllib.loads((HERE.parent / "pyproject.toml").read_text("utf-8"))["project"]

project, release = "Unisono", _project["version"]
copyright = "The Unisono maintainers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "nav", "sources", "rendering"]

# the checkout is the source, so that links between files mean the same here and there
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**", "conformance/unisono_conformance/vectors/README.md"]
exclude_patterns = ["docs/_site", "docs/results/raw", ".*", "build", "node_modules"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_url_schemes = ("http", "https", "mailto", "repo")
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 180
nb_execution_in_temp = True
nb_render_markdown_format = "myst"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
add_module_names = False
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"Unisono {release}"
html_static_path = ["_site/static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_use_index = html_domain_indices = False  # the search finds names; entries of modules would lead nowhere
pygments_style, pygments_dark_style = "friendly", "github-dark"
