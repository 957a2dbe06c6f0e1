"""MkDocs hook: linked files outside docs/ become part of the site, which must fetch nothing from elsewhere."""

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
_LOG = logging.getLogger("mkdocs.hooks")
_FETCHED = re.compile(r"<(?:script|img|iframe|link)[^>]* (?:src|href)=\"?(https?://[^\"\s>]+)")
_NESTED = re.compile(
    r"^ {3}- ", re.M
)  # under "1. ", as CommonMark wants it; Python-Markdown wants four spaces
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
    """Points the links there, and indents nested lists. All pages lie in docs/ itself."""
    return _OUTSIDE.sub(lambda link: f"]({_uri(link[1])})", _NESTED.sub("    - ", markdown))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Warns, which ends a strict build, of what a reader without network would miss, and of a module for a function."""
    for source in _FETCHED.findall(output):
        _LOG.warning("%s fetches %s; keep it in the site", page.file.src_uri, source)
    if "doc-symbol-module" in output:
        _LOG.warning(
            "%s documents a module where a function has its name; give the full path", page.file.src_uri
        )
    return output
