"""MkDocs hook: files of the repository that pages link to outside docs/ become part of the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
_OUTSIDE = re.compile(r"\]\(\.\./([\w./\-]+)\)")


def _uri(name: str) -> str:
    """Where the site has it: a page, which mkdocs.yml names in its nav, or a file."""
    return Path(name).name.lower() if name.endswith(".md") else f"files/{name}"


def on_files(files: Files, config: Any) -> Files:
    """Adds every `](../path)` that is a file; MkDocs reports the links to others."""
    pages = [file for file in files if file.src_uri.endswith(".md")]
    names = {name for page in pages for name in _OUTSIDE.findall(page.content_string)}
    for name in sorted(names):
        if (ROOT / name).is_file():
            files.append(File.generated(config, _uri(name), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points the links there. All pages lie in docs/ itself."""
    return _OUTSIDE.sub(lambda link: f"]({_uri(link[1])})", markdown)
