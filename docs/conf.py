"""Configuration of the site: ``python -m sphinx -W --keep-going -b html docs docs/_build``."""

from sphinx.application import Sphinx

from mmkw import __version__

project = 'mmkw'
version = release = __version__
extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.autosummary',
    'sphinx.ext.napoleon',
]
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = f'mmkw {release}'
html_show_copyright = False
html_static_path = ['site.css']
html_css_files = ['site.css']

# Headings can be linked as on GitHub: page.md#a-heading.
myst_heading_anchors = 3
autodoc_typehints = 'none'
autodoc_member_order = 'bysource'
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Files outside docs/ that are pages of the site. On GitHub, links lead to the files.
INCLUDED = {
    '../CHANGELOG.md': 'changelog.md',
    '../SECURITY.md': 'security.md',
    '../mmkw/ops/csrc/README.md': 'compiled_kernels.md',
}


def link_to_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turns links to the included files into links to their pages."""
    for path, page in INCLUDED.items():
        source[0] = source[0].replace(f']({path})', f']({page})')


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect('source-read', link_to_pages)
