"""One graph per stage, for places without timm: ONNX with a runner of its own, or ``torch.export`` programs.

``python -m timm_mlcsd.adaptive.export output/train/RUN exported`` writes a folder whose ``runner.py`` needs numpy and
onnxruntime, and Pillow to read image files.
"""

import hashlib
import importlib.util
import json
import logging
import platform
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..arguments import ScriptParser
from ..cost import exit_costs
from ..errors import UserError, install_hint, run_script, shortened
from ..file_checks import MANIFEST_FORMAT, SUFFIXES, VERSION, check_class_names, check_data_config, check_manifest
from ..models import MultiExitModel, weights_digest
from ..network import load_network
from ..version import __version__
from .exported import MANIFEST, read_manifest
from .policy import ExitPolicy

__all__ = ['FORMATS', 'export_stages', 'main']

FORMATS = tuple(SUFFIXES)
RUNNER = 'runner.py'
GRAPH = re.compile(r'stage_\d+\.(onnx|onnx\.data|pt2)')
COMPILED_RUNNER = re.compile(r'runner\.[\w-]+\.pyc')
# the same operations in another order, or fused: float32 logits move by some roundings
TOLERANCE = 1e-3


class _Exit(nn.Module):
    """One stage with its head, from tensors to tensors."""

    def __init__(self, model: MultiExitModel, k: int, spec: Any, answers: bool):
        super().__init__()
        self.model = model
        self.k = k
        self.spec = spec
        self.answers = answers

    def forward(self, *tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """The state before stage k, flat, to the state behind it and the logits."""
        state, logits = self.model.run_exit(self.k, tree_unflatten(list(tensors), self.spec), self.answers)
        kept = tree_flatten(state)[0] if self.k < self.model.num_exits - 1 else []
        return (*kept, logits) if self.answers else tuple(kept)


def export_stages(
    model: MultiExitModel,
    policy: ExitPolicy,
    directory: Union[str, Path],
    format: str = 'onnx',
    *,
    data_config: Optional[Dict[str, Any]] = None,
    class_names: Optional[Sequence[str]] = None,
) -> None:
    """Write every stage with its head as a graph of its own, for batches of any size, and check each against the model.

    The folder holds the graphs, ``manifest.json`` (stages, costs, policy, preprocessing, versions) and, for ONNX,
    ``runner.py``, which needs numpy and onnxruntime, and Pillow to read image files. Exits that the policy turns off
    get no head.

    Args:
        model: A resumable network.
        policy: When samples leave.
        directory: Where to write: a new folder, or one of an earlier export, which is replaced if nothing else lies
            in it and its ``runner.py`` is as it was written.
        format: ``onnx`` (extra ``[onnx]``), or ``torch`` for `AdaptiveModel.from_pretrained`.
        data_config: Preprocessing with ``input_size`` (C, H, W), the size that the graphs are for; what it leaves out
            is the model's own.
        class_names: One per class, None for a class without a name.

    Raises:
        ValueError: The network has no stages, the policy is another network's or was fitted to other weights, the
            folder holds something else, or a graph computes something else than the model. Nothing is written then.
    """
    if format not in FORMATS:
        raise ValueError(f'format={format!r} is unknown; choose one of {", ".join(FORMATS)}.')
    if format == 'onnx':
        missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f'format=\'onnx\' needs {", ".join(missing)}: {install_hint("onnx")}.')
    if not model.num_classes:
        raise ValueError('the network has no classes (num_classes=0), so no exit can be sure of one.')
    dtype = next(model.parameters()).dtype
    if format == 'onnx' and dtype != torch.float32:
        raise ValueError(f'the weights are {dtype}; ONNX graphs are written in float32: call model.float() first.')
    if not model.resumable:
        raise ValueError(f'the network has no stages to export: {model.why_not_resumable}.')
    policy.check(model.num_exits, model.exit_names)
    policy.check_weights(model)
    directory = Path(directory).resolve()  # a link stays one
    if directory.exists():
        _check_replaceable(directory)
    data_config = {**timm.data.resolve_data_config({}, model=model), **(data_config or {})}
    check_data_config(data_config, 'data_config')
    class_names = None if class_names is None else list(class_names)
    check_class_names(class_names, model.num_classes, 'class_names')
    input_size = tuple(data_config['input_size'])
    manifest = dict(
        format=MANIFEST_FORMAT,
        version=VERSION,
        kind=format,
        architecture=model.default_cfg['architecture'],
        num_classes=model.num_classes,
        class_names=class_names,
        data_config=data_config,
        policy=policy.to_dict(),
        weights_digest=weights_digest(model),
        versions=dict(timm_mlcsd=__version__, timm=timm.__version__, torch=torch.__version__),
    )
    manifest['versions']['python'] = platform.python_version()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{directory.name}.', dir=directory.parent) as folder:
        partial = Path(folder) / 'partial'
        partial.mkdir()
        manifest['stages'] = _write_stages(model, policy, input_size, partial, format)
        if format == 'onnx':
            shutil.copyfile(Path(__file__).with_name('onnx_runner.py'), partial / RUNNER)
            manifest['runner_digest'] = _digest(partial / RUNNER)
        check_manifest(manifest, 'the export')
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + '\n', encoding='utf-8')
        old = Path(folder) / 'old'
        if directory.exists():
            directory.rename(old)
        try:
            partial.rename(directory)
        except OSError:
            if old.exists():
                old.rename(directory)
            raise


