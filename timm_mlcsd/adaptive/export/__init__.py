"""Export of each stage as a graph that runs without timm: ONNX with a runner, or ``torch.export`` programs.

With ONNX, the folder contains ``runner.py``, which needs numpy and onnxruntime, and Pillow to read image files.
"""

import hashlib
import importlib.util
import json
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

from ...cost import exit_costs
from ...errors import install_hint, one_line
from ...file_checks import (
    MANIFEST_FORMAT,
    SUFFIXES,
    VERSION,
    check_class_names,
    check_data_config,
    check_manifest,
    graph_digest,
)
from ...models import MultiExitModel, eval_mode, weights_digest
from ...version import __version__
from ..exported import MANIFEST, read_manifest
from ..policy import ExitPolicy

__all__ = ['FORMATS', 'export_stages']

FORMATS = tuple(SUFFIXES)
RUNNER = 'runner.py'
GRAPH = re.compile(r'stage_\d+\.(onnx|onnx\.data|pt2)')
COMPILED_RUNNER = re.compile(r'runner\.[\w-]+\.pyc')
# largest relative difference of exported outputs: operations may be fused or run in another order
TOLERANCE = 1e-3


class _StageModule(nn.Module):
    """One stage with its head as a module whose inputs and outputs are tensors."""

    def __init__(self, model: MultiExitModel, k: int, spec: Any, answers: bool):
        super().__init__()
        self.model = model
        self.k = k
        self.spec = spec
        self.answers = answers

    def forward(self, *tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """Map the flattened state before stage k to the flattened state after it, plus logits if the exit answers."""
        state, logits = self.model.run_exit(self.k, tree_unflatten(list(tensors), self.spec), self.answers)
        outputs = tree_flatten(state)[0] if self.k < self.model.num_exits - 1 else []
        return tuple(outputs) if logits is None else (*outputs, logits)


def export_stages(
    model: MultiExitModel,
    policy: ExitPolicy,
    directory: Union[str, Path],
    format: str = 'onnx',
    *,
    data_config: Optional[Dict[str, Any]] = None,
    class_names: Optional[Sequence[Optional[str]]] = None,
) -> None:
    """Write each stage with its head as one graph for batches of any size, and compare it with the model.

    The folder holds the graphs, ``manifest.json`` (stages, costs, policy, preprocessing, versions) and, for ONNX,
    ``runner.py``, which needs numpy and onnxruntime, and Pillow to read image files. The heads of exits that are off
    in the policy are not exported.

    Args:
        model: Resumable multi-exit network.
        policy: Exit policy.
        directory: Folder to write: a new one, or one of an earlier export. The latter is replaced if it contains no
            other files and its ``runner.py`` is unchanged.
        format: ``onnx`` (default, needs the extra ``[onnx]``), or ``torch`` for `AdaptiveModel.from_pretrained`.
        data_config: Preprocessing by name. The graphs are for images of its ``input_size``, (C, H, W). Default, also
            for missing entries: the preprocessing of the model.
        class_names: Class names, [C], None for a class without a name; default: no names.

    Raises:
        ValueError: The network is not resumable, the policy belongs to another network or was fitted to other weights,
            the folder contains other files, a stage cannot be exported, or the outputs of a graph differ from the
            model's. The folder is unchanged then.
    """
    _check_exportable(model, format)
    policy.check(model.num_exits, model.exit_names)
    policy.check_weights(model)
    directory = Path(directory).resolve()  # keeps a symbolic link to the folder
    if directory.exists():
        _check_replaceable(directory)
    data_config = {**timm.data.resolve_data_config({}, model=model), **(data_config or {})}
    check_data_config(data_config, 'data_config')
    class_names = None if class_names is None else list(class_names)
    check_class_names(class_names, model.num_classes, 'class_names')
    manifest = _manifest(model, policy, format, data_config, class_names)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{directory.name}.', dir=directory.parent) as folder:
        partial = Path(folder) / 'partial'
        partial.mkdir()
        with eval_mode(model):
            manifest['stages'] = _write_stages(model, policy, data_config['input_size'], partial, format)
        if format == 'onnx':
            shutil.copyfile(Path(__file__).with_name('onnx_runner.py'), partial / RUNNER)
            manifest['runner_digest'] = _digest(partial / RUNNER)
        check_manifest(manifest, 'the export')
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + '\n', encoding='utf-8')
        _replace_folder(directory, partial, Path(folder) / 'old')


def _check_exportable(model: MultiExitModel, format: str) -> None:
    """Raise a ValueError if a network cannot be exported in a format."""
    if format not in FORMATS:
        raise ValueError(f'format={format!r} is unknown; choose one of {", ".join(FORMATS)}.')
    if format == 'onnx':
        missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f'format=\'onnx\' needs {", ".join(missing)}: {install_hint("onnx")}.')
    if not model.num_classes:
        raise ValueError('the network has no classes (num_classes=0); exits need class probabilities.')
    dtype = next(model.parameters()).dtype
    if format == 'onnx' and dtype != torch.float32:
        raise ValueError(f'the weights are {dtype}; ONNX graphs are written in float32: call model.float() first.')
    if not model.resumable:
        raise ValueError(f'the network has no stages to export: {model.why_not_resumable}.')


