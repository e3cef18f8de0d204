"""How Sphinx makes the book: `make book`. The pages that are made from runs come from the extension `pages`."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

project = "paged_ref"
author = "the authors of paged_ref"
extensions = ["myst_parser", "sphinx.ext.autodoc", "pages"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["extra", "start_here"]
html_extra_path = ["extra"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a lesson's parts are of one level

html_theme = "furo"
html_title = "paged_ref"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
pygments_style = "default"

autodoc_mock_imports = ["torch", "transformers"]  # the extra `book` has neither
default_role = "code"  # docstrings write names between single backticks
autoclass_content = "both"  # what the arguments mean is in the docstring of __init__
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
nitpicky = False
