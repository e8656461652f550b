"""A timm backbone -> a multi-exit network."""

import logging
import math
from contextlib import ExitStack
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union
from weakref import WeakSet

import timm
import torch
import torch.nn as nn
from timm.layers import to_2tuple
from timm.models import get_model_input_config, get_model_traits

from .contract import BackboneContract, check_pool
from .heads import ExitHead, check_kinds, head_style
from .multi_exit import MultiExitModel, MultiExitOutput
from .stages.executors import ChainExecutor, GraphExecutor
from .stages.hooks import what_hangs_on
from .stages.plan import Plan, plan_stages
from .stages.probe import TracedModule
from .stages.small_input import has_small_input

__all__ = ['DEFAULT_EXIT_HEAD', 'DEFAULT_EXIT_POOL', 'MultiExitBackbone', 'create_multi_exit']

_logger = logging.getLogger(__name__)

DEFAULT_EXIT_HEAD = 'slic_dw'
DEFAULT_EXIT_POOL = 'max'

# the backbones that belong to a multi-exit network
_WRAPPED: 'WeakSet[nn.Module]' = WeakSet()


def create_multi_exit(
    backbone: Union[str, nn.Module],
    exits: Union[int, Sequence[str], None] = None,
    exit_head: str = DEFAULT_EXIT_HEAD,
    exit_pool: str = DEFAULT_EXIT_POOL,
    small_input: bool = False,
    pretrained_backbone: Union[bool, str] = False,
    **kwargs: Any,
) -> 'MultiExitBackbone':
    """Turn a timm model into a multi-exit network.

    Args:
        backbone: A timm model name, or a model that timm made (it is wrapped, not copied).
        exits: Number of exits, or the names of the modules to tap for all exits but the last; None for 8, or as many
            as the backbone has blocks for.
        exit_head: Reduction layers of the exits: ``slic`` (the paper's), ``slic_dw``, ``conv1x1``, ``bottleneck``.
        exit_pool: Global pool of the exits, ``max`` (the paper's) or ``avg``; the last exit keeps the backbone's own.
        small_input: Take the first two downsamplings out, for images of 32 to 64 pixels.
        pretrained_backbone: True or a tag of `backbone` to start from timm's weights.
        **kwargs: What ``timm.create_model`` takes for `backbone`: ``num_classes``, ``in_chans``, ``drop_rate``, ...

    Returns:
        A `MultiExitBackbone` with the backbone, its weights included, below ``backbone.``.

    Raises:
        ValueError: The arguments ask for what the backbone does not have.

    Examples:
        ```python
        model = timm_mlcsd.create_multi_exit('resnet50', exits=4, pretrained_backbone=True, num_classes=10)
        logits, features = model(images)  # in training mode
        ```
    """
    if 'pretrained' in kwargs:
        raise ValueError('pretrained is not for the backbone; pass pretrained_backbone=True, or a tag.')
    check_pool(kwargs.get('global_pool'), kwargs.get('num_classes'))
    img_size = kwargs.get('img_size')
    if isinstance(backbone, str):
        name = backbone
        if isinstance(pretrained_backbone, str):
            name = f'{backbone.partition(".")[0]}.{pretrained_backbone}'
        backbone = timm.create_model(name, pretrained=bool(pretrained_backbone), **kwargs)
    elif set(kwargs) - {'img_size'} or pretrained_backbone:
        given = sorted(kwargs) + ['pretrained_backbone'] * bool(pretrained_backbone)
        raise ValueError(f'{given} cannot be applied to a backbone that is already made; pass its name instead.')
    if small_input and pretrained_backbone:
        _logger.warning(
            'small_input=True with pretrained weights: a large stem conv is new and untrained, and the rest was '
            'trained at a quarter of the resolution that it now works at.'
        )
    return MultiExitBackbone(backbone, exits, exit_head, exit_pool, small_input, img_size=img_size)


