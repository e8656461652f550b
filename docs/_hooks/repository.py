"""Pages of the site that lie outside docs/: README.md as the home page, and whatever Markdown files link to.

Links are written for the repository, where they must work too; they are rewritten to the places of the site.
"""

import posixpath
import re
from pathlib import Path
from typing import Dict, Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOTS = ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'experiments/README.md', 'benchmarks/README.md')

# the target of an inline link or image that is neither an address nor an anchor
LINK = re.compile(r'(?<=\]\()(?![a-z]+:|/)([^)\s#]+)')

_places: Dict[str, str] = {}


def place_of(path: str) -> str:
    """The place in the site of a file of the repository."""
    if path == 'README.md':
        return 'index.md'
    return path[len('docs/') :] if path.startswith('docs/') else path


def _targets(path: str, text: str, root: Path) -> Iterator[str]:
    """The files of the repository that a Markdown file links to."""
    for link in LINK.findall(text):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
        if (root / target).is_file():
            yield target


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/, and note where all files of the repository have their place."""
    root = Path(config.config_file_path).parent
    queue = [*ROOTS, *(f'docs/{file.src_uri}' for file in files.documentation_pages())]
    _places.clear()
    while queue:
        path = queue.pop()
        if path in _places:
            continue
        place = place_of(path)
        _places[path] = place
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(root / path)))
        if path.endswith('.md'):
            queue += _targets(path, (root / path).read_text(encoding='utf-8'), root)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between files of the repository; mkdocs reports those that lead nowhere."""
    sources = {place: path for path, place in _places.items()}
    if page.file.src_uri not in sources:
        return markdown
    path = sources[page.file.src_uri]

    def rewrite(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
        if target not in _places:
            return link[0]
        return posixpath.relpath(_places[target], posixpath.dirname(page.file.src_uri) or '.')

    return LINK.sub(rewrite, markdown)
