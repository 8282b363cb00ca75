"""What `mkdocs build` needs beyond docs/: pages and files of the repository outside it.

Links on the pages are as GitHub takes them, from file to file. Where they leave docs/, the file is
put on the site: a page of MOUNTED at its place, any other below files/.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MOUNTED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "internals/contributing.md",
    "README.md": "index.md",  # the site has a start of its own: only links go there
    "benchmarks/README.md": "running-benchmarks.md",
    "csrc/README.md": "internals/csrc.md",
    "examples/README.md": "examples.md",
}
OWN = {"README.md"}  # of those, what is not shown itself
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def _source(uri: str) -> Path:
    """The file of the repository that a page of the site is made from."""
    shown = {place: name for name, place in MOUNTED.items() if name not in OWN}
    return ROOT / shown[uri] if uri in shown else DOCS / uri


def _linked(page: Path, link: str) -> Path | None:
    """The file of the repository that a link names; None for an address, or what is not there."""
    if re.match(r"[a-z]+:", link):
        return None
    path = Path(os.path.normpath(page.parent / link))
    return path if path.is_relative_to(ROOT) and path.exists() else None


def _place(path: Path) -> str:
    """Where on the site a file of the repository is."""
    name = path.relative_to(ROOT).as_posix()
    if name in MOUNTED:
        return MOUNTED[name]
    return path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else f"files/{name}"


def on_files(files: Files, config: Any) -> Files:
    """Adds the mounted pages, and what any page links to outside docs/."""
    for name, place in MOUNTED.items():
        if name not in OWN:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    for page in list(files.documentation_pages()):
        source = _source(page.src_uri)
        for _, link, _, _ in LINK.findall(source.read_text(encoding="utf-8")):
            path = _linked(source, link)
            if path is None or not path.is_file() or path.is_relative_to(DOCS):
                continue
            if files.get_file_from_path(_place(path)) is None:
                files.append(File.generated(config, _place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from file to file of the repository become links from place to place of the site."""
    uri = page.file.src_uri
    source = _source(uri)

    def moved(match: re.Match[str]) -> str:
        path = _linked(source, match[2])
        if path is None or not path.is_file():
            return match[0]
        link = os.path.relpath(_place(path), os.path.dirname(uri) or ".")
        return f"{match[1]}{link}{match[3] or ''}{match[4]}"

    return LINK.sub(moved, markdown)
