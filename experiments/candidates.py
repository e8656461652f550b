"""Teachers and losses that are tried out and are no part of the package (PLAN.md, stage A).

`register` adds them to the choices of ``--distill`` and ``--distill-method``; `experiments.train` is train.py with
them.
"""

import math

import torch
import torch.nn.functional as F

from timm_mlcsd.losses import CWEM, DISTILL_METHODS, TEACHERS, DistillBatch, DistillMethod, TeacherMixer

__all__ = ['Dist', 'LogitStandardisation', 'Peers', 'PeersCWEM', 'StandardisedCWEM', 'register']


class Peers(TeacherMixer):
    """Label-aware teachers without self: W_i = softmax over k != i of -CE_k / tau, with tau 0.5."""

    tau = 0.5

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the mixing weights [B, K, K]; see `TeacherMixer.forward`."""
        right = F.one_hot(target, logits.shape[-1]) if target.ndim == 1 else target
        scores = (logits.log_softmax(dim=-1) * right.unsqueeze(1)).sum(dim=-1) / self.tau
        return _without_self(self._expand_to_exits(scores)).softmax(dim=-1)


class PeersCWEM(CWEM):
    """A CWEM whose teachers leave out the exit that they teach: W_ii = 0."""

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the mixing weights [B, K, K]; see `TeacherMixer.forward`."""
        weights = super().forward(pooled, logits, target)
        return _without_self(weights.clamp_min(1e-12).log()).softmax(dim=-1)


class StandardisedCWEM(CWEM):
    """A CWEM that reads the pooled features of all exits, each scaled to length 1, instead of those of one exit.

    Exit i's weights come from a layer of its own, so that the rows can differ.
    """

    def __init__(self, num_exits: int, feature_dim: int):
        super().__init__(num_exits, num_exits * feature_dim)

    def forward(self, pooled: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the mixing weights [B, K, K]; see `TeacherMixer.forward`."""
        seen = F.normalize(pooled, dim=-1).flatten(1).unsqueeze(1).expand(-1, self.num_exits, -1)
        return super().forward(seen, logits, target)


class LogitStandardisation(DistillMethod):
    """KL divergence between standardised logits (Sun et al., CVPR 2024).

    The loss is T^2 KL(softmax(N(t) / T) || softmax(N(z) / T)). N subtracts the mean over the classes and divides by
    the standard deviation.

    Args:
        temperature: Temperature T.
    """

    weight = 9.0

    def __init__(self, temperature: float = 2.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, batch: DistillBatch) -> torch.Tensor:
        """Compute the losses [K]; see `DistillMethod.forward`."""
        log_p, log_t = (
            (F.layer_norm(z, z.shape[-1:]) / self.temperature).log_softmax(dim=-1)
            for z in (batch.logits, batch.teacher_logits)
        )
        divergence = F.kl_div(log_p, log_t, reduction='none', log_target=True).sum(dim=-1)
        return self.temperature**2 * divergence.mean(dim=0)


class Dist(DistillMethod):
    """DIST (Huang et al., NeurIPS 2022): 1 - correlation over the classes, plus 1 - correlation over the batch.

    Args:
        temperature: Temperature of the softmax.
    """

    weight = 2.0

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, batch: DistillBatch) -> torch.Tensor:
        """Compute the losses [K]; see `DistillMethod.forward`."""
        p, t = ((z / self.temperature).softmax(dim=-1) for z in (batch.logits, batch.teacher_logits))
        inter = 1 - _correlation(p, t, dim=2).mean(dim=0)
        intra = 1 - _correlation(p, t, dim=0).mean(dim=-1)
        return self.temperature**2 * (inter + intra)


def register() -> None:
    """Add the candidates to the choices of train.py in this process."""
    TEACHERS.update({'peers': Peers, 'peers-cwem': PeersCWEM, 'standardised-cwem': StandardisedCWEM})
    DISTILL_METHODS.update(lskd=LogitStandardisation, dist=Dist)


def _without_self(scores: torch.Tensor) -> torch.Tensor:
    """Scores [B, K, K] with -inf on the diagonal."""
    diagonal = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    return scores.masked_fill(diagonal, -math.inf)


def _correlation(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    centred = [x - x.mean(dim=dim, keepdim=True) for x in (a, b)]
    return F.cosine_similarity(*centred, dim=dim)
