#!/usr/bin/env python3
"""Measure how close the run time of early-exit inference is to its ideal.

possible = sum over stages and heads of (measured time at the full batch x share of the remaining samples). The table
shows possible / realised, the speed-up over the plain backbone and the share of its multiply-adds; and, for the same
batches as a stream (`predict_stream`, which is filled and emptied in every measurement), its speed-up over the plain
backbone and over `predict`. All times of a row are measured alternately in one run. Thresholds are set to a mean cost
that is a given share of the plain backbone's. Images and weights are random, because the time depends only on the
number of remaining images.

    python benchmarks/adaptive.py --model mlcsd_resnet50 --input-size 3 224 224
    python benchmarks/adaptive.py --model mlcsd_resnet18 --small-input --input-size 3 32 32 --num-classes 100
    python benchmarks/adaptive.py --model mlcsd_resnet18 --small-input --input-size 3 32 32 --num-classes 100 --onnx
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import timm
import torch

import timm_mlcsd
from timm_mlcsd.adaptive import AdaptiveModel, ExitPolicy, evaluate_policy, thresholds_for_exit_rates
from timm_mlcsd.adaptive.evaluate import cumulative_costs
from timm_mlcsd.adaptive.export import export_stages
from timm_mlcsd.cli.arguments import positive_float, positive_int
from timm_mlcsd.cost import exit_costs
from timm_mlcsd.report import format_table

# batches per measurement by batch size: more small ones, for precise times and exit rates, and several for the stream
BATCHES = {1: 64, 4: 32, 16: 16, 64: 4, 256: 1}


def policy_at(share: float, logits: torch.Tensor, costs: Sequence[Any], plain: float) -> ExitPolicy:
    """Fit a policy with geometric exit rates to a mean cost.

    Args:
        share: Mean cost as a share of `plain`.
        logits: Logits of K exits on N samples, [K, N, C].
        costs: `ExitCost` of each exit, [K].
        plain: Multiply-adds of the plain backbone.

    Returns:
        The policy.
    """
    targets = torch.zeros(logits.shape[1], dtype=torch.long)
    low, high = 1e-3, 1e3
    for _ in range(40):
        ratio = (low * high) ** 0.5
        rates = [ratio**k for k in range(len(logits))]
        policy = thresholds_for_exit_rates(logits, [rate / sum(rates) for rate in rates])
        if evaluate_policy(logits, targets, costs, policy).cost < share * plain:
            low = ratio
        else:
            high = ratio
    return policy


def seconds(run: Callable[[], Any]) -> Tuple[float, Any]:
    """Call a function; return the seconds that it took and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


class Torch:
    """The network in PyTorch; stages and heads are timed separately.

    Args:
        args: Command-line arguments.
        model: Network.
    """

    def __init__(self, args: argparse.Namespace, model: torch.nn.Module):
        self.model = model
        self.stream_size = args.stream_size
        self.autocast = partial(torch.autocast, args.device, torch.bfloat16, enabled=args.amp)
        self.graphs = args.cuda_graphs

    def adaptive(self, policy: ExitPolicy) -> Tuple[Callable[[torch.Tensor], Any], Callable[[Sequence], None]]:
        """Functions that run early-exit inference: on images, with their exit indices as result, and on a stream."""
        adaptive = AdaptiveModel(self.model, policy, range(self.model.num_exits))
        if self.graphs:
            adaptive.use_cuda_graphs()

        def predict(images: torch.Tensor) -> Sequence[int]:
            with self.autocast():
                return adaptive.predict(images).exit_index.tolist()

        def stream(batches: Sequence[torch.Tensor]) -> None:
            with self.autocast():
                for prediction in adaptive.predict_stream(batches, batch_size=max(len(batches[0]), self.stream_size)):
                    prediction.exit_index.tolist()

        return predict, stream

    def plain(self, images: torch.Tensor) -> torch.Tensor:
        """Run the plain backbone."""
        with torch.no_grad(), self.autocast():
            return self.model(images)

    def loop(self, images: torch.Tensor, clock: Callable[[Callable], Tuple[float, Any]] = seconds) -> List[List[float]]:
        """Run all stages and heads, and return [stage, head] in seconds for each exit."""
        state, times = images, []
        for k in range(self.model.num_exits):
            with torch.no_grad(), self.autocast():
                stage, state = clock(partial(self.model.run_stage, k, state))
                head, _ = clock(partial(self.model.run_head, k, state))
            times.append([stage, head])
        return times


