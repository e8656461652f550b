"""The README.md of a network on the Hub."""

import hashlib
import re
from typing import Any, Dict, Optional, Sequence

from ..errors import printable

__all__ = ['check_license', 'is_own_card', 'model_card']

_LICENSE = re.compile(r'[a-z][a-z0-9.-]{1,63}')
# what YAML reads as another thing than text
_NO_TEXT = ('false', 'no', 'null', 'off', 'on', 'true', 'yes')
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

_ADAPTIVE = """With `exit_policy.json`, which lies beside the weights, every image of a batch stops at its own exit:

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
) -> str:
    """Write a model card.

    Args:
        name: Title.
        source: What ``timm.create_model`` takes to make the network, ``hf-hub:REPO`` say.
        architecture: Registered name of the network.
        input_size: (C, H, W).
        exits: One dict per exit with ``exit``, ``tap``, ``macs``, ``params``, and ``top1`` where it was measured.
        measured_on: Which images ``top1`` is of.
        training: Settings worth knowing, by name.
        license: Its identifier on the Hub.
        adaptive: Whether an exit policy lies beside the weights.

    Returns:
        Markdown with the Hub's metadata in front and a mark at the end, by which `is_own_card` knows it again. Names
        and settings are shown as they are: none of them becomes markup.

    Raises:
        ValueError: The license is not an identifier such as the Hub has.
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
    header = ['Exit', 'Tap', *(['Top-1 %'] if with_accuracy else []), 'MMACs to answer', 'Parameters, M']
    lines += [_row(header), _row(['---'] * len(header))]
    for row in exits:
        accuracy = [f'{row["top1"]:.2f}'] if with_accuracy else []
        costs = [f'{row[key] / 1e6:.2f}' if row.get(key) is not None else '' for key in ('macs', 'params')]
        lines.append(_row([row['exit'], _code(row['tap']), *accuracy, *costs]))
    if with_accuracy and measured_on:
        lines += ['', f'Top-1 on {_text(measured_on)}.']
    lines += ['', '## Use', '', _usage(source)]
    if adaptive:
        lines += [_ADAPTIVE.format(source=source)]
    if training:
        lines += ['## Training', '', _row(['Setting', 'Value']), _row(['---', '---'])]
        lines += [_row([_code(key), _code(value)]) for key, value in training.items()]
        lines.append('')
    card = '\n'.join([*lines, _CITATION]) + '\n'
    return card + _MARK.format(digest=_digest(card)) + '\n'


def check_license(license: Any) -> None:
    """Raise a ValueError for what cannot be an identifier of a license on the Hub."""
    if not isinstance(license, str) or not _LICENSE.fullmatch(license) or license in _NO_TEXT:
        raise ValueError(
            f'license {_line(license)!r}: expected an identifier of the Hub, such as apache-2.0, mit or other.'
        )


def is_own_card(text: str) -> bool:
    """Whether `model_card` wrote this text, and nothing in it has been changed since."""
    card, _, mark = text.rstrip('\n').rpartition('\n')
    return mark == _MARK.format(digest=_digest(f'{card}\n'))


def _digest(card: str) -> str:
    return f'sha256:{hashlib.sha256(card.encode()).hexdigest()}'


def _line(value: Any) -> str:
    """The start of a value as one line of characters that can be seen."""
    text = printable(' '.join(str(value).split()))
    return text if len(text) <= _MAX_TEXT else f'{text[:_MAX_TEXT]} ...'


def _text(value: Any) -> str:
    """A value as Markdown that shows it: no markup, no HTML, no link."""
    return re.sub(r'([\\`*_\[\]<>|~&#$!@{}^]|:(?=//)|(?<=www)\.)', r'\\\1', _line(value), flags=re.IGNORECASE)


def _code(value: Any) -> str:
    """A value as code in Markdown, also in a table; as text where code could not show it."""
    text = _line(value)
    return _text(value) if not text or set(text) & set('`|\\') else f'`{text}`'


def _row(cells: Sequence[str]) -> str:
    return f'| {" | ".join(cells)} |'


def _usage(source: str) -> str:
    return f"""```python
import timm
import torch
from PIL import Image

import timm_mlcsd  # registers the architecture; from a checkout of timm_mlcsd: pip install .

model = timm.create_model({source!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
image = transform(Image.open('photo.jpg').convert('RGB')).unsqueeze(0)
with torch.no_grad():
    for exit, logits in model.iter_exits(image):  # what lies behind the last one pulled is never computed
        probability, label = logits.softmax(-1).max(-1)
        print(f'exit {{exit + 1}}: class {{label.item()}} with {{probability.item():.2f}}')
        if probability > 0.9:
            break
```
"""
