"""Common interface of all multi-exit networks."""

from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn

__all__ = ['MultiExitModel', 'MultiExitOutput']


class MultiExitOutput(NamedTuple):
    """Outputs of all K exits for one batch.

    Attributes:
        logits: Logits per exit, K tensors [B, C].
        features: Last map before pooling per exit, K tensors [B, D, H, W].
    """

    logits: Tuple[torch.Tensor, ...]
    features: Tuple[torch.Tensor, ...]


class MultiExitModel(nn.Module):
    """Base class of classifiers with K exits, each made of a stage and a head.

    Stage k maps the state of stage k-1 to its own state, which head k reads. A call of the model returns a
    `MultiExitOutput` in training mode, and in evaluation mode the logits of the last exit, like any timm model.

    Attributes:
        num_exits: Number of exits K.
        exit_names: Names of the exits, K; the names of the tapped modules in a wrapped backbone.
        num_classes: Number of classes C; 0 for exits that return pooled features instead of logits.
        exit_feature_dim: Channels D of the features, or one number per exit, [K], if they differ.
        resumable: Whether `run_stage` and `run_head` work one by one, so that inference can stop at an exit.
        heads: Heads of the exits; without the last one where the backbone's own classifier is the last exit.
        in_chans: Number of image channels.
        probe_size: Default size of an image, (C, H, W).
        exit_args: Arguments of the exits that create the network again, by name.
        pretrained_cfg: timm's configuration of the weights, by name.
        default_cfg: The same dictionary under timm's other name.

    Examples:
        ```python
        model = timm.create_model('mlcsd_resnet18', num_classes=100, small_input=True)
        logits, features = model.forward_exits(images)  # all exits
        for k, exit_logits in model.eval().iter_exits(images):
            if exit_logits.softmax(-1).amax() > 0.9:
                break  # later stages are not computed
        ```
    """

    num_exits: int
    exit_names: List[str]
    num_classes: int
    exit_feature_dim: Union[int, List[int]]
    resumable: bool = True
    heads: nn.ModuleList
    in_chans: int
    probe_size: Tuple[int, ...]
    exit_args: Dict[str, Any]
    pretrained_cfg: Dict[str, Any]
    default_cfg: Dict[str, Any]

    def get_classifier(self) -> Union[nn.Module, Sequence[nn.Module]]:
        """Classifier of the last exit, or several."""
        raise NotImplementedError

    def classifiers(self) -> List[nn.Module]:
        """Classifiers of all exits."""
        last = self.get_classifier()
        own = (getattr(head, 'fc', None) for head in self.heads)
        found = [module for module in own if isinstance(module, nn.Module)]
        return [*found, *([last] if isinstance(last, nn.Module) else last)]

    def forget_class_names(self) -> None:
        """Remove the class names from the configuration of the weights, as new classifiers are for other classes."""
        cfg = getattr(self, 'pretrained_cfg', None) or {}
        if 'label_names' in cfg or 'label_descriptions' in cfg:
            kept = {name: value for name, value in cfg.items() if name not in ('label_names', 'label_descriptions')}
            self.pretrained_cfg = self.default_cfg = kept

    def check_input_size(self, height: int, width: int) -> None:
        """Check that images of this size are large enough for the network.

        Args:
            height: Height of the images in pixels.
            width: Width of the images in pixels.

        Raises:
            ValueError: They are too small.
        """
        raise NotImplementedError

    def no_weight_decay(self) -> Set[str]:
        """Return the names of the parameters to exclude from weight decay: none."""
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch the recomputation of activations in the backward pass on or off."""
        raise NotImplementedError

    def run_stage(self, k: int, state: Any) -> Any:
        """Compute stage k.

        Args:
            k: Stage, from 0.
            state: State of stage k-1; the images [B, C, H, W] for stage 0.

        Returns:
            State of stage k: a tensor or a (nested) tuple of tensors, batch first.
        """
        raise NotImplementedError

    def run_head(self, k: int, state: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        """Compute the outputs of exit k.

        Args:
            k: Exit, from 0.
            state: State of stage k.

        Returns:
            Logits [B, C] and feature [B, D, H, W] of the exit.
        """
        raise NotImplementedError

    def run_exit(self, k: int, state: Any, answers: bool = True) -> Tuple[Any, Optional[torch.Tensor]]:
        """Compute stage k and, if the exit is on, its head, as adaptive inference does.

        Args:
            k: Stage and exit, from 0.
            state: State of stage k-1; the images [B, C, H, W] for stage 0.
            answers: Whether the exit is on; default True.

        Returns:
            State of stage k, and logits [B, C], or None if the exit is off.
        """
        state = self.run_stage(k, state)
        return state, self.run_head(k, state)[0] if answers else None

    def forward_exits(self, x: torch.Tensor) -> MultiExitOutput:
        """Compute the outputs of all exits, in training or evaluation mode.

        Args:
            x: Images [B, C, H, W].

        Returns:
            Logits and features of all exits.
        """
        logits, features = [], []
        for k in range(self.num_exits):
            x = self.run_stage(k, x)
            exit_logits, feature = self.run_head(k, x)
            logits.append(exit_logits)
            features.append(feature)
        return MultiExitOutput(tuple(logits), tuple(features))

    def iter_exits(self, x: torch.Tensor) -> Iterator[Tuple[int, torch.Tensor]]:
        """Yield (k, logits [B, C]) exit by exit; each stage is computed when its exit is requested.

        Args:
            x: Images [B, C, H, W].
        """
        for k in range(self.num_exits):
            x = self.run_stage(k, x)
            yield k, self.run_head(k, x)[0]

    def forward(self, x: torch.Tensor) -> Union[MultiExitOutput, torch.Tensor]:
        """Compute all exits in training mode, the last exit in evaluation mode.

        Args:
            x: Images [B, C, H, W].

        Returns:
            `MultiExitOutput` in training mode, logits [B, C] of the last exit in evaluation mode.
        """
        if self.training:
            return self.forward_exits(x)
        for k in range(self.num_exits):
            x = self.run_stage(k, x)
        return self.run_head(self.num_exits - 1, x)[0]
