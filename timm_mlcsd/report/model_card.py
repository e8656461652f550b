"""Model cards, the README.md of networks on the Hugging Face Hub."""

import hashlib
import re
from typing import Any, Dict, List, Optional, Sequence

from ..errors import printable

__all__ = ['check_license', 'is_own_card', 'model_card']

_LICENSE = re.compile(r'[a-z][a-z0-9.-]{1,63}')
# words that YAML does not read as text
_YAML_WORDS = ('false', 'no', 'null', 'off', 'on', 'true', 'yes')
_MARK = '<!-- written by timm_mlcsd, {digest} -->'
_MAX_TEXT = 200

_METADATA = """---
tags:
- image-classification
- timm
- timm_mlcsd
- multi-exit
pipeline_tag: image-classification
library_name: timm
license: {license}
---
"""

_USAGE = """```python
import timm
import torch

import timm_mlcsd  # registers the architecture; from a checkout of timm_mlcsd: pip install .
{imports}
model = timm.create_model({source!r}, pretrained=True).eval()
{image}
with torch.no_grad():
    for exit, logits in model.iter_exits(image):  # later exits are not computed after a break
        probability, label = logits.softmax(-1).max(-1)
        print(f'exit {{exit + 1}}: class {{label.item()}} with {{probability.item():.2f}}')
        if probability > 0.9:
            break
```
"""
_IMPORTS = 'from timm_mlcsd.data import read_image\n'
# read_image turns images upright and keeps 16 bits, as training does and Image.open does not
_FROM_FILE = """transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
image = transform(read_image('photo.jpg'{mode})).unsqueeze(0)"""
_NO_FILES = 'image = torch.zeros(1, *{input_size})  # normalised pixels'

_ADAPTIVE = """With `exit_policy.json`, which is stored with the weights, every image of a batch stops at its own exit:

```python
from timm_mlcsd.adaptive import AdaptiveModel

logits, exit_index, cost = AdaptiveModel.from_pretrained({source!r}).predict(image)
```
"""

_CITATION = """## Citation

The method: multi-level collaborative self-distillation (MLCSD), in which every exit of a network learns from a teacher
that is mixed from all its exits. Made with timm_mlcsd.
"""


def model_card(
    name: str,
    source: str,
    architecture: str,
    input_size: Sequence[int],
    exits: Sequence[Dict[str, Any]],
    measured_on: Optional[str] = None,
    training: Optional[Dict[str, Any]] = None,
    license: str = 'apache-2.0',
    adaptive: bool = False,
    image_mode: Optional[str] = 'RGB',
) -> str:
    """Write a model card.

    Args:
        name: Title of the card.
        source: Name of the network for ``timm.create_model``, such as ``hf-hub:REPO``.
        architecture: Registered name of the architecture.
        input_size: Size of the images, (C, H, W).
        exits: One dict per exit with ``exit`` (name), ``tap``, ``macs``, ``params``, and ``top1`` in percent if it was
            measured.
        measured_on: Name of the images that ``top1`` was measured on; default: not shown.
        training: Training settings by name; default: not shown.
        license: Identifier of the license on the Hub.
        adaptive: Whether an exit policy is stored with the weights; default: False.
        image_mode: Pillow mode of the images; None if image files have no mode with C channels. Default: ``RGB``.

    Returns:
        Markdown that starts with the Hub's metadata and ends with a digest, which `is_own_card` checks. Markup in
        names and settings is escaped.

    Raises:
        ValueError: The license is not a valid identifier.
    """
    check_license(license)
    size = 'x'.join(map(str, input_size))
    lines = [
        _METADATA.format(license=license) + f'# {_text(name)}',
        '',
        f'{_code(architecture)}: an image classifier with {len(exits)} exits, for images of {size}. Easy images can '
        f'leave early; in evaluation mode the network as a whole is a plain timm model.',
        '',
        '## Exits',
        '',
    ]
    with_accuracy = all('top1' in row for row in exits)
    lines += _exit_rows(exits, with_accuracy)
    if with_accuracy and measured_on:
        lines += ['', f'Top-1 on {_text(measured_on)}.']
    lines += ['', '## Use', '', _usage(source, input_size, image_mode)]
    if adaptive:
        lines += [_ADAPTIVE.format(source=source)]
    if training:
        lines += ['## Training', '', _row(['Setting', 'Value']), _row(['---', '---'])]
        lines += [_row([_code(key), _code(value)]) for key, value in training.items()]
        lines.append('')
    card = '\n'.join([*lines, _CITATION]) + '\n'
    return card + _MARK.format(digest=_digest(card)) + '\n'


def check_license(license: Any) -> None:
    """Check the identifier of a license.

    Args:
        license: Identifier, such as ``apache-2.0``.

    Raises:
        ValueError: The value cannot be an identifier of the Hub.
    """
    if not isinstance(license, str) or not _LICENSE.fullmatch(license) or license in _YAML_WORDS:
        raise ValueError(
            f'license {_line(license)!r}: expected an identifier of the Hub, such as apache-2.0, mit or other.'
        )


def is_own_card(text: str) -> bool:
    """Whether a text is the unchanged result of `model_card`.

    Args:
        text: Text of a README.md.
    """
    card, _, mark = text.rstrip('\n').rpartition('\n')
    return mark == _MARK.format(digest=_digest(f'{card}\n'))


def _digest(card: str) -> str:
    return f'sha256:{hashlib.sha256(card.encode()).hexdigest()}'


def _line(value: Any) -> str:
    """Format a value as one line of printable characters, limited in length."""
    text = printable(' '.join(str(value).split()))
    return text if len(text) <= _MAX_TEXT else f'{text[:_MAX_TEXT]} ...'


def _text(value: Any) -> str:
    """Format a value as Markdown text, with markup, HTML and links escaped."""
    return re.sub(r'([\\`*_\[\]<>|~&#$!@{}^]|:(?=//)|(?<=www)\.)', r'\\\1', _line(value), flags=re.IGNORECASE)


def _code(value: Any) -> str:
    """Format a value as Markdown code; as text if it contains characters that code cannot show in a table."""
    text = _line(value)
    return _text(value) if not text or set(text) & set('`|\\') else f'`{text}`'


def _row(cells: Sequence[str]) -> str:
    return f'| {" | ".join(cells)} |'


def _exit_rows(exits: Sequence[Dict[str, Any]], with_accuracy: bool) -> List[str]:
    header = ['Exit', 'Tap', *(['Top-1 %'] if with_accuracy else []), 'MMACs to answer', 'Parameters, M']
    rows = [_row(header), _row(['---'] * len(header))]
    for row in exits:
        accuracy = [f'{row["top1"]:.2f}'] if with_accuracy else []
        costs = [f'{row[key] / 1e6:.2f}' if row.get(key) is not None else '' for key in ('macs', 'params')]
        rows.append(_row([row['exit'], _code(row['tap']), *accuracy, *costs]))
    return rows


def _usage(source: str, input_size: Sequence[int], image_mode: Optional[str]) -> str:
    return _USAGE.format(
        source=source,
        image=_NO_FILES.format(input_size=tuple(input_size))
        if image_mode is None
        else _FROM_FILE.format(mode='' if image_mode == 'RGB' else f', {image_mode!r}'),
        imports='' if image_mode is None else _IMPORTS,
    )
