"""Turn a timm backbone into a multi-exit network."""

import logging
import math
from contextlib import ExitStack
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union, cast
from weakref import WeakSet

import timm
import torch
import torch.nn as nn
from timm.layers import to_2tuple
from timm.models import get_model_input_config, get_model_traits

from .contract import BackboneContract, check_pool
from .heads import ExitHead, check_kinds, head_style
from .module_types import ModuleListOf, TimmModel
from .multi_exit import MultiExitModel, MultiExitOutput
from .stages.executors import ChainExecutor, GraphExecutor
from .stages.hooks import find_call_override
from .stages.plan import Plan, plan_stages
from .stages.probe import TracedModule
from .stages.small_input import has_small_input

__all__ = ['DEFAULT_EXIT_HEAD', 'DEFAULT_EXIT_POOL', 'MultiExitBackbone', 'create_multi_exit']

_logger = logging.getLogger(__name__)

DEFAULT_EXIT_HEAD = 'slic_dw'
DEFAULT_EXIT_POOL = 'max'

# backbones that are part of a multi-exit network
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
        backbone: Name of a timm model, or a model created by timm, which is wrapped, not copied.
        exits: Number of exits, or names of the modules to tap for all exits but the last; default None for 8 exits, or
            fewer if the backbone has fewer blocks.
        exit_head: Reduction layers of the exits: ``slic`` (as in the paper), ``slic_dw`` (default), ``conv1x1`` or
            ``bottleneck``.
        exit_pool: Global pool of all exits but the last: ``max`` (default, as in the paper) or ``avg``; the last exit
            keeps the pool of the backbone.
        small_input: Whether to remove the first two downsamplings, for images of 32 to 64 pixels; default False.
        pretrained_backbone: True or a tag of `backbone` to load timm's pretrained weights; default False.
        **kwargs: Further arguments of ``timm.create_model`` for `backbone`: ``num_classes``, ``in_chans``,
            ``drop_rate``, ...

    Returns:
        Multi-exit network that contains the backbone and its weights as ``backbone``.

    Raises:
        ValueError: The backbone does not support the arguments, or an argument is unknown.

    Examples:
        ```python
        model = timm_mlcsd.create_multi_exit('resnet50', exits=4, pretrained_backbone=True, num_classes=10)
        logits, features = model(images)  # in training mode
        ```
    """
    if 'pretrained' in kwargs:
        raise ValueError('pretrained does not apply to the backbone; pass pretrained_backbone=True, or a tag.')
    check_pool(kwargs.get('global_pool'), kwargs.get('num_classes'))
    img_size = kwargs.get('img_size')
    if isinstance(backbone, str):
        name = backbone
        if isinstance(pretrained_backbone, str):
            name = f'{backbone.partition(".")[0]}.{pretrained_backbone}'
        backbone = timm.create_model(name, pretrained=bool(pretrained_backbone), **kwargs)
    elif set(kwargs) - {'img_size'} or pretrained_backbone:
        given = sorted(kwargs) + ['pretrained_backbone'] * bool(pretrained_backbone)
        raise ValueError(f'{given} cannot be applied to an existing backbone; pass the name of the backbone instead.')
    if small_input and pretrained_backbone:
        _logger.warning(
            'small_input=True with pretrained weights: a large stem conv gets new random weights, and the other layers '
            'were trained at a quarter of the resolution that they now have.'
        )
    return MultiExitBackbone(backbone, exits, exit_head, exit_pool, small_input, img_size=img_size)


class MultiExitBackbone(BackboneContract):
    """A timm model divided into stages, with an exit head after every stage but the last.

    In evaluation mode the network behaves like the timm model: bit for bit the same output, and the same methods
    (`BackboneContract`). A backbone that is a chain of modules runs stage by stage, in training only if its forward is
    timm's own code, because another may do more there. Any other backbone runs in one forward pass in training, in
    which the exits read the outputs of the tapped modules; its stages for evaluation are cut from its exported graph at
    their first use. In both cases the stages in sequence are compared with the backbone when `resumable` is first read.

    Args:
        backbone: A timm model.
        exits: Number of exits, or names of the modules to tap for all exits but the last; default None for 8 exits, or
            fewer if the backbone has fewer blocks.
        exit_head: Reduction layers of the exits, a key of `EXIT_HEADS`; default ``slic_dw``.
        exit_pool: Global pool of all exits but the last, one of `EXIT_POOLS`; default ``max``.
        small_input: Whether to remove the first two downsamplings; default False.
        img_size: (height, width) in pixels that the backbone was made for; default: the size in its configuration.

    Raises:
        ValueError: The backbone does not support the arguments, or is already part of a multi-exit network. It stays
            unchanged in that case.
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
        backbone = _checked_backbone(backbone)
        check_kinds(exit_head, exit_pool)
        if not isinstance(small_input, bool):  # any text would count as True
            raise ValueError(f'small_input={small_input!r}: expected True or False.')
        self.backbone = backbone
        self.pretrained_cfg = self.default_cfg = without_weights(backbone.default_cfg)
        self.pretrained_model_args: Dict[str, Any] = {}
        # timm reads these when it resolves the preprocessing
        self._traits = dict(get_model_traits(backbone), first_conv=self.default_cfg.get('first_conv'))
        chans, *size = get_model_input_config(backbone)['input_size']
        self.probe_size = (chans, *to_2tuple(img_size or size))
        self.frozen: Optional[List[str]] = None
        with ExitStack() as undo:
            plan = plan_stages(backbone, self.probe_size, exits, small_input, undo)
            self.heads = _make_heads(backbone, plan, exit_head, exit_pool)
            self._use_plan(plan)
            undo.pop_all()  # keep the changes to the backbone, as no error can follow
        # all values explicit, so that a saved network is independent of later changes of the defaults
        exits = list(exits) if isinstance(exits, (list, tuple)) else self.num_exits
        self.exit_args = dict(exits=exits, exit_head=exit_head, exit_pool=exit_pool, small_input=small_input)
        self.training = backbone.training
        self.heads.train(backbone.training)
        _WRAPPED.add(backbone)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        _WRAPPED.add(self.backbone)  # the backbone of a copy

    def _use_plan(self, plan: Plan) -> None:
        """Use the stages of `plan`, for which the heads were made."""
        self.plan = plan
        self.exit_names = [tap.name for tap in plan.tapped]
        self.num_exits = len(plan.tapped)
        last = plan.tapped[-1].map_layout
        dims: List[int] = [*(head.exit_feature_dim for head in self.heads), last.channels]
        self.exit_feature_dim = dims[0] if len(set(dims)) == 1 else dims
        self.reduction = self.probe_size[-1] // last.width
        self.executor = (ChainExecutor if plan.is_chain else GraphExecutor)(self.backbone, plan)

    def replace_plan(self, names: List[str]) -> None:
        """Place the exits again after a change of the backbone.

        Args:
            names: Tapped modules of all exits but the last. Exits that are no longer before the end of the backbone
                are removed with their heads.
        """
        plan = _plan_by_name(self.backbone, self.probe_size, names)
        kept = {tap.name for tap in plan.tapped[:-1]}
        self.heads = ModuleListOf(head for name, head in zip(self.exit_names, self.heads) if name in kept)
        if len(kept) < self.num_exits - 1:
            removed = [name for name in self.exit_names[:-1] if name not in kept]
            _logger.info(f'Removed the exits whose modules the backbone no longer has: {", ".join(removed)}.')
            self.exit_args = dict(self.exit_args, exits=sorted(kept, key=self.exit_names.index) or 1)
        if self.frozen is not None:
            self.frozen = [name for name, _ in self.backbone.named_parameters() if name in self.frozen]
        self.executor.release(self.backbone)
        self._use_plan(plan)
        self.executor.set_grad_checkpointing(self, self.grad_checkpointing)

    @property
    def resumable(self) -> bool:  # type: ignore[override]  # a plain attribute where it is not computed
        """Whether `run_stage` and `run_head` work one by one; determined at the first read, see `why_not_resumable`."""
        return self.why_not_resumable is None

    @property
    def why_not_resumable(self) -> Optional[str]:
        """Reason why the stages cannot run one by one; None if they can."""
        override = find_call_override(self)
        if override:
            return f'the network itself has {override}, which its stages would skip'
        return self.executor.unsupported_reason(self)

    def run_stage(self, k: int, state: Any) -> Any:
        """Run stage k; see `MultiExitModel.run_stage`.

        Raises:
            ValueError: The stages cannot run one by one (`why_not_resumable`).
            RuntimeError: The backbone is not a chain of modules with timm's own forward, and the network is in training
                mode.
        """
        return self.executor.run_stage(self, k, state)

    def run_head(self, k: int, state: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        """Run the head of exit k; see `MultiExitModel.run_head`."""
        feature = self.executor.read_tap(k, state)
        if k < self.num_exits - 1:
            logits: torch.Tensor
            logits, feature = self.heads[k](feature)
            return logits, feature
        return _mean_logits(self.executor.run_end(self, state)), feature

    def forward_exits(self, x: torch.Tensor) -> MultiExitOutput:
        """Compute the outputs of all exits for images [B, C, H, W], in training or evaluation mode."""
        if self.executor.runs_in_stages(self, x):
            return super().forward_exits(x)
        last, maps = self.executor.run_whole(self, x)
        outputs = [head(m) for head, m in zip(self.heads, maps)] + [(_mean_logits(last), maps[-1])]
        logits, features = zip(*outputs)
        return MultiExitOutput(logits, features)

    def forward(self, x: torch.Tensor) -> Union[MultiExitOutput, torch.Tensor]:
        """Compute all exits in training mode, the output of the backbone in evaluation mode.

        Args:
            x: Images [B, C, H, W].

        Returns:
            `MultiExitOutput` in training mode, logits [B, C] of the last exit in evaluation mode.
        """
        return self.forward_exits(x) if self.training else self.backbone(x)

    def freeze_backbone(self, freeze: bool = True) -> None:
        """Freeze the backbone, so that only the heads train and the last exit stays bit for bit the same.

        The parameters of the backbone get no gradients. It stays in evaluation mode in either mode of the network, so
        BatchNorm statistics do not change and dropout is off. A classifier that `reset_classifier` makes afterwards
        trains, because it is untrained.

        Args:
            freeze: Whether to freeze; False trains the backbone again. Default True.
        """
        if freeze and self.frozen is None:
            self.frozen = [name for name, p in self.backbone.named_parameters() if p.requires_grad]
        parameters = dict(self.backbone.named_parameters())
        for name in self.frozen or ():
            if name in parameters:  # not a classifier that was removed since
                parameters[name].requires_grad_(not freeze)
        if not freeze:
            self.frozen = None
        self.train(self.training)

    def train(self, mode: bool = True) -> 'MultiExitBackbone':
        """Set training or evaluation mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen is not None:
            self.backbone.eval()
        return self

    def prepare(self, input_size: Sequence[int]) -> None:
        """Make the stages for one input size now instead of at the first image of that size.

        Args:
            input_size: (C, H, W) of the images.

        Raises:
            ValueError: The images are too small, or the backbone cannot be cut.
        """
        self.check_input_size(*input_size[1:])
        self.executor.prepare(self, tuple(input_size))

    def check_input_size(self, height: int, width: int) -> None:
        """Check that images are large enough for the reduction of the backbone.

        Args:
            height: Height of the images in pixels.
            width: Width of the images in pixels.

        Raises:
            ValueError: The images are smaller than one pixel of the last map.
        """
        if min(height, width) < self.reduction:
            small = '' if self.reduction < 32 else ', or small_input=True (a quarter of the reduction)'
            raise ValueError(
                f'image size {height}x{width} is too small: the network reduces {self.reduction} times; '
                f'use at least {self.reduction}x{self.reduction}{small}.'
            )


def without_weights(cfg: Dict[str, Any]) -> Dict[str, Any]:
    """Derive the default cfg of a multi-exit network from that of its backbone.

    Args:
        cfg: Default cfg of the backbone.

    Returns:
        Copy without sources of weights, with ``backbone.`` before the names of modules.
    """
    names = {
        key: f'backbone.{cfg[key]}' if isinstance(cfg[key], str) else [f'backbone.{name}' for name in cfg[key]]
        for key in ('first_conv', 'classifier')
        if cfg.get(key)
    }
    sources = dict.fromkeys(('file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'tag', 'custom_load'))
    return {**cfg, **sources, **names, 'url': '', 'architecture': f'mlcsd_{cfg["architecture"]}'}


def _checked_backbone(backbone: nn.Module) -> TimmModel:
    """Return `backbone`; raise a ValueError if it cannot get exits."""
    kind = type(backbone).__name__
    if isinstance(backbone, MultiExitModel):
        raise ValueError(f'{kind} has exits already; pass a plain backbone.')
    if hasattr(backbone, '_orig_mod'):
        raise ValueError('the backbone is compiled, so its modules cannot be traced; wrap it first, then compile.')
    needed = ('default_cfg', 'feature_info', 'forward_features', 'forward_head')
    missing = [name for name in needed if not hasattr(backbone, name)]
    if missing:
        raise ValueError(f'{kind} is not a timm model with features: it has no {", ".join(missing)}.')
    if backbone in _WRAPPED:
        raise ValueError(
            f'this {kind} is already part of a multi-exit network, and two networks must not share a backbone; pass '
            f'another one, from timm.create_model or copy.deepcopy.'
        )
    if has_small_input(backbone):
        raise ValueError(
            f'the first two downsamplings of this {kind} have already been removed (small_input=True); pass a new '
            f'backbone from timm.create_model.'
        )
    # at the backbone of Hiera, at a module of its own in ViTs
    rate = getattr(backbone, 'patch_drop_rate', 0) or getattr(getattr(backbone, 'patch_drop', None), 'prob', 0)
    if rate:
        raise ValueError(
            f'patch_drop_rate={rate}: expected 0 for a network with exits, because the patches that are left in '
            f'training form no map for the exits to read; leave it out.'
        )
    return cast(TimmModel, backbone)


def _plan_by_name(backbone: TimmModel, input_size: Sequence[int], names: List[str]) -> Plan:
    """Plan exits at those of `names` that run before the end of the backbone, and at its end."""
    while True:
        try:
            plan = plan_stages(backbone, input_size, names or 1)
        except ValueError:
            if not names:
                raise
            names = names[:-1]  # the last named module is the end itself, or no longer exists
            continue
        before_end = [tap.name for tap in plan.tapped[:-1] if tap.macs < plan.tapped[-1].macs]
        if len(before_end) == len(plan.tapped) - 1:
            return plan
        names = before_end


def _make_heads(backbone: TimmModel, plan: Plan, exit_head: str, exit_pool: str) -> ModuleListOf[ExitHead]:
    """Make the heads of all exits but the last."""
    weight = next(backbone.parameters())
    dim = plan.tapped[-1].map_layout.channels
    modules = plan.modules[: plan.taps[-1] + 1]
    style = head_style(backbone)
    dd: Dict[str, Any] = dict(device=weight.device, dtype=weight.dtype)
    return ModuleListOf(
        ExitHead(_widths_from_tap(tap, modules), dim, backbone.num_classes, exit_head, exit_pool, style, **dd)
        for tap in plan.tapped[:-1]
    )


def _mean_logits(logits: Union[torch.Tensor, Tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Average the pair of logits that a backbone with distillation tokens returns in distilled training."""
    return sum(logits[1:], logits[0]) / len(logits) if isinstance(logits, tuple) else logits


def _widths_from_tap(tap: TracedModule, modules: Sequence[TracedModule]) -> List[int]:
    """List the channels of the tap, then those of the backbone at every halving of the resolution down to its end."""
    layouts = [module.layout for module in modules if module.layout is not None]
    end = layouts[-1].width
    halvings = round(math.log2(tap.map_layout.width / end))
    widths = [tap.map_layout.channels]
    for n in range(halvings - 1, -1, -1):
        at_level = [layout.channels for layout in layouts if round(math.log2(layout.width / end)) == n]
        widths.append(at_level[-1] if at_level else widths[-1])
    return widths