class Onnx:
    """The exported stages in ONNX Runtime; each stage is timed with its head.

    Args:
        args: Command-line arguments.
        model: Network.
        input_size: Size of the images, (C, H, W).
    """

    def __init__(self, args: argparse.Namespace, model: torch.nn.Module, input_size: Sequence[int]):
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / 'out'
        export_stages(
            model, ExitPolicy([2.0] * (model.num_exits - 1)), path, data_config=dict(input_size=tuple(input_size))
        )
        torch.onnx.export(
            model,
            (torch.zeros(2, *input_size),),
            path / 'plain.onnx',
            dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=2**20)},),
            dynamo=True,
            verbose=False,
        )
        sys.path.insert(0, str(path))
        import onnxruntime
        import runner

        self.runner, self.path, self.stream_size = runner, path, args.stream_size
        # as in the runner: spinning threads would slow down the next measurement
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry('session.force_spinning_stop', '1')
        self.session = onnxruntime.InferenceSession(
            str(path / 'plain.onnx'), options, providers=['CPUExecutionProvider']
        )
        self.stages = runner.AdaptiveModel(path)

    def adaptive(self, policy: ExitPolicy) -> Tuple[Callable[[torch.Tensor], Any], Callable[[Sequence], None]]:
        """Functions that run early-exit inference: on images, with their exit indices as result, and on a stream."""
        adaptive = self.runner.AdaptiveModel(self.path, policy.to_dict())

        def stream(batches: Sequence[torch.Tensor]) -> None:
            size = max(len(batches[0]), self.stream_size)
            for _ in adaptive.predict_stream((batch.numpy() for batch in batches), batch_size=size):
                pass

        return lambda images: adaptive.predict(images.numpy()).exit_index.tolist(), stream

    def plain(self, images: torch.Tensor) -> Any:
        """Run the plain backbone."""
        return self.session.run(None, {self.session.get_inputs()[0].name: images.numpy()})

    def loop(self, images: torch.Tensor) -> List[List[float]]:
        """Run all stages with their heads, and return [stage] in seconds for each exit."""
        state, times = [images.numpy()], []
        for k in range(len(self.stages.stages)):
            took, (state, _) = seconds(partial(self.stages._run, k, state))
            times.append([took])
        return times


def one_round(engine: Any, no_exit: Callable, runs: Sequence[Tuple], batches: Sequence[torch.Tensor]) -> Dict[str, Any]:
    """Time every variant once on the same batches.

    Args:
        engine: `Torch` or `Onnx`.
        no_exit: Early-exit inference with a policy under which no sample leaves early.
        runs: Early-exit inference with each policy, on a batch and on a stream.
        batches: Batches of images.

    Returns:
        Mean seconds of each part (``parts``) and of the plain backbone (``plain``) per batch; per policy the seconds
        and exit indices of each batch (``taken``) and the mean seconds of a batch in the stream (``stream``); and the
        time of `no_exit` divided by that of a loop over all stages and heads (``overhead``).
    """
    parts = [engine.loop(batch) for batch in batches]
    plain = statistics.mean(seconds(partial(engine.plain, batch))[0] for batch in batches)
    taken, streams = [], []
    for predict, stream in runs:
        taken.append([seconds(partial(predict, batch)) for batch in batches])
        streams.append(seconds(partial(stream, batches))[0] / len(batches))
    loops, whole = 0.0, 0.0
    for batch in batches:
        loops += seconds(partial(engine.loop, batch))[0]
        whole += seconds(partial(no_exit, batch))[0]
    return dict(
        parts=[[statistics.mean(p) for p in zip(*exit_)] for exit_ in zip(*parts)],
        plain=plain,
        taken=taken,
        stream=streams,
        overhead=whole / loops,
    )


def row_of(rounds: Sequence[Dict[str, Any]], i: int, ran: Sequence[bool], spent: Sequence[float]) -> List[float]:
    """Summarise all rounds for one policy.

    Args:
        rounds: Results of `one_round`.
        i: Index of the policy.
        ran: Whether the head of each exit ran, [K].
        spent: Multiply-adds of answering at each exit as shares of those of the plain backbone, [K].

    Returns:
        Medians of the share of multiply-adds, the speed-up and possible / realised; the spread of the latter; medians
        of the stream's speed-up over the plain backbone and over `predict`.
    """
    columns = []
    for result in rounds:
        exits = [e for _, found in result['taken'][i] for e in found]
        remaining = [sum(e >= k for e in exits) / len(exits) for k in range(len(ran))]
        possible = sum(sum(p[: 1 + is_on]) * left for p, is_on, left in zip(result['parts'], ran, remaining))
        realised = statistics.mean(took for took, _ in result['taken'][i])
        plain, stream = result['plain'], result['stream'][i]
        share = statistics.mean(spent[k] for k in exits)
        columns.append((share, plain / realised, possible / realised, plain / stream, realised / stream))
    share, speedup, ratio, *stream = (statistics.median(column) for column in zip(*columns))
    ratios = [column[2] for column in columns]
    return [share, speedup, ratio, max(ratios) - min(ratios), *stream]