def _check_replaceable(directory: Path) -> None:
    """Raise a ValueError where a folder holds anything but what an earlier export wrote.

    What counts is what this release writes, not what the folder's own manifest names.
    """
    refusal = f'{str(directory)!r} holds something else than an earlier export'
    if not directory.is_dir():
        raise ValueError(f'{str(directory)!r} is not a folder; choose a new folder.')
    found = sorted(directory.iterdir())
    if not found:
        return
    try:
        manifest = read_manifest(directory)
    except ValueError as e:
        raise ValueError(f'{refusal}; choose a new folder. {e}') from None
    for path in found:
        is_ours = path.name in (MANIFEST, RUNNER) or GRAPH.fullmatch(path.name)
        if path.name == '__pycache__' and path.is_dir() and not path.is_symlink():
            is_ours = all(COMPILED_RUNNER.fullmatch(p.name) and _is_plain_file(p) for p in path.iterdir())
        elif not _is_plain_file(path):
            is_ours = False
        if not is_ours:
            raise ValueError(f'{refusal}: {path.name!r}; choose a new folder, or move that away.')
        if path.name == RUNNER and _digest(path) != manifest.get('runner_digest'):
            raise ValueError(f'{str(path)!r} is not as it was exported; choose a new folder, or move the file away.')


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _digest(path: Path) -> str:
    return f'sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}'


@torch.no_grad()
def _write_stages(
    model: MultiExitModel, policy: ExitPolicy, input_size: Sequence[int], folder: Path, format: str
) -> List[Dict[str, Any]]:
    was_training = model.training
    model.eval()
    costs = exit_costs(model, input_size)
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, *input_size, generator=generator).to(weight.device, weight.dtype)
    stages, state = [], images
    for k in range(model.num_exits):
        tensors, spec = tree_flatten(state)
        tensors = [t.clone() for t in tensors]  # export ties views to what they are views of
        exit_ = _Exit(model, k, spec, policy.is_on(k))
        expected = exit_(*tensors)
        try:
            program = _program(exit_, tensors)
        except Exception as e:  # export fails in as many ways as there are operations
            raise ValueError(f'stage {k} cannot be exported: {type(e).__name__}: {shortened(e)}') from e
        outputs = [f'state_{k}_{i}' for i in range(len(expected) - policy.is_on(k))] + ['logits'] * policy.is_on(k)
        inputs = ['images'] if k == 0 else [name for name in stages[-1]['outputs'] if name != 'logits']
        file = f'stage_{k}.{SUFFIXES[format]}'
        write = _write_onnx if format == 'onnx' else _write_torch
        try:
            run = write(program, folder / file, inputs, outputs)
            found = {count: run([t[:count] for t in tensors]) for count in (len(images), 1)}
        except Exception as e:
            raise ValueError(
                f'torch {torch.__version__} cannot write stage {k} as {format}: {type(e).__name__}: {shortened(e)}'
            ) from e
        for count, results in found.items():
            for name, ours, theirs in zip(outputs, results, (t[:count] for t in expected)):
                error = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float('nan')
                if not error <= TOLERANCE * max(1.0, theirs.abs().max().item()):
                    raise ValueError(f'{name} of stage {k} differs by {error:.1e} from the network once exported.')
        stages.append(
            dict(
                file=file,
                exit=model.exit_names[k],
                answers=policy.is_on(k),
                inputs=inputs,
                outputs=outputs,
                **costs[k]._asdict(),
            )
        )
        state, _ = model.run_exit(k, state, answers=False)
    model.train(was_training)
    return stages


