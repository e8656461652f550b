"""timm's model interface for a wrapped backbone: the backbone's methods, adapted to keep the exits consistent."""

from operator import attrgetter
from typing import Any, Callable, Dict, List, Mapping, Optional, Set, Union

import torch
import torch.nn as nn
from timm.models import group_parameters

from .heads import ExitHead
from .module_types import ModuleListOf, TimmModel
from .multi_exit import MultiExitModel
from .stages.executors import ChainExecutor, GraphExecutor
from .stages.plan import Plan

__all__ = ['DELEGATED', 'BackboneContract']

# attributes and methods that the model takes over from its backbone
DELEGATED = (
    'distilled_training',
    'drop_rate',
    'dynamic_img_size',
    'embed_dim',
    'feature_dim',
    'feature_info',
    'get_intermediate_layers',
    'global_pool',
    'has_class_token',
    'head_hidden_size',
    'img_size',
    'in_chans',
    'no_embed_class',
    'num_classes',
    'num_features',
    'num_prefix_tokens',
    'num_reg_tokens',
    'num_stages',
    'output_fmt',
    'patch_size',
    'pool',
    'pool_include_prefix',
    'set_distilled_training',
)


class BackboneContract(MultiExitModel):
    """Base class that gives a network with a timm model as `backbone` the interface of timm models.

    Attributes and methods named in `DELEGATED` are those of the backbone. The model has them, and the methods below
    that are properties, only if the backbone has them. While ``set_distilled_training`` is on, the training logits of
    the last exit are the mean of the two logits of the backbone, as in evaluation mode.

    Attributes:
        backbone: A timm model.
        heads: Exit heads of all exits but the last, K - 1.
        plan: Modules of the backbone and taps of the exits.
        executor: Runs the stages of the plan.
        grad_checkpointing: Whether blocks are recomputed in the backward pass.
    """

    backbone: TimmModel
    heads: ModuleListOf[ExitHead]
    plan: Plan
    executor: Union[ChainExecutor, GraphExecutor]
    grad_checkpointing: bool = False
    _traits: Dict[str, Any]

    def replace_plan(self, names: List[str]) -> None:
        """Place the exits again after a change of the backbone, at the modules `names` and at its end."""
        raise NotImplementedError

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the unpooled features of the backbone, in the layout of the backbone, such as [B, C, H, W]."""
        return self.backbone.forward_features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Compute the backbone's logits [B, C], or pooled features with `pre_logits`, from its unpooled features."""
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    def forward_intermediates(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call ``forward_intermediates`` of the backbone."""
        return self.backbone.forward_intermediates(x, *args, **kwargs)

    def get_classifier(self) -> nn.Module:
        """Return the classifier of the last exit, which is that of the backbone."""
        return self.backbone.get_classifier()

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load the weights of backbone and exits, as ``torch.nn.Module`` does.

        Raises:
            RuntimeError: The weights do not fit, or are those of a plain backbone.
        """
        if state_dict and not any(name.startswith(('backbone.', 'heads.')) for name in state_dict):
            raise RuntimeError(
                f'the weights {", ".join([*state_dict][:3])}, ... are not those of a network with exits, whose names '
                f'begin with backbone. or heads.; load those of a plain backbone with timm_mlcsd.load_backbone.'
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifiers of all exits.

        Args:
            num_classes: Number of classes C; 0 for features instead of logits.
            global_pool: Pool of the backbone, and so of the last exit; the other exits keep theirs. Default None for
                no change; empty for unpooled features, with 0 classes only.

        Raises:
            ValueError: `global_pool` is empty and `num_classes` is not 0.
        """
        check_pool(global_pool, num_classes)
        self.backbone.reset_classifier(num_classes, global_pool)
        self._reset_heads(num_classes)
        self.forget_class_names()

    def _reset_heads(self, num_classes: int) -> None:
        weight = next(self.backbone.parameters())
        for head in self.heads:
            head.reset_classifier(num_classes, device=weight.device, dtype=weight.dtype)
        self.executor.invalidate()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable
        self.executor.set_grad_checkpointing(self, enable)

    def no_weight_decay(self) -> Set[str]:
        """Return the names of the parameters to exclude from weight decay."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, 'no_weight_decay') else ()
        return {f'backbone.{name}' for name in names}

    @property
    def set_input_size(self) -> Callable[..., None]:
        """``set_input_size(img_size=None, patch_size=None, ...)`` of the backbone; exits and heads are kept."""
        return self._if_backbone_has('set_input_size', self._set_input_size)

    def _set_input_size(self, *args: Any, **kwargs: Any) -> None:
        before = dict(getattr(self.backbone, '_model_args', {}))
        self.backbone.set_input_size(*args, **kwargs)
        after = getattr(self.backbone, '_model_args', {})
        # record the changed arguments as timm does, so that a saved network is created with them
        changed = {key: value for key, value in after.items() if key not in before or before[key] != value}
        self._model_args = {**getattr(self, '_model_args', {}), **changed}
        size = tuple(self.backbone._traits['img_size'])
        self._traits = dict(self._traits, img_size=size)
        self.probe_size = (self.probe_size[0], *size)
        self.replace_plan(self.exit_names[:-1])

    @property
    def prune_intermediate_layers(self) -> Callable[..., List[int]]:
        """``prune_intermediate_layers(indices=1, prune_norm=False, prune_head=True)`` of the backbone.

        Exits after the last layer that is kept are removed, and the last exit moves to the new end of the backbone.
        The method returns the indices of the kept features.
        """
        return self._if_backbone_has('prune_intermediate_layers', self._prune_intermediate_layers)

    def _prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        taken = self.backbone.prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        if prune_head:
            self._reset_heads(0)
        remaining = {name for name, _ in self.backbone.named_modules()}
        self.replace_plan([name for name in self.exit_names[:-1] if name in remaining])
        return taken

    def _if_backbone_has(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return `method`, or raise an AttributeError if the backbone has no attribute `name`."""
        getattr(self.backbone, name)
        return method

    @property
    def group_matcher(self) -> Callable[..., Callable[[str], int]]:
        """``group_matcher(coarse=False)``: function from the name of a parameter or module to its layer group.

        A head belongs to the layer group of its tap. The attribute does not exist if timm defines no layer groups for
        the backbone.
        """
        return self._if_backbone_has('group_matcher', self._group_matcher)

    def _group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        layers: Dict[str, int] = group_parameters(self.backbone, self.backbone.group_matcher(coarse), reverse=True)
        groups = {f'backbone.{name}': layer for name, layer in layers.items()}
        modules = [module.name for module in self.plan.modules]
        for k, (head, tap) in enumerate(zip(self.heads, self.exit_names)):
            # all modules up to the tap, as the tap may be a pool without parameters
            path = tuple(f'{name}.' for name in modules[: modules.index(tap) + 1])
            group = max((layer for name, layer in layers.items() if name.startswith(path)), default=0)
            groups.update({f'heads.{k}.{name}': group for name, _ in head.named_parameters()})

        def match(name: str) -> int:
            if name in groups:
                return groups[name]
            below = [group for n, group in groups.items() if not name or n.startswith(f'{name}.')]
            return max(below) if below else match(name.rpartition('.')[0])

        return match


# the property raises the backbone's AttributeError, so hasattr(model, name) is False without it
for _name in DELEGATED:
    setattr(BackboneContract, _name, property(attrgetter(f'backbone.{_name}')))


def check_pool(global_pool: Optional[str], num_classes: Optional[int]) -> None:
    """Raise a ValueError for a classifier without a pool, as it would return logits per pixel."""
    if global_pool == '' and num_classes != 0:
        raise ValueError(
            "global_pool='' leaves the last exit's maps unpooled and needs num_classes=0; pass that, or a pool such as "
            'avg or max.'
        )