def measure(args: argparse.Namespace) -> str:
    """Run the benchmark and return its tables as text."""
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=args.num_classes, exits=args.exits, small_input=args.small_input)
    model = model.eval().to(args.device)
    pool = torch.randn(256, *args.input_size)
    if args.channels_last:
        model, pool = model.to(memory_format=torch.channels_last), pool.to(memory_format=torch.channels_last)
    pool = pool.to(args.device)
    costs = exit_costs(model, args.input_size)
    plain_macs = sum(c.stage_macs for c in costs) + costs[-1].head_macs
    with torch.no_grad():
        logits = torch.cat([torch.stack(model.forward_exits(part).logits) for part in pool.split(32)], dim=1).cpu()
    engine = Onnx(args, model, args.input_size) if args.onnx else Torch(args, model)
    policies = [policy_at(share, logits, costs, plain_macs) for share in args.shares]
    no_exit, _ = engine.adaptive(ExitPolicy([2.0] * (model.num_exits - 1)))
    rows, overheads = [], []
    for batch_size in args.batch_sizes:
        batches = pool.split(batch_size)[: BATCHES.get(batch_size, 1)]
        runs = [engine.adaptive(policy) for policy in policies]

        one_round(engine, no_exit, runs, batches)
        rounds = [one_round(engine, no_exit, runs, batches) for _ in range(args.repeats)]
        overheads.append((batch_size, statistics.median(result['overhead'] for result in rounds)))
        for i, (share, policy) in enumerate(zip(args.shares, policies)):
            ran = [policy.is_on(k) or args.onnx for k in range(model.num_exits)]  # a head that is off does not run
            spent = (cumulative_costs(costs, policy) / plain_macs).tolist()
            rows.append((batch_size, share, *row_of(rounds, i, ran, spent)))
            print(rows[-1], file=sys.stderr, flush=True)  # large batches take minutes
    table = format_table(
        (
            'Batch',
            'MACs wanted',
            'MACs spent',
            'Speed-up over plain',
            'Possible / realised',
            'Spread of that',
            'Stream: speed-up over plain',
            'Stream: speed-up over predict',
        ),
        rows,
    )
    loops = format_table(('Batch', 'No exit taken: runtime / loop of stages and heads'), overheads)
    where = torch.cuda.get_device_name() if args.device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    settings = (
        f'{"ONNX Runtime" if args.onnx else "PyTorch"}{", bf16" * args.amp}{", channels last" * args.channels_last}'
    )
    return (
        f'{args.model} at {"x".join(map(str, args.input_size))}, {model.num_exits} exits, {settings}, {where}, '
        f'Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, timm_mlcsd '
        f'{timm_mlcsd.__version__}; medians of {args.repeats}\n{table}\n\n{loops}'
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='mlcsd_resnet50')
    parser.add_argument('--exits', type=positive_int, default=8)
    parser.add_argument('--input-size', type=positive_int, nargs=3, default=(3, 224, 224))
    parser.add_argument('--num-classes', type=positive_int, default=1000)
    parser.add_argument('--small-input', action='store_true')
    parser.add_argument('--batch-sizes', type=positive_int, nargs='+', default=[1, 16, 64, 256])
    parser.add_argument(
        '--shares',
        type=positive_float,
        nargs='+',
        default=[0.35, 0.5, 0.7],
        help='mean costs as shares of the plain MACs',
    )
    parser.add_argument(
        '--stream-size', type=positive_int, default=16, help='images of a full stage in the stream, at least a batch'
    )
    parser.add_argument('--repeats', type=positive_int, default=5)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--amp', action='store_true', help='bfloat16')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--cuda-graphs', action='store_true', help='run the stages as CUDA graphs')
    parser.add_argument('--onnx', action='store_true', help='run the exported stages in ONNX Runtime')
    print(measure(parser.parse_args()))


if __name__ == '__main__':
    main()
