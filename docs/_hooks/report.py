"""The HTML report in the gallery: the package's own template, filled with stored results of a real run."""

import json
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from timm_mlcsd.report import write_page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add report/page.html."""
    data = json.loads(Path(config.docs_dir, 'report.json').read_text(encoding='utf-8'))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'page.html'
        write_page(path, data)
        files.append(File.generated(config, 'report/page.html', content=path.read_text(encoding='utf-8')))
    return files
