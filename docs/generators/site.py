"""Hooks of MkDocs: links from a page to a file of the repository work in the built site.

Pages link to files beside `docs/`, such as the JSON behind a figure. The site gets a copy of each
of those files under `repository/`, and the links lead there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")
COPIES = "repository"


def outside(page: str, target: str) -> str | None:
    """The path in the repository that a link leads to; None where it stays in `docs/`."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's files that pages link to."""
    root = posixpath.dirname(config.docs_dir)
    linked = {
        path
        for file in files.documentation_pages()
        for target in LINK.findall(file.content_string)
        if (path := outside(file.src_uri, target))
    }
    for path in sorted(linked):
        source = posixpath.join(root, path)
        if Path(source).is_file():  # of any other, MkDocs says that the link leads nowhere
            files.append(File.generated(config, f"{COPIES}/{path}", abs_src_path=source))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of `docs/` to the copies."""
    uri = page.file.src_uri

    def led(match: re.Match[str]) -> str:
        path = outside(uri, match[1])
        if path is None:
            return match[1]
        return posixpath.relpath(f"{COPIES}/{path}", posixpath.dirname(uri))

    return LINK.sub(led, markdown)
