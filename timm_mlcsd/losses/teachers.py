"""Teachers of the exits, as mixtures of all exits.

The teacher of exit i has the logits t_i = sum_k W_i[k] z_k and the feature g_i = sum_k W_i[k] f_k. A mixer computes
the weights W [B, K, K] from the max-pooled features [B, K, D] and the logits [B, K, C] of the exits, both detached, and
the target. `TEACHERS` contains the mixers of the paper's Tables 8 and 14, by their names in
``MLCSDLoss(distill=...)``.
"""

from typing import Dict, Type

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['CWEM', 'TEACHERS', 'TeacherMixer']


class TeacherMixer(nn.Module):
    """Base class of modules that compute the mixing weights of the teachers.

    Args:
        num_exits: Number of exits K.
        feature_dim: Channels D of the features.

    Attributes:
        supervises_last_exit: Whether the last exit has a teacher other than itself.
    """

    supervises_last_exit = True

    def __init__(self, num_exits: int, feature_dim: int):
        super().__init__()
        self.num_exits = num_exits

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the mixing weights.

        Args:
            pooled: Max-pooled features [B, K, D].
            logits: Logits [B, K, C].
            target: Class indices [B] or soft targets [B, C].

        Returns:
            Weights [B, K, K] whose rows sum to 1; row i belongs to the teacher of exit i.
        """
        raise NotImplementedError

    def _expand_to_exits(self, weights: torch.Tensor) -> torch.Tensor:
        """Use one mixture [B, K] as the teacher of every exit."""
        return weights.unsqueeze(1).expand(-1, self.num_exits, -1)


class CWEM(TeacherMixer):
    """Classifier weight encoding module (paper, section of that name): 1x1 conv, BatchNorm and softmax per exit.

    The K convolutions are implemented as one grouped convolution, the K norms as one norm. A training batch of one
    image has no batch statistics and is normalised with the running statistics.

    Args:
        num_exits: Number of exits K.
        feature_dim: Channels D of the features.
    """

    def __init__(self, num_exits: int, feature_dim: int):
        super().__init__(num_exits, feature_dim)
        self.conv = nn.Conv1d(num_exits * feature_dim, num_exits**2, 1, groups=num_exits, bias=False)
        self.norm = nn.BatchNorm1d(num_exits**2)

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the mixing weights [B, K, K]; see `TeacherMixer.forward`."""
        x: torch.Tensor = self.conv(pooled.flatten(1).unsqueeze(-1)).squeeze(-1)
        if self.training and x.shape[0] == 1:
            norm = self.norm
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            x = self.norm(x)
        return x.view(-1, self.num_exits, self.num_exits).softmax(dim=-1)


class LastExit(TeacherMixer):
    """One-for-all: the last exit is the teacher of every exit (FLSM on logits, FFSM on features)."""

    supervises_last_exit = False

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the mixing weights [B, K, K]; see `TeacherMixer.forward`."""
        weights = logits.new_zeros(logits.shape[0], self.num_exits)
        weights[:, -1] = 1.0
        return self._expand_to_exits(weights)


class Minimum(TeacherMixer):
    """Per image, the exit with the lowest cross-entropy is the teacher of every exit."""

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the mixing weights [B, K, K]; see `TeacherMixer.forward`."""
        best = _cross_entropy(logits, target).argmin(dim=1)
        return self._expand_to_exits(F.one_hot(best, self.num_exits).to(logits.dtype))


class Average(TeacherMixer):
    """The ensemble, the mean of all exits, is the teacher of every exit (paper's reference 48)."""

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the mixing weights [B, K, K]; see `TeacherMixer.forward`."""
        return torch.full_like(logits[:, :1, :1], 1.0 / self.num_exits).expand(-1, self.num_exits, self.num_exits)


class Deeper(TeacherMixer):
    """The mean of all deeper exits is the teacher of an exit; the last exit has no teacher other than itself."""

    supervises_last_exit = False

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the mixing weights [B, K, K]; see `TeacherMixer.forward`."""
        weights = torch.ones(self.num_exits, self.num_exits, dtype=logits.dtype, device=logits.device).triu(1)
        weights[-1, -1] = 1.0
        return (weights / weights.sum(dim=1, keepdim=True)).expand(logits.shape[0], -1, -1)


class Attention(TeacherMixer):
    """Weights that decrease with the entropy of an exit's prediction: softmax over the exits of -H(softmax(z_k)).

    The paper describes its reference 49 in words ("calculated using the entropy value of the predicted results"); the
    formula is ours.
    """

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the mixing weights [B, K, K]; see `TeacherMixer.forward`."""
        log_p = logits.log_softmax(dim=-1)
        return self._expand_to_exits((log_p.exp() * log_p).sum(dim=-1).softmax(dim=-1))


class Confidence(TeacherMixer):
    """Weights that decrease with the cross-entropy L_k of an exit: (1 - exp L_k / sum_j exp L_j) / (K - 1).

    Zhang et al. 2022, "Confidence-Aware Multi-Teacher Knowledge Distillation" (paper's reference 50).
    """

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the mixing weights [B, K, K]; see `TeacherMixer.forward`."""
        return self._expand_to_exits((1 - _cross_entropy(logits, target).softmax(dim=1)) / (self.num_exits - 1))


TEACHERS: Dict[str, Type[TeacherMixer]] = {
    'one-for-all': LastExit,
    'minimum': Minimum,
    'average': Average,
    'deeper': Deeper,
    'attention': Attention,
    'confidence': Confidence,
    'all-for-all': CWEM,
}


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy [B, K] of logits [B, K, C] with class indices [B] or soft targets [B, C]."""
    target = target.unsqueeze(1).expand(logits.shape[:2] if target.ndim == 1 else logits.shape)
    target = target.flatten(0, 1).to(torch.long if target.ndim == 2 else logits.dtype)
    return F.cross_entropy(logits.flatten(0, 1), target, reduction='none').view(logits.shape[:2])
