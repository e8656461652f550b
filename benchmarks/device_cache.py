#!/usr/bin/env python3
"""Compare training on images that are cached on the device with training on one fixed batch.

    python benchmarks/device_cache.py                      # CIFAR-sized random images
    python benchmarks/device_cache.py --width 64 --batch-size 256 --device cuda --amp

Both train the same network, in alternating epochs. A ratio of the speeds of 1 means that loading takes no time.
"""

import argparse
import contextlib
import statistics
import time

import timm
import torch

from timm_mlcsd import MLCSDLoss
from timm_mlcsd.cli.arguments import positive_int
from timm_mlcsd.data import CachedLoader
from timm_mlcsd.report import format_table


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--width', type=positive_int, default=16, help='channels of the first stage of the ResNet18 (standard: 64)'
    )
    parser.add_argument('--batch-size', type=positive_int, default=64)
    parser.add_argument('--steps', type=positive_int, default=20, help='steps per epoch')
    parser.add_argument(
        '--repeats', type=positive_int, default=5, help='epochs of each variant, after one warm-up epoch'
    )
    parser.add_argument('--amp', action='store_true', help='bfloat16')
    args = parser.parse_args()
    device = torch.device(args.device)
    channels = [args.width * 2**i for i in range(4)]
    model = timm.create_model('mlcsd_resnet18', num_classes=100, small_input=True, exit_head='slic', channels=channels)
    model.to(device, memory_format=torch.channels_last)
    criterion = MLCSDLoss(model.num_exits, model.exit_feature_dim).to(device)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.01, momentum=0.9)
    images = torch.randint(256, (args.batch_size * args.steps, 32, 32, 3), dtype=torch.uint8, device=device)
    targets = torch.randint(100, (len(images),), device=device)
    half = torch.full((3,), 0.5)
    loader = CachedLoader(
        images, targets, args.batch_size, half, half, training=True, padding=4, hflip=0.5, channels_last=True
    )
    resident = [next(iter(loader))] * args.steps

    def images_per_second(batches) -> float:
        start = time.perf_counter()
        for x, y in batches:
            with torch.autocast(device.type, torch.bfloat16) if args.amp else contextlib.nullcontext():
                loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return args.batch_size * args.steps / (time.perf_counter() - start)

    rounds = [(images_per_second(resident), images_per_second(loader)) for _ in range(args.repeats + 1)][1:]
    rows = [
        (name, statistics.median(speeds)) for name, speeds in zip(('resident batch', 'cached data set'), zip(*rounds))
    ]
    print(format_table(('', 'images/s'), rows))
    print(f'cached / resident, median of {args.repeats}: {statistics.median(c / r for r, c in rounds):.3f}')


if __name__ == '__main__':
    main()
