"""timm's model contract for a wrapped backbone: the backbone's own methods, kept in step with the exits."""

from operator import attrgetter
from typing import Any, Callable, Dict, List, Optional, Set, Union

import torch
import torch.nn as nn
from timm.models import group_parameters

from .multi_exit import MultiExitModel
from .stages.plan import Plan

__all__ = ['DELEGATED', 'BackboneContract']

# what the model has where its backbone has it, and as the backbone has it
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
    """What timm expects of a model, for one that has a timm model as `backbone` and an exit head for all other exits.

    Attributes and methods named in `DELEGATED` are the backbone's; like those below, the model has them where the
    backbone has them. While ``set_distilled_training`` is on, the last exit's training logits are the mean of the
    backbone's pair of answers, as in evaluation mode.
    """

    backbone: nn.Module
    heads: nn.ModuleList
    plan: Plan
    grad_checkpointing: bool = False

    def replace_plan(self, names: List[str]) -> None:
        """Place the exits anew in a backbone that has changed: at the modules `names` and at its end."""
        raise NotImplementedError

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The backbone's unpooled features, in its own layout: [B, C, H, W], say."""
        return self.backbone.forward_features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The backbone's own end: its features to logits [B, C], or to pooled features with `pre_logits`."""
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    def forward_intermediates(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The backbone's ``forward_intermediates``."""
        return self.backbone.forward_intermediates(x, *args, **kwargs)

    def get_classifier(self) -> nn.Module:
        """The last exit's classifier, which is the backbone's."""
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Make new classifiers for all exits.

        Args:
            num_classes: C, 0 for features instead of logits.
            global_pool: Pool of the backbone, and so of the last exit; the other exits keep theirs. Empty for
                unpooled features, with 0 classes only.

        Raises:
            ValueError: `global_pool` is empty and `num_classes` is not 0.
        """
        check_pool(global_pool, num_classes)
        self.backbone.reset_classifier(num_classes, global_pool)
        self._reset_heads(num_classes)

    def _reset_heads(self, num_classes: int) -> None:
        weight = next(self.backbone.parameters())
        for head in self.heads:
            head.reset_classifier(num_classes, device=weight.device, dtype=weight.dtype)
        self.executor.invalidate()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping what is inside them."""
        self.grad_checkpointing = enable
        self.executor.set_grad_checkpointing(self, enable)

    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters that want no weight decay."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, 'no_weight_decay') else ()
        return {f'backbone.{name}' for name in names}

    @property
    def set_input_size(self) -> Callable[..., None]:
        """``set_input_size(img_size=None, patch_size=None, ...)``: the backbone's; exits and heads stay."""
        return self._where_backbone_has('set_input_size', self._set_input_size)

    def _set_input_size(self, *args: Any, **kwargs: Any) -> None:
        before = dict(getattr(self.backbone, '_model_args', {}))
        self.backbone.set_input_size(*args, **kwargs)
        after = getattr(self.backbone, '_model_args', {})
        # what timm notes of the change, so that a saved network is made again like this
        changed = {key: value for key, value in after.items() if key not in before or before[key] != value}
        self._model_args = {**getattr(self, '_model_args', {}), **changed}
        size = tuple(self.backbone._traits['img_size'])
        self._traits = dict(self._traits, img_size=size)
        self.probe_size = (self.probe_size[0], *size)
        self.replace_plan(self.exit_names[:-1])

    @property
    def prune_intermediate_layers(self) -> Callable[..., List[int]]:
        """``prune_intermediate_layers(indices=1, prune_norm=False, prune_head=True)``: the backbone's; exits behind
        what is kept go, the last exit is the new end. Returns the indices."""
        return self._where_backbone_has('prune_intermediate_layers', self._prune_intermediate_layers)

    def _prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        taken = self.backbone.prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        if prune_head:
            self._reset_heads(0)
        left = {name for name, _ in self.backbone.named_modules()}
        self.replace_plan([name for name in self.exit_names[:-1] if name in left])
        return taken

    def _where_backbone_has(self, name: str, method: Callable) -> Callable:
        getattr(self.backbone, name)  # an AttributeError where it does not
        return method

    @property
    def group_matcher(self) -> Callable[..., Callable[[str], int]]:
        """``group_matcher(coarse=False)``: layer group of every parameter or module by name; a head belongs to the
        group of its tap. Where timm gives the backbone no layer groups there is no such attribute."""
        return self._where_backbone_has('group_matcher', self._group_matcher)

    def _group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        layers: Dict[str, int] = group_parameters(self.backbone, self.backbone.group_matcher(coarse), reverse=True)
        groups = {f'backbone.{name}': layer for name, layer in layers.items()}
        modules = [place.name for place in self.plan.places]
        for k, (head, tap) in enumerate(zip(self.heads, self.exit_names)):
            # up to the tap, not the tap alone: a pool has no parameters
            path = tuple(f'{name}.' for name in modules[: modules.index(tap) + 1])
            group = max((layer for name, layer in layers.items() if name.startswith(path)), default=0)
            groups.update({f'heads.{k}.{name}': group for name, _ in head.named_parameters()})

        def match(name: str) -> int:
            if name in groups:
                return groups[name]
            below = [group for n, group in groups.items() if not name or n.startswith(f'{name}.')]
            return max(below) if below else match(name.rpartition('.')[0])

        return match


# an AttributeError of the backbone's becomes one of the model's: hasattr is False
for _name in DELEGATED:
    setattr(BackboneContract, _name, property(attrgetter(f'backbone.{_name}')))


def check_pool(global_pool: Optional[str], num_classes: Optional[int]) -> None:
    """Raise a ValueError where a network with classes shall not pool: one image would have many answers."""
    if global_pool == '' and num_classes != 0:
        raise ValueError(
            "global_pool='' leaves the last exit's maps unpooled, which works with num_classes=0 only: pass that, or a "
            "pool of timm's, avg or max say."
        )
