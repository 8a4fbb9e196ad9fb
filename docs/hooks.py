"""A hook of MkDocs that shows CONTRIBUTING.md, which is outside of `docs`, as a page."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the text of CONTRIBUTING.md, with links from its new place, for `contributing.md`."""
    if page.file.src_uri != "contributing.md":
        return markdown
    return (ROOT / "CONTRIBUTING.md").read_text().replace("](docs/", "](")
