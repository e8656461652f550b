"""The README.md of a network on the Hub."""

from typing import Any, Dict, Optional, Sequence

__all__ = ['model_card']

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
        Markdown with the Hub's metadata in front.
    """
    size = 'x'.join(map(str, input_size))
    lines = [
        _METADATA.format(license=license) + f'# {name}',
        '',
        f'`{architecture}`: an image classifier with {len(exits)} exits, for images of {size}. Easy images can leave '
        f'early; in evaluation mode the network as a whole is a plain timm model.',
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
        lines.append(_row([row['exit'], f'`{row["tap"]}`', *accuracy, *costs]))
    if with_accuracy and measured_on:
        lines += ['', f'Top-1 on {measured_on}.']
    lines += ['', '## Use', '', _usage(source)]
    if adaptive:
        lines += [_ADAPTIVE.format(source=source)]
    if training:
        lines += ['## Training', '', _row(['Setting', 'Value']), _row(['---', '---'])]
        lines += [_row([f'`{key}`', f'`{value}`']) for key, value in training.items()]
        lines.append('')
    return '\n'.join([*lines, _CITATION])


def _row(cells: Sequence[str]) -> str:
    return f'| {" | ".join(cells)} |'


def _usage(source: str) -> str:
    return f"""```python
import timm
import torch
from PIL import Image

import timm_mlcsd  # pip install timm_mlcsd; registers the architecture

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
