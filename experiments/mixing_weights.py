#!/usr/bin/env python3
"""Who teaches whom in a trained network: the CWEM's weights averaged over a data set (paper, Table 15).

    python experiments/mixing_weights.py --checkpoint RUN/model_best.pth.tar --split test

takes validate.py's flags for checkpoint, data and device. Row i of the matrix is the teacher of exit i. Beside it: how
far the weights of single images lie from uniform (total variation distance, 0 to 1 - 1/K) and from one-hot (1 - largest
weight, 0 to 1 - 1/K).
"""

from typing import Any, Dict, Optional

import torch

from timm_mlcsd import MLCSDLoss, MultiExitModel
from timm_mlcsd.engine.build import data_config_of, resolve_device
from timm_mlcsd.engine.config import parse_args
from timm_mlcsd.engine.flags import validate_parser
from timm_mlcsd.engine.loaders import eval_loader
from timm_mlcsd.engine.validate import data_flags_from, load_model, load_split
from timm_mlcsd.errors import UserError, run_script
from timm_mlcsd.report import format_table


@torch.inference_mode()
def mixing_weights(
    model: MultiExitModel, checkpoint: Dict[str, Any], loader: Any, use_ema: bool = False
) -> Optional[torch.Tensor]:
    """The weights [N, K, K] for all images of a loader on the model's device, None where there is no CWEM."""
    state = checkpoint.get('task_state_ema' if use_ema else 'task_state', {}).get('criterion', {})
    if checkpoint['args']['distill'] != 'all-for-all' or not state:
        return None
    criterion = MLCSDLoss(model.num_exits, model.exit_feature_dim).to(next(model.parameters()).device).eval()
    # whatever else the loss remembers mixes nothing
    criterion.load_state_dict({name: t for name, t in state.items() if name in criterion.state_dict()})
    model.eval()
    return torch.cat([criterion.mixing_weights(model.forward_exits(x), target).cpu() for x, target in loader])


def main() -> None:
    args = parse_args(validate_parser())
    device = resolve_device(args)
    network = load_model(args)
    model, checkpoint = network.model.to(device), network.checkpoint
    data_flags_from(args, checkpoint)
    dataset, split = load_split(args, checkpoint)
    loader = eval_loader(args, dataset, data_config_of(args, model, checkpoint['data_config']), device)
    weights = mixing_weights(model, checkpoint, loader, args.use_ema)
    if weights is None:
        raise UserError(f'{args.checkpoint!r} was trained without a CWEM.')

    names = [f'Ex{k + 1}' for k in range(model.num_exits)]
    uniform = (weights - 1 / model.num_exits).abs().sum(-1).div(2).mean(0)
    one_hot = 1 - weights.amax(-1).mean(0)
    rows = [
        (f'Teacher-{name}', *row.tolist(), u.item(), o.item())
        for name, row, u, o in zip(names, weights.mean(0), uniform, one_hot)
    ]
    print(f'{args.checkpoint}, {len(weights)} images of {split}')
    print(format_table(('', *names, 'from uniform', 'from one-hot'), rows))
    print(f'mean distance from uniform {uniform.mean():.3f}, from one-hot {one_hot.mean():.3f}')


if __name__ == '__main__':
    run_script('mixing_weights.py', main)
