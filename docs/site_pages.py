"""A hook of mkdocs: pages that stand elsewhere in the repository, and links between them and to its files.

Documents are written to be read where they are, with links by their places in the repository. On the site a link to a
page leads to the page, and one to any other file to the repository's address (pyproject.toml has it).
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ELSEWHERE = {  # place in the repository: page
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "train/README.md": "train.md",
    "train/answers/README.md": "answers.md",
    "fasteagle_jax/drafters/weights/smollm2-135m/README.md": "shipped.md",
}
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)  # of a model card


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that stand elsewhere."""
    for place, page in ELSEWHERE.items():
        text = _FRONT_MATTER.sub("", (ROOT / place).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links by place in the repository into links of the site."""
    uri = page.file.src_uri
    place = next((place for place, other in ELSEWHERE.items() if other == uri), f"docs/{uri}")
    with (ROOT / "pyproject.toml").open("rb") as file:
        repository = tomllib.load(file)["project"]["urls"]["Repository"]

    def target(match: re.Match[str]) -> str:
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(place), match[1]))
        if not (ROOT / linked).exists():
            raise FileNotFoundError(f"{place} has a link to {match[1]}, which is not there")
        if linked in ELSEWHERE:
            return ELSEWHERE[linked] + (match[2] or "")
        if linked.startswith("docs/"):
            return linked.removeprefix("docs/") + (match[2] or "")
        return f"{repository}/blob/main/{linked}"

    return _LINK.sub(target, markdown)
