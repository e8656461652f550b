"""A timm backbone -> a multi-exit network."""

import logging
import math
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.layers import to_2tuple
from timm.models import get_model_input_config, get_model_traits, group_parameters

from .heads import ExitHead, head_style
from .multi_exit import MultiExitModel, MultiExitOutput
from .plan import plan_stages
from .probe import Place
from .programs import ChainProgram, GraphProgram

__all__ = ['DEFAULT_EXIT_HEAD', 'DEFAULT_EXIT_POOL', 'MultiExitBackbone', 'create_multi_exit']

_logger = logging.getLogger(__name__)

DEFAULT_EXIT_HEAD = 'slic_dw'
DEFAULT_EXIT_POOL = 'max'


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
    if kwargs.get('global_pool') == '':
        raise ValueError(
            "global_pool='' leaves the last exit's maps as they are; name a pool of timm's, avg or max say."
        )
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


class MultiExitBackbone(MultiExitModel):
    """A timm model that is cut into stages, with a head at every cut.

    In evaluation mode it is the timm model: same output, bit for bit, same methods. A backbone that is a plain chain
    of modules runs stage by stage in training too. Any other trains as a whole, its exits reading the tapped modules'
    outputs; its stages, for evaluation, are cut out of its exported graph when they are first asked for.

    Args:
        backbone: A timm model.
        exits: Number of exits, or names of the modules to tap for all exits but the last; None for 8, or as many as
            the backbone has blocks for.
        exit_head: Reduction layers of the exits.
        exit_pool: Global pool of the exits.
        small_input: Take the first two downsamplings out.
        img_size: (height, width) that the backbone was made for; default: what it says of itself.
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
        if isinstance(backbone, MultiExitModel):
            raise ValueError(f'{type(backbone).__name__} has exits already; pass a plain backbone.')
        self.backbone = backbone
        missing = [
            n for n in ('default_cfg', 'feature_info', 'forward_features', 'forward_head') if not hasattr(backbone, n)
        ]
        if missing:
            raise ValueError(
                f'{type(backbone).__name__} is no timm model with features: it has no {", ".join(missing)}.'
            )
        self.pretrained_cfg = self.default_cfg = without_weights(backbone.default_cfg)
        if hasattr(backbone, 'output_fmt'):
            self.output_fmt = backbone.output_fmt
        # what timm's resolvers of preprocessing ask for
        self._traits = dict(get_model_traits(backbone), first_conv=self.default_cfg.get('first_conv'))
        chans, *size = get_model_input_config(backbone)['input_size']
        self.probe_size = (chans, *to_2tuple(img_size or size))
        self.plan = plan = plan_stages(backbone, self.probe_size, exits, small_input)
        self.exit_names = [place.name for place in plan.tapped]
        self.num_exits = len(plan.tapped)
        # spelled out, so that what is saved today means the same network when a default changes
        exits = list(exits) if isinstance(exits, (list, tuple)) else self.num_exits
        self.exit_args = dict(exits=exits, exit_head=exit_head, exit_pool=exit_pool, small_input=small_input)
        last = plan.tapped[-1].layout
        self.exit_feature_dim = last.channels
        self.reduction = self.probe_size[-1] // last.width
        weight = next(backbone.parameters())
        self.heads = nn.ModuleList(
            [
                ExitHead(
                    _widths_below(place, plan.places[: plan.taps[-1] + 1]),
                    self.exit_feature_dim,
                    backbone.num_classes,
                    exit_head,
                    exit_pool,
                    head_style(backbone),
                    device=weight.device,
                    dtype=weight.dtype,
                )
                for place in plan.tapped[:-1]
            ]
        )
        self.program = (ChainProgram if plan.is_chain else GraphProgram)(backbone, plan)
        self.frozen: Optional[List[str]] = None

    @property
    def resumable(self) -> bool:
        """Whether `run_stage` and `run_head` work one by one; found out when first asked, `why_not_resumable` tells."""
        return self.why_not_resumable is None

    @property
    def why_not_resumable(self) -> Optional[str]:
        """Why the stages cannot be run one by one; None where they can."""
        return self.program.why_not(self)

    def run_stage(self, k: int, state: Any) -> Any:
        return self.program.run_stage(self, k, state)

    def run_head(self, k: int, state: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        feature = self.program.read_tap(k, state)
        if k < self.num_exits - 1:
            return self.heads[k](feature)
        return self.program.run_end(self, state), feature

    def forward_exits(self, x: torch.Tensor) -> MultiExitOutput:
        if self.program.stages_train:
            return super().forward_exits(x)
        last, maps = self.program.run_whole(self, x)
        outputs = [head(m) for head, m in zip(self.heads, maps)] + [(last, maps[-1])]
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
        if not self.program.stages_train:
            self.program.cut(self, tuple(input_size))

    def check_input_size(self, height: int, width: int) -> None:
        """Raise a ValueError for images too small to be reduced as often as the backbone does."""
        if min(height, width) < self.reduction:
            small = '' if self.reduction < 32 else ', or small_input=True (a quarter of the reduction)'
            raise ValueError(
                f'image size {height}x{width} is too small: the network reduces {self.reduction} times; '
                f'use at least {self.reduction}x{self.reduction}{small}.'
            )

    # timm's model contract: the backbone's own, as if it had no exits

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def in_chans(self) -> int:
        return self.backbone.in_chans

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        return self.backbone.head_hidden_size

    @property
    def feature_info(self) -> Any:
        return self.backbone.feature_info

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The backbone's unpooled features, in its own layout: [B, C, H, W], say."""
        return self.backbone.forward_features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The backbone's own end: its features to logits [B, C], or to pooled features with `pre_logits`."""
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    def forward_intermediates(self, x: torch.Tensor, **kwargs: Any) -> Any:
        """The backbone's ``forward_intermediates``."""
        return self.backbone.forward_intermediates(x, **kwargs)

    def get_classifier(self) -> nn.Module:
        """The last exit's classifier, which is the backbone's."""
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """New classifiers for all exits; `global_pool` changes the backbone's pool only."""
        self.backbone.reset_classifier(num_classes, global_pool)
        weight = next(self.backbone.parameters())
        for head in self.heads:
            head.reset_classifier(num_classes, device=weight.device, dtype=weight.dtype)
        self.program.forget()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping what is inside them."""
        self.program.set_grad_checkpointing(self, enable)

    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters that want no weight decay."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, 'no_weight_decay') else ()
        return {f'backbone.{name}' for name in names}

    @property
    def group_matcher(self) -> Callable[..., Callable[[str], int]]:
        """``group_matcher(coarse=False)``: layer group of every parameter or module by name; a head belongs to the
        group of its tap. Where timm gives the backbone no layer groups there is no such attribute."""
        if not hasattr(self.backbone, 'group_matcher'):
            raise AttributeError
        return self._group_matcher

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


def without_weights(cfg: Dict[str, Any]) -> Dict[str, Any]:
    """A backbone's cfg for its multi-exit network: no weights, and what it names lies below ``backbone.``."""
    names = {
        key: f'backbone.{cfg[key]}' if isinstance(cfg[key], str) else [f'backbone.{name}' for name in cfg[key]]
        for key in ('first_conv', 'classifier')
        if cfg.get(key)
    }
    sources = dict.fromkeys(('file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'tag'))
    return {**cfg, **sources, **names, 'url': '', 'architecture': f'mlcsd_{cfg["architecture"]}'}


def _widths_below(tap: Place, places: Sequence[Place]) -> List[int]:
    """The tap's width, then the backbone's width at every halving of the resolution from there to its end."""
    layouts = [place.layout for place in places if place.layout is not None]
    end = layouts[-1].width
    halvings = round(math.log2(tap.layout.width / end))
    widths = [tap.layout.channels]
    for n in range(halvings - 1, -1, -1):
        at_level = [layout.channels for layout in layouts if round(math.log2(layout.width / end)) == n]
        widths.append(at_level[-1] if at_level else widths[-1])
    return widths
