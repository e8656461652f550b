"""Who teaches whom.

A teacher is a mixture of all exits: logits t_i = sum_k W_i[k] z_k, feature g_i = sum_k W_i[k] f_k. A mixer is a module
that finds the weights W [B, K, K], row i for exit i's teacher, from the exits' max-pooled features [B, K, D], their
logits [B, K, C], both cut off from the network, and the target. `TEACHERS` holds those of the paper's Tables 8 and 14
by the name that ``MLCSDLoss(distill=...)`` knows them by.
"""

from typing import Dict, Type

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['CWEM', 'TEACHERS', 'TeacherMixer']


class TeacherMixer(nn.Module):
    """Weighs the exits.

    Args:
        num_exits: K.
        feature_dim: D.

    Attributes:
        supervises_last_exit: Whether the last exit has a teacher other than itself.
    """

    supervises_last_exit = True

    def __init__(self, num_exits: int, feature_dim: int):
        super().__init__()
        self.num_exits = num_exits

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Find the weights.

        Args:
            pooled: Max-pooled features [B, K, D].
            logits: Logits [B, K, C].
            target: Class indices [B] or soft targets [B, C].

        Returns:
            Weights [B, K, K] whose rows sum to 1.
        """
        raise NotImplementedError

    def _for_all(self, weights: torch.Tensor) -> torch.Tensor:
        """One mixture [B, K] as the teacher of every exit."""
        return weights.unsqueeze(1).expand(-1, self.num_exits, -1)


class CWEM(TeacherMixer):
    """Classifier weight encoding module (paper, section of that name): 1x1 conv, BatchNorm and softmax per exit.

    The K convolutions are one grouped convolution and the K norms one norm. A training batch of one image has no
    statistics of its own and is normalised with the running ones.
    """

    def __init__(self, num_exits: int, feature_dim: int):
        super().__init__(num_exits, feature_dim)
        self.conv = nn.Conv1d(num_exits * feature_dim, num_exits**2, 1, groups=num_exits, bias=False)
        self.norm = nn.BatchNorm1d(num_exits**2)

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = self.conv(pooled.flatten(1).unsqueeze(-1)).squeeze(-1)
        if self.training and x.shape[0] == 1:
            norm = self.norm
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            x = self.norm(x)
        return x.view(-1, self.num_exits, self.num_exits).softmax(dim=-1)


class LastExit(TeacherMixer):
    """One-for-all: the last exit alone teaches every exit (FLSM on logits, FFSM on features)."""

    supervises_last_exit = False

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        weights = logits.new_zeros(logits.shape[0], self.num_exits)
        weights[:, -1] = 1.0
        return self._for_all(weights)


class Minimum(TeacherMixer):
    """The exit with the least cross-entropy on an image teaches it to every exit."""

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        best = _cross_entropy(logits, target).argmin(dim=1)
        return self._for_all(F.one_hot(best, self.num_exits).to(logits.dtype))


class Average(TeacherMixer):
    """The ensemble: the mean of all exits teaches every exit (paper's reference 48)."""

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits[:, :1, :1], 1.0 / self.num_exits).expand(-1, self.num_exits, self.num_exits)


class Deeper(TeacherMixer):
    """The mean of the exits behind it teaches an exit; the last has only itself, and so learns nothing."""

    supervises_last_exit = False

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        weights = torch.ones(self.num_exits, self.num_exits, dtype=logits.dtype, device=logits.device).triu(1)
        weights[-1, -1] = 1.0
        return (weights / weights.sum(dim=1, keepdim=True)).expand(logits.shape[0], -1, -1)


class Attention(TeacherMixer):
    """An exit weighs the more, the less the entropy of its prediction: softmax over the exits of -H(softmax(z_k)).

    The paper's reference 49 in words ("calculated using the entropy value of the predicted results"); the formula is
    ours.
    """

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        log_p = logits.log_softmax(dim=-1)
        return self._for_all((log_p.exp() * log_p).sum(dim=-1).softmax(dim=-1))


class Confidence(TeacherMixer):
    """An exit weighs the more, the less its cross-entropy L_k: (1 - exp L_k / sum_j exp L_j) / (K - 1).

    Zhang et al. 2022, "Confidence-Aware Multi-Teacher Knowledge Distillation" (paper's reference 50).
    """

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self._for_all((1 - _cross_entropy(logits, target).softmax(dim=1)) / (self.num_exits - 1))


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
    """Cross-entropy [B, K] of logits [B, K, C] with class indices [B] or soft targets [B, C]."""
    target = target.unsqueeze(1).expand(logits.shape[:2] if target.ndim == 1 else logits.shape)
    target = target.flatten(0, 1).to(torch.long if target.ndim == 2 else logits.dtype)
    return F.cross_entropy(logits.flatten(0, 1), target, reduction='none').view(logits.shape[:2])
