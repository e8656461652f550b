"""Exported stages: what lies in the folder that `export_stages` writes, and how PyTorch runs it."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from torch.export.passes import move_to_device_pass
from torch.fx.graph import CodeGen

from ..cost import ExitCost
from ..file_checks import check_manifest, read_json
from .policy import ExitPolicy

__all__ = ['MANIFEST', 'ExportedModel', 'read_manifest']

MANIFEST = 'manifest.json'


def read_manifest(directory: Union[str, Path]) -> Dict[str, Any]:
    """What a folder of exported stages says of itself.

    Raises:
        ValueError: It is no such folder, or its manifest isn't one that an export writes.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f'{str(directory)!r} holds no exported stages ({MANIFEST}); python -m timm_mlcsd.adaptive.export makes '
            f'them.'
        )
    manifest = read_json(path)
    check_manifest(manifest, repr(str(path)))
    return manifest


class ExportedModel:
    """Stages that ``export_stages(..., format='torch')`` wrote, for `AdaptiveModel`.

    Args:
        directory: The folder.
        device: Where the stages shall run.
        trusted: That whoever wrote the folder may run code here: PyTorch's exported programs are pickles inside.

    Raises:
        ValueError: It is no such folder, or not trusted.

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
                f'{str(directory)!r}: exported programs can run code when they are loaded. Where you trust who wrote '
                f'them, pass trusted=True.'
            )
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
        self._with_logits, self._without = [], []
        for stage in stages:
            program = torch.export.load(Path(directory) / stage['file'])
            program = move_to_device_pass(program, device)
            self._with_logits.append(program.module())
            self._without.append(_without_logits(program.module()) if stage['answers'] else self._with_logits[-1])

    def run_exit(self, k: int, state: Any, answers: bool = True) -> Tuple[Any, Optional[torch.Tensor]]:
        """Stage k and, where the exit `answers`, its head.

        Args:
            k: Stage, from 0.
            state: What stage k-1 left; the images [B, C, H, W] for stage 0.
            answers: Whether logits are wanted.

        Returns:
            The state that the stage leaves, and logits [B, C] or None.

        Raises:
            ValueError: The exit was off when the network was exported, so it has no head here.
        """
        state = (state,) if k == 0 else state
        if not answers:
            return self._without[k](*state), None
        if not self._answers[k]:
            raise ValueError(f'exit {k} was off in the policy that was exported; export again with this one.')
        *state, logits = self._with_logits[k](*state)
        return tuple(state), logits


def _without_logits(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same stage without its head."""
    output = next(node for node in module.graph.nodes if node.op == 'output')
    output.args = (output.args[0][:-1],)
    for node in module.graph.nodes:
        if node.target == '_guards_fn':  # newer releases of PyTorch check the inputs' shapes in it
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.graph.set_codegen(CodeGen())  # the program's own knows how many outputs there were
    module.recompile()
    return module
