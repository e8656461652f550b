"""Train a multi-exit network in a training loop of your own.

    python examples/own_loop.py

The network comes from timm.create_model and the loss is MLCSDLoss. The optimizer gets the parameters of both. The
validation images choose the best epoch; the test images are read once, at the end.
"""

import argparse
import copy
from pathlib import Path

import timm
import torch
from torch.utils.data import DataLoader

from timm_mlcsd import MLCSDLoss, save_pretrained
from timm_mlcsd.cost import exit_costs
from timm_mlcsd.engine import DataConfig, Evaluator, load_dataset
from timm_mlcsd.report import format_table


def main() -> None:
    """Train, evaluate and save the network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, default=Path('output/examples/own_loop'), help='folder for the network')
    parser.add_argument('--epochs', type=int, default=6, help='number of epochs')
    args = parser.parse_args()
    torch.manual_seed(0)

    # importing timm_mlcsd has registered the model; channels is an argument of timm's ResNet
    model = timm.create_model('mlcsd_resnet18', num_classes=10, exits=4, small_input=True, channels=(8, 16, 32, 64))
    data_config = timm.data.resolve_data_config(dict(input_size=(3, 16, 16), crop_pct=1.0), model=model)
    data = DataConfig(dataset='digits', batch_size=32, workers=0)
    evaluator = Evaluator(model, data_config, data)  # moves the model to a GPU if there is one
    device = evaluator.device

    train_images = load_dataset(data, 'train')
    train_images.transform = timm.data.create_transform(**data_config)  # no augmentation
    loader = DataLoader(train_images, batch_size=32, shuffle=True, drop_last=True)
    val_images = load_dataset(data, 'validation')

    criterion = MLCSDLoss(model.num_exits, model.exit_feature_dim, alpha=1.0, beta=1.0, distill_ramp='accuracy')
    criterion.to(device)
    # the loss has parameters too: they mix the teachers
    optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=args.epochs * len(loader))

    best_top1, best_weights = -1.0, None
    for epoch in range(args.epochs):
        total_loss = 0.0
        model.train()  # in training mode the model returns the logits and features of all exits
        for images, target in loader:
            loss = criterion(model(images.to(device)), target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.item()
        validation = evaluator.evaluate(val_images)
        exits = ' '.join(f'{metrics.top1:.1f}' for metrics in validation.exits)
        print(f'epoch {epoch}: loss {total_loss / len(loader):.3f}, validation top-1 of the exits {exits}', flush=True)
        if validation.mean_top1 > best_top1:
            best_top1, best_weights = validation.mean_top1, copy.deepcopy(model.state_dict())

    model.load_state_dict(best_weights)
    test = evaluator.evaluate(load_dataset(data, 'test'))
    costs = exit_costs(model, data_config['input_size'])
    rows = [(name, m.top1, m.loss, c.macs / 1e6) for name, m, c in zip(model.exit_names, test.exits, costs)]
    print(f'best epoch on {test.num_samples} test images')
    print(format_table(['Exit', 'Top-1 %', 'Loss', 'MMACs'], rows))
    save_pretrained(model, args.output, data_config=data_config, class_names=train_images.classes)
    print(f'network saved in {args.output}; timm_mlcsd.from_pretrained loads it')


if __name__ == '__main__':
    main()
