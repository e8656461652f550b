"""The protocol that every multi-exit network follows, whoever made it."""

from typing import Any, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn as nn

__all__ = ['MultiExitModel', 'MultiExitOutput']


class MultiExitOutput(NamedTuple):
    """What all K exits answer for one batch.

    Attributes:
        logits: K tensors [B, C], first exit first.
        features: K tensors [B, D, H, W], each exit's last map before pooling.
    """

    logits: Tuple[torch.Tensor, ...]
    features: Tuple[torch.Tensor, ...]


class MultiExitModel(nn.Module):
    """A classifier that can answer at K places, made of K stages and K heads.

    Stage k takes the state that stage k-1 left and leaves its own; head k reads that state. Calling the model in
    ``train()`` gives a `MultiExitOutput`, in ``eval()`` the last exit's logits, a plain tensor, like any timm model.

    Attributes:
        num_exits: K.
        exit_names: K names for people, the tapped modules in a wrapped backbone.
        num_classes: C; 0 means that the exits give their pooled features.
        exit_feature_dim: D of the features, or K numbers where the exits differ.
        resumable: Whether `run_stage` and `run_head` work one by one, so that inference can stop early.

    Examples:
        ```python
        model = timm.create_model('mlcsd_resnet18', num_classes=100, small_input=True)
        logits, features = model.forward_exits(images)  # all exits
        for k, exit_logits in model.eval().iter_exits(images):
            if exit_logits.softmax(-1).amax() > 0.9:
                break  # what lies behind exit k is never computed
        ```
    """

    num_exits: int
    exit_names: List[str]
    num_classes: int
    exit_feature_dim: Union[int, List[int]]
    resumable: bool = True

    def run_stage(self, k: int, state: Any) -> Any:
        """Compute stage k.

        Args:
            k: Stage, from 0.
            state: What stage k-1 returned; the images [B, C, H, W] for stage 0.

        Returns:
            A tensor or a (nested) tuple of tensors, batch first.
        """
        raise NotImplementedError

    def run_head(self, k: int, state: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        """Compute exit k from the state that stage k returned.

        Returns:
            The exit's logits [B, C] and its feature [B, D, H, W].
        """
        raise NotImplementedError

    def run_exit(self, k: int, state: Any, answers: bool = True) -> Tuple[Any, Optional[torch.Tensor]]:
        """Stage k and, where the exit `answers`, its head: what adaptive inference runs.

        Returns:
            The state that the stage leaves, and logits [B, C] or None.
        """
        state = self.run_stage(k, state)
        return state, self.run_head(k, state)[0] if answers else None

    def forward_exits(self, x: torch.Tensor) -> MultiExitOutput:
        """Answer at all exits, in training or evaluation mode.

        Args:
            x: Images [B, C, H, W].
        """
        logits, features = [], []
        for k in range(self.num_exits):
            x = self.run_stage(k, x)
            exit_logits, feature = self.run_head(k, x)
            logits.append(exit_logits)
            features.append(feature)
        return MultiExitOutput(tuple(logits), tuple(features))

    def iter_exits(self, x: torch.Tensor) -> Iterator[Tuple[int, torch.Tensor]]:
        """Yield (k, logits [B, C]) exit by exit; nothing behind the last one pulled is computed."""
        for k in range(self.num_exits):
            x = self.run_stage(k, x)
            yield k, self.run_head(k, x)[0]

    def forward(self, x: torch.Tensor) -> Union[MultiExitOutput, torch.Tensor]:
        """All exits in training mode; the last exit's logits [B, C] in evaluation mode."""
        if self.training:
            return self.forward_exits(x)
        for k in range(self.num_exits):
            x = self.run_stage(k, x)
        return self.run_head(self.num_exits - 1, x)[0]
