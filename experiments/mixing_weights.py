#!/usr/bin/env python3
"""Who teaches whom in a trained network: the CWEM's weights averaged over a data set (paper, Table 15).

    python experiments/mixing_weights.py --checkpoint RUN/model_best.pth.tar --split test

takes the flags of validate.py. Row i of the matrix is the teacher of exit i. Beside it: how far the weights of single
images lie from uniform (total variation distance, 0 to 1 - 1/K) and from one-hot (1 - largest weight, 0 to 1 - 1/K).
"""

import torch

from timm_mlcsd import MLCSDLoss
from timm_mlcsd.engine.build import build_model, resolve_device
from timm_mlcsd.engine.checkpoint import load_checkpoint
from timm_mlcsd.engine.flags import parse_args, validate_parser
from timm_mlcsd.engine.loaders import eval_loader
from timm_mlcsd.engine.validate import data_flags_from, load_split
from timm_mlcsd.errors import UserError, run_script
from timm_mlcsd.report import format_table


@torch.inference_mode()
def main() -> None:
    args = parse_args(validate_parser())
    device = resolve_device(args)
    checkpoint = load_checkpoint(args.checkpoint)
    if 'task_state' not in checkpoint:
        raise UserError(f'{args.checkpoint!r} was trained without a CWEM.')
    model = build_model(checkpoint['arch'], **checkpoint['model_args'])
    model.load_state_dict(checkpoint['state_dict'])
    criterion = MLCSDLoss(model.num_exits, model.feature_dim)
    criterion.load_state_dict(checkpoint['task_state']['criterion'])
    model.to(device).eval()
    criterion.to(device).eval()
    data_flags_from(args, checkpoint)
    dataset, split = load_split(args, checkpoint)
    loader = eval_loader(args, dataset, checkpoint['data_config'], device)
    weights = torch.cat([criterion.mixing_weights(model.forward_exits(images)).cpu() for images, _ in loader])

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