class MultiExitBackbone(BackboneContract):
    """A timm model that is cut into stages, with a head at every cut.

    In evaluation mode it is the timm model: same output, bit for bit, same methods (`BackboneContract`). A backbone
    that is a plain chain of modules runs stage by stage in training too. Any other trains as a whole, its exits reading
    the tapped modules' outputs; its stages, for evaluation, are cut out of its exported graph when they are first
    asked for. Either way the stages in a row are compared with the backbone when `resumable` is first asked for.

    Args:
        backbone: A timm model.
        exits: Number of exits, or names of the modules to tap for all exits but the last; None for 8, or as many as
            the backbone has blocks for.
        exit_head: Reduction layers of the exits.
        exit_pool: Global pool of the exits.
        small_input: Take the first two downsamplings out.
        img_size: (height, width) that the backbone was made for; default: what it says of itself.

    Raises:
        ValueError: The arguments ask for what the backbone does not have, or it belongs to a multi-exit network
            already. The backbone is as it was then.
    """

    def __init__(
        self,
        backbone: nn.Module,
        exits: Union[int, Sequence[str], None] = None,
        exit_head: str = DEFAULT_EXIT_HEAD,
        exit_pool: str = DEFAULT_EXIT_POOL,
        small_input: bool = False,
        img_size: Optional[Sequence[int]] = None,
    ):
        super().__init__()
        _check_backbone(backbone)
        check_kinds(exit_head, exit_pool)
        self.backbone = backbone
        self.pretrained_cfg = self.default_cfg = without_weights(backbone.default_cfg)
        self.pretrained_model_args = {}
        # what timm's resolvers of preprocessing ask for
        self._traits = dict(get_model_traits(backbone), first_conv=self.default_cfg.get('first_conv'))
        chans, *size = get_model_input_config(backbone)['input_size']
        self.probe_size = (chans, *to_2tuple(img_size or size))
        self.frozen: Optional[List[str]] = None
        with ExitStack() as undo:
            plan = plan_stages(backbone, self.probe_size, exits, small_input, undo)
            self.heads = _make_heads(backbone, plan, exit_head, exit_pool)
            self._use_plan(plan)
            undo.pop_all()  # nothing fails any more
        # spelled out, so that what is saved today means the same network when a default changes
        exits = list(exits) if isinstance(exits, (list, tuple)) else self.num_exits
        self.exit_args = dict(exits=exits, exit_head=exit_head, exit_pool=exit_pool, small_input=small_input)
        self.training = backbone.training
        self.heads.train(backbone.training)
        _WRAPPED.add(backbone)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        _WRAPPED.add(self.backbone)  # that of a copy

    def _use_plan(self, plan: Plan) -> None:
        """Let the stages be those of `plan`, to which the heads belong."""
        self.plan = plan
        self.exit_names = [place.name for place in plan.tapped]
        self.num_exits = len(plan.tapped)
        last = plan.tapped[-1].layout
        dims = [*(head.exit_feature_dim for head in self.heads), last.channels]
        self.exit_feature_dim = dims[0] if len(set(dims)) == 1 else dims
        self.reduction = self.probe_size[-1] // last.width
        self.executor = (ChainExecutor if plan.is_chain else GraphExecutor)(self.backbone, plan)

    def replace_plan(self, names: List[str]) -> None:
        plan = _plan_by_name(self.backbone, self.probe_size, names)
        kept = {place.name for place in plan.tapped[:-1]}
        self.heads = nn.ModuleList(head for name, head in zip(self.exit_names, self.heads) if name in kept)
        if len(kept) < self.num_exits - 1:
            gone = [name for name in self.exit_names[:-1] if name not in kept]
            _logger.info(f'Exits that the backbone no longer has are gone: {", ".join(gone)}.')
            self.exit_args = dict(self.exit_args, exits=sorted(kept, key=self.exit_names.index) or 1)
        if self.frozen is not None:
            self.frozen = [name for name, _ in self.backbone.named_parameters() if name in self.frozen]
        self.executor.release(self.backbone)
        self._use_plan(plan)
        self.executor.set_grad_checkpointing(self, self.grad_checkpointing)

    @property
    def resumable(self) -> bool:
        """Whether `run_stage` and `run_head` work one by one; found out when first asked, `why_not_resumable` tells."""
        return self.why_not_resumable is None

    @property
    def why_not_resumable(self) -> Optional[str]:
        """Why the stages cannot be run one by one; None where they can."""
        hanging = what_hangs_on(self)
        if hanging:
            return f'the network itself has {hanging}, which its stages would leave out'
        return self.executor.unsupported_reason(self)

    def run_stage(self, k: int, state: Any) -> Any:
        return self.executor.run_stage(self, k, state)

    def run_head(self, k: int, state: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        feature = self.executor.read_tap(k, state)
        if k < self.num_exits - 1:
            return self.heads[k](feature)
        return _one_answer(self.executor.run_end(self, state)), feature

    def forward_exits(self, x: torch.Tensor) -> MultiExitOutput:
        if self.executor.runs_in_stages(self, x):
            return super().forward_exits(x)
        last, maps = self.executor.run_whole(self, x)
        outputs = [head(m) for head, m in zip(self.heads, maps)] + [(_one_answer(last), maps[-1])]
        logits, features = zip(*outputs)
        return MultiExitOutput(logits, features)

    def forward(self, x: torch.Tensor) -> Union[MultiExitOutput, torch.Tensor]:
        """All exits in training mode; in evaluation mode what the backbone gives: the last exit's logits [B, C]."""
        return self.forward_exits(x) if self.training else self.backbone(x)

    def freeze_backbone(self, freeze: bool = True) -> None:
        """Let only the heads train: the backbone, and so the last exit, stays as it is, bit for bit.

        Its parameters get no gradients, and it runs in evaluation mode whatever the model's own: BatchNorm keeps its
        statistics, nothing is dropped.

        Args:
            freeze: False to let it train again.
        """
        if freeze and self.frozen is None:
            self.frozen = [name for name, p in self.backbone.named_parameters() if p.requires_grad]
        for name in self.frozen or ():
            self.backbone.get_parameter(name).requires_grad_(not freeze)
        if not freeze:
            self.frozen = None
        self.train(self.training)

    def train(self, mode: bool = True) -> 'MultiExitBackbone':
        super().train(mode)
        if self.frozen is not None:
            self.backbone.eval()
        return self

    def prepare(self, input_size: Sequence[int]) -> None:
        """Make the stages for images of (C, H, W) now rather than when they first come.

        Raises:
            ValueError: The backbone doesn't take such images, or cannot be cut.
        """
        self.check_input_size(*input_size[1:])
        self.executor.prepare(self, tuple(input_size))

    def check_input_size(self, height: int, width: int) -> None:
        """Raise a ValueError for images too small to be reduced as often as the backbone does."""
        if min(height, width) < self.reduction:
            small = '' if self.reduction < 32 else ', or small_input=True (a quarter of the reduction)'
            raise ValueError(
                f'image size {height}x{width} is too small: the network reduces {self.reduction} times; '
                f'use at least {self.reduction}x{self.reduction}{small}.'
            )


def without_weights(cfg: Dict[str, Any]) -> Dict[str, Any]:
    """A backbone's cfg for its multi-exit network: no weights, and what it names lies below ``backbone.``."""
    names = {
        key: f'backbone.{cfg[key]}' if isinstance(cfg[key], str) else [f'backbone.{name}' for name in cfg[key]]
        for key in ('first_conv', 'classifier')
        if cfg.get(key)
    }
    sources = dict.fromkeys(('file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'tag', 'custom_load'))
    return {**cfg, **sources, **names, 'url': '', 'architecture': f'mlcsd_{cfg["architecture"]}'}


def _check_backbone(backbone: nn.Module) -> None:
    """Raise a ValueError where `backbone` cannot get exits."""
    kind = type(backbone).__name__
    if isinstance(backbone, MultiExitModel):
        raise ValueError(f'{kind} has exits already; pass a plain backbone.')
    if hasattr(backbone, '_orig_mod'):
        raise ValueError('the backbone is compiled, so nothing in it can be watched; wrap it first, then compile.')
    needed = ('default_cfg', 'feature_info', 'forward_features', 'forward_head')
    missing = [name for name in needed if not hasattr(backbone, name)]
    if missing:
        raise ValueError(f'{kind} is not a timm model with features: it has no {", ".join(missing)}.')
    if backbone in _WRAPPED:
        raise ValueError(
            f'this {kind} belongs to a multi-exit network already, and two would change each other; pass another one '
            f'(timm.create_model or copy.deepcopy makes it).'
        )
    if has_small_input(backbone):
        raise ValueError(
            f'the first two downsamplings of this {kind} have been taken out already (small_input=True); pass a '
            f'backbone as timm.create_model makes it.'
        )


def _plan_by_name(backbone: nn.Module, input_size: Sequence[int], names: List[str]) -> Plan:
    """Exits at `names`, as far as they lie ahead of the backbone's end, and there."""
    while True:
        try:
            plan = plan_stages(backbone, input_size, names or 1)
        except ValueError:
            if not names:
                raise
            names = names[:-1]  # it is the end itself, or not there any more
            continue
        ahead = [place.name for place in plan.tapped[:-1] if place.macs < plan.tapped[-1].macs]
        if len(ahead) == len(plan.tapped) - 1:
            return plan
        names = ahead


def _make_heads(backbone: nn.Module, plan: Plan, exit_head: str, exit_pool: str) -> nn.ModuleList:
    """The heads of all exits but the last."""
    weight = next(backbone.parameters())
    dim = plan.tapped[-1].layout.channels
    places = plan.places[: plan.taps[-1] + 1]
    style = head_style(backbone)
    dd = dict(device=weight.device, dtype=weight.dtype)
    return nn.ModuleList(
        ExitHead(_widths_below(tap, places), dim, backbone.num_classes, exit_head, exit_pool, style, **dd)
        for tap in plan.tapped[:-1]
    )


def _one_answer(logits: Union[torch.Tensor, Tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """The mean of the pair that a backbone with distillation tokens gives while it is trained with them."""
    return sum(logits) / len(logits) if isinstance(logits, tuple) else logits


def _widths_below(tap: TracedModule, places: Sequence[TracedModule]) -> List[int]:
    """The tap's width, then the backbone's width at every halving of the resolution from there to its end."""
    layouts = [place.layout for place in places if place.layout is not None]
    end = layouts[-1].width
    halvings = round(math.log2(tap.layout.width / end))
    widths = [tap.layout.channels]
    for n in range(halvings - 1, -1, -1):
        at_level = [layout.channels for layout in layouts if round(math.log2(layout.width / end)) == n]
        widths.append(at_level[-1] if at_level else widths[-1])
    return widths
