"""Stages exported by `export_stages`: their manifest, and a model that runs them in PyTorch."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from torch.export.passes import move_to_device_pass
from torch.fx.graph import CodeGen

from ..cost import ExitCost
from ..file_checks import check_graphs, check_manifest, read_json
from .policy import ExitPolicy

__all__ = ['MANIFEST', 'ExportedModel', 'read_manifest']

MANIFEST = 'manifest.json'


def read_manifest(directory: Union[str, Path]) -> Dict[str, Any]:
    """Read and check the manifest of a folder of exported stages.

    Args:
        directory: Folder that `export_stages` wrote.

    Returns:
        Content of ``manifest.json``.

    Raises:
        ValueError: The folder has no manifest, or the manifest is invalid.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise ValueError(f'{str(directory)!r} holds no exported stages ({MANIFEST}); create them with mlcsd-export.')
    manifest: Dict[str, Any] = read_json(path)
    check_manifest(manifest, repr(str(path)))
    return manifest


class ExportedModel:
    """Stages that ``export_stages(..., format='torch')`` wrote, for `AdaptiveModel`.

    Args:
        directory: Folder of exported stages.
        device: Device that runs the stages; default: the CPU.
        trusted: Whether the author of the folder is trusted: loading PyTorch's exported programs can run code that they
            contain. Loading needs True.

    Raises:
        ValueError: The folder holds no stages for PyTorch, or `trusted` is False.

    Examples:
        ```python
        adaptive = AdaptiveModel.from_pretrained('exported', trusted=True)
        logits, exit_index, cost = adaptive.predict(images)
        ```
    """

    def __init__(self, directory: Union[str, Path], device: Union[str, torch.device] = 'cpu', trusted: bool = False):
        manifest = read_manifest(directory)
        if manifest['kind'] != 'torch':
            raise ValueError(
                f'{str(directory)!r} holds stages for {manifest["kind"]}; its runner.py runs them, without PyTorch.'
            )
        if not trusted:
            raise ValueError(
                f'{str(directory)!r}: exported programs can run code when they are loaded; pass trusted=True if you '
                f'trust the author.'
            )
        check_graphs(directory, manifest)
        stages = manifest['stages']
        self.num_exits: int = len(stages)
        self.exit_names: List[str] = [stage['exit'] for stage in stages]
        self.num_classes: int = manifest['num_classes']
        self.data_config: Dict[str, Any] = manifest['data_config']
        self.class_names: Optional[List[Optional[str]]] = manifest.get('class_names')
        self.weights_digest: Optional[str] = manifest.get('weights_digest')
        self.costs = [ExitCost(**{name: stage[name] for name in ExitCost._fields}) for stage in stages]
        self.policy = ExitPolicy.from_dict(manifest['policy'], MANIFEST)
        self._answers = [stage['answers'] for stage in stages]
        self._with_head, self._without_head = [], []
        for stage in stages:
            program = torch.export.load(Path(directory) / stage['file'])
            program = move_to_device_pass(program, device)
            self._with_head.append(program.module())
            self._without_head.append(_remove_head(program.module()) if stage['answers'] else self._with_head[-1])

    def run_exit(self, k: int, state: Any, answers: bool = True) -> Tuple[Any, Optional[torch.Tensor]]:
        """Run stage k and, with `answers`, its head.

        Args:
            k: Index of the stage, from 0.
            state: State after stage k-1; the images [B, C, H, W] for stage 0.
            answers: Whether to run the head; default: True.

        Returns:
            The state after stage k, and logits [B, C] or None.

        Raises:
            ValueError: The exit was off when the network was exported, so its head was not exported.
        """
        state = (state,) if k == 0 else state
        if not answers:
            return self._without_head[k](*state), None
        if not self._answers[k]:
            raise ValueError(f'exit {k} was off in the exported policy; export the network again with this policy.')
        *state, logits = self._with_head[k](*state)
        return tuple(state), logits


def _remove_head(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Remove the head of a stage, in place, and return the stage."""
    output = next(node for node in module.graph.nodes if node.op == 'output')
    output.args = (output.args[0][:-1],)
    for node in module.graph.nodes:
        if node.target == '_guards_fn':  # newer releases of PyTorch check the input shapes in this node
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.graph.set_codegen(CodeGen())  # the code generator of the program expects the original number of outputs
    module.recompile()
    return module