def _program(exit_: _Exit, tensors: Sequence[torch.Tensor]) -> torch.export.ExportedProgram:
    """The graph of one stage, for batches of any size, with the weights that it reads and no others."""
    batch = torch.export.Dim('batch', min=1, max=2**20)
    shapes = tuple({0: batch} for _ in tensors)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        module = torch.export.export(exit_, tuple(tensors), dynamic_shapes={'tensors': shapes}, strict=False).module()
        module.graph.eliminate_dead_code()
        module = torch.fx.GraphModule(module, module.graph)  # takes along what the graph reads
        return torch.export.export(module, tuple(tensors), dynamic_shapes=shapes, strict=False)


def _write_torch(
    program: torch.export.ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]
) -> Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]:
    """Write a graph; what was written, to run."""
    torch.export.save(program, path)
    module = torch.export.load(path).module()
    return lambda tensors: module(*tensors)


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]
) -> Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]:
    """Write a graph; what was written, to run."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        program = torch.onnx.export(program, input_names=inputs, output_names=outputs, dynamo=True, verbose=False)
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])

    def run(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        arrays = {name: tensor.numpy(force=True) for name, tensor in zip(inputs, tensors)}
        return [torch.from_numpy(a).to(tensors[0].device) for a in session.run(list(outputs), arrays)]

    return run


def export_parser() -> ScriptParser:
    """The flags of ``python -m timm_mlcsd.adaptive.export``."""
    parser = ScriptParser(prog='timm_mlcsd.adaptive.export', description='Write the stages of a network as graphs')
    parser.add_argument('network', help='checkpoint of train.py, folder of a run, saved folder, or hf-hub:REPO')
    parser.add_argument('directory', help='folder to write, new or of an earlier export')
    parser.add_argument(
        '--format', choices=FORMATS, default='onnx', help='onnx for ONNX Runtime, torch for torch.export'
    )
    parser.add_argument('--policy', metavar='FILE', help='file of the exit policy (default: that beside the weights)')
    parser.add_argument('--use-ema', action='store_true', help='export the averaged weights of the checkpoint')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of ``python -m timm_mlcsd.adaptive.export``."""

    def run():
        args = export_parser().parse_args(argv)
        for name in ('onnxscript', 'onnx_ir', 'torch.onnx'):
            logging.getLogger(name).setLevel(logging.WARNING)  # every pass of theirs has something to say
        network = load_network(args.network, args.use_ema)
        policy_file = args.policy or network.policy_file
        if policy_file is None:
            raise UserError(
                f'{args.network!r} has no exit policy beside its weights: make one with validate.py --adaptive '
                f'--save-policy, or name one with --policy FILE.'
            )
        try:
            policy = ExitPolicy.load(policy_file)
            export_stages(
                network.model,
                policy,
                args.directory,
                args.format,
                data_config=network.data_config,
                class_names=network.class_names,
            )
        except (ValueError, OSError) as e:
            raise UserError(shortened(e, 1000)) from None
        size = sum(path.stat().st_size for path in Path(args.directory).iterdir()) / 1e6
        print(f'{args.directory}: {network.model.num_exits} stages, {size:.1f} MB')

    run_script('timm_mlcsd.adaptive.export', run)


if __name__ == '__main__':
    main()