def _manifest(
    model: MultiExitModel,
    policy: ExitPolicy,
    format: str,
    data_config: Dict[str, Any],
    class_names: Optional[List[Optional[str]]],
) -> Dict[str, Any]:
    """All of the manifest but its stages and the digest of the runner."""
    return dict(
        format=MANIFEST_FORMAT,
        version=VERSION,
        kind=format,
        architecture=model.default_cfg['architecture'],
        num_classes=model.num_classes,
        class_names=class_names,
        data_config=data_config,
        policy=policy.to_dict(),
        weights_digest=weights_digest(model),
        versions=dict(
            timm_mlcsd=__version__,
            timm=timm.__version__,
            torch=torch.__version__,
            python=platform.python_version(),
        ),
    )


def _replace_folder(directory: Path, new: Path, old: Path) -> None:
    """Move a new folder to the place of another one, which is moved aside; the other one stays if that fails."""
    if directory.exists():
        directory.rename(old)
    try:
        new.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise


def _check_replaceable(directory: Path) -> None:
    """Raise a ValueError if a folder contains anything but an earlier export.

    The files are compared with those that this release writes, because the manifest could name any file.
    """
    message = f'{str(directory)!r} holds something else than an earlier export'
    if not directory.is_dir():
        raise ValueError(f'{str(directory)!r} is not a folder; choose a new folder.')
    found = sorted(directory.iterdir())
    if not found:
        return
    try:
        manifest = read_manifest(directory)
    except ValueError as e:
        raise ValueError(f'{message}; choose a new folder. {e}') from None
    for path in found:
        is_exported = path.name in (MANIFEST, RUNNER) or GRAPH.fullmatch(path.name) is not None
        if path.name == '__pycache__' and path.is_dir() and not path.is_symlink():
            is_exported = all(COMPILED_RUNNER.fullmatch(p.name) and _is_plain_file(p) for p in path.iterdir())
        elif not _is_plain_file(path):
            is_exported = False
        if not is_exported:
            raise ValueError(f'{message}: {path.name!r}; choose a new folder, or move this file.')
        if path.name == RUNNER and _digest(path) != manifest.get('runner_digest'):
            raise ValueError(f'{str(path)!r} was changed after the export; choose a new folder, or move this file.')


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _digest(path: Path) -> str:
    return f'sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}'


@torch.no_grad()
def _write_stages(
    model: MultiExitModel, policy: ExitPolicy, input_size: Sequence[int], folder: Path, format: str
) -> List[Dict[str, Any]]:
    costs = exit_costs(model, input_size)
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, *input_size, generator=generator).to(weight.device, weight.dtype)
    stages: List[Dict[str, Any]] = []
    state: Any = images
    for k in range(model.num_exits):
        tensors, spec = tree_flatten(state)
        tensors = [t.clone() for t in tensors]  # torch.export would link views to their base tensors
        exit_ = _StageModule(model, k, spec, policy.is_on(k))
        expected = exit_(*tensors)
        try:
            program = _export_module(exit_, tensors)
        except Exception as e:  # torch.export can raise any error
            raise ValueError(f'stage {k} cannot be exported: {type(e).__name__}: {one_line(e)}') from e
        outputs = [f'state_{k}_{i}' for i in range(len(expected) - policy.is_on(k))] + ['logits'] * policy.is_on(k)
        inputs = ['images'] if k == 0 else [name for name in stages[-1]['outputs'] if name != 'logits']
        file = f'stage_{k}.{SUFFIXES[format]}'
        write = _write_onnx if format == 'onnx' else _write_torch
        try:
            run = write(program, folder / file, inputs, outputs)
            results_by_count = {count: run([t[:count] for t in tensors]) for count in (len(images), 1)}
        except Exception as e:
            raise ValueError(
                f'torch {torch.__version__} cannot write stage {k} as {format}: {type(e).__name__}: {one_line(e)}'
            ) from e
        for count, results in results_by_count.items():
            for name, actual, wanted in zip(outputs, results, (t[:count] for t in expected)):
                error = (actual - wanted).abs().max().item() if actual.shape == wanted.shape else float('nan')
                if not error <= TOLERANCE * max(1.0, wanted.abs().max().item()):
                    raise ValueError(f'the exported {name} of stage {k} differs by {error:.1e} from the network.')
        stages.append(
            dict(
                file=file,
                digest=graph_digest(folder / file),
                exit=model.exit_names[k],
                answers=policy.is_on(k),
                inputs=inputs,
                outputs=outputs,
                **costs[k]._asdict(),
            )
        )
        state, _ = model.run_exit(k, state, answers=False)
    return stages


def _export_module(exit_: _StageModule, tensors: Sequence[torch.Tensor]) -> torch.export.ExportedProgram:
    """Export one stage for batches of any size, with only the weights that its graph reads."""
    batch = torch.export.Dim('batch', min=1, max=2**20)
    shapes = tuple({0: batch} for _ in tensors)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        module = torch.export.export(exit_, tuple(tensors), dynamic_shapes={'tensors': shapes}, strict=False).module()
        module.graph.eliminate_dead_code()
        module = torch.fx.GraphModule(module, module.graph)  # keeps only the weights that the graph reads
        return torch.export.export(module, tuple(tensors), dynamic_shapes=shapes, strict=False)


def _write_torch(
    program: torch.export.ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]
) -> Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]:
    """Write a graph and return a function that runs the written file."""
    torch.export.save(program, path)
    module = torch.export.load(path).module()
    return lambda tensors: module(*tensors)


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]
) -> Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]:
    """Write a graph and return a function that runs the written file."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        graph = torch.onnx.export(program, input_names=inputs, output_names=outputs, dynamo=True, verbose=False)
    assert graph is not None  # with dynamo
    graph.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])

    def run(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        arrays = {name: tensor.numpy(force=True) for name, tensor in zip(inputs, tensors)}
        return [torch.from_numpy(a).to(tensors[0].device) for a in session.run(list(outputs), arrays)]

    return run
