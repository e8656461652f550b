"""What an exit learns from its teacher: the methods of the paper's Table 10, each the place of L_KD in the total loss.

A method maps a `DistillBatch` to one loss per exit. Whatever mixes the teachers (`TEACHERS`), its teacher is the mixed
logits t_i, for methods that compare features the pooled mixed feature g_i: from the last exit alone it is the usual
self-distillation.
"""

import math
from typing import Dict, NamedTuple, Optional, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..distributed import all_gather_rows, all_reduce_mean
from .ramp import limit_gradient

__all__ = ['CC', 'CRD', 'DKD', 'KD', 'DISTILL_METHODS', 'DistillBatch', 'DistillMethod']


class DistillBatch(NamedTuple):
    """What the exits of one batch show, and what their teachers do.

    Attributes:
        logits: z_i, [B, K, C].
        teacher_logits: t_i, [B, K, C].
        features: Mean-pooled f_i, [B, K, D], for methods that read features.
        teacher_features: Mean-pooled g_i, [B, K, D], likewise.
        target: Class indices [B], or soft targets [B, C].
        indices: Which images of the training set these are, [B].
    """

    logits: torch.Tensor
    teacher_logits: torch.Tensor
    features: Optional[torch.Tensor]
    teacher_features: Optional[torch.Tensor]
    target: torch.Tensor
    indices: Optional[torch.Tensor]


class DistillMethod(nn.Module):
    """A way to learn from a teacher.

    Attributes:
        weight: alpha that goes with it, unless the user says otherwise.
        reads_features: Whether it compares features instead of logits.
        hard_labels: Whether the target must be class indices.
        needs_indices: Whether it must know which images a batch holds.
    """

    weight = 1.0
    reads_features = False
    hard_labels = False
    needs_indices = False

    def forward(self, batch: DistillBatch) -> torch.Tensor:
        """The losses [K] of the exits, batch means."""
        raise NotImplementedError

    def limited(self, batch: DistillBatch, strength: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """The losses with the gradient of every image limited, in methods that know its length; else as they are.

        Args:
            batch: What the exits show.
            strength: Weights that the losses will get, [K].
            bounds: Largest lengths of the gradients, [B, K].
        """
        return self(batch)


class KD(DistillMethod):
    """Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; the paper's eq. 4.

    T^2 KL(softmax(t / T) || softmax(z / T)).

    Args:
        temperature: T.
    """

    weight = 5.0

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, batch: DistillBatch) -> torch.Tensor:
        log_p, log_t = self._log_probs(batch)
        return self.temperature**2 * _divergence(log_p, log_t).mean(dim=0)

    def limited(self, batch: DistillBatch, strength: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        log_p, log_t = self._log_probs(batch)
        gap = log_p.detach().exp() - log_t.detach().exp()  # 1/T of the gradient on the logits
        loss = self.temperature**2 * _divergence(log_p, log_t)
        return limit_gradient(loss, strength * self.temperature * gap.norm(dim=-1), bounds).mean(dim=0)

    def _log_probs(self, batch: DistillBatch) -> Tuple[torch.Tensor, torch.Tensor]:
        both = (batch.logits, batch.teacher_logits)
        return tuple(F.log_softmax(z / self.temperature, dim=-1) for z in both)


class DKD(DistillMethod):
    """Zhao et al. 2022, "Decoupled Knowledge Distillation": a TCKD + b NCKD, times T^2.

    With softened probabilities p and the label y, TCKD is the divergence between the two-class distributions
    (p[y], 1 - p[y]), NCKD that between the distributions over the other classes. a = 1, b = 8, T = 4 are what the
    authors train CIFAR-100 with, and cross-entropy of weight 1 beside it.

    Args:
        temperature: T.
        target_weight: a.
        other_weight: b.
    """

    hard_labels = True

    def __init__(self, temperature: float = 4.0, target_weight: float = 1.0, other_weight: float = 8.0):
        super().__init__()
        self.temperature = temperature
        self.target_weight = target_weight
        self.other_weight = other_weight

    def forward(self, batch: DistillBatch) -> torch.Tensor:
        student, teacher = (self._split(z, batch.target) for z in (batch.logits, batch.teacher_logits))
        tckd, nckd = (_divergence(p, t).mean(dim=0) for p, t in zip(student, teacher))
        return self.temperature**2 * (self.target_weight * tckd + self.other_weight * nckd)

    def _split(self, logits: torch.Tensor, target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of target and rest [B, K, 2], and of the other classes among themselves [B, K, C], which
        hold 0 for the target, in student and teacher alike."""
        is_target = F.one_hot(target, logits.shape[-1]).bool().unsqueeze(1)
        log_p = F.log_softmax(logits / self.temperature, dim=-1)
        own = log_p.masked_fill(~is_target, float('-inf')).logsumexp(dim=-1)
        rest = log_p.masked_fill(is_target, float('-inf')).logsumexp(dim=-1)
        return torch.stack([own, rest], dim=-1), (log_p - rest.unsqueeze(-1)).masked_fill(is_target, 0.0)


class CC(DistillMethod):
    """Peng et al. 2019, "Correlation Congruence for Knowledge Distillation".

    The squared difference, meaned over all pairs of images of the batch, between student's and teacher's correlations
    k(x, y) = exp(-2 g) sum_p (2 g)^p / p! (x^T y)^p, the Gaussian kernel of features of length 1 as a Taylor series.
    g = 0.4 and order 2, with a weight of 100, are what public implementations take.

    Args:
        gamma: g.
        order: The last p.
    """

    weight = 100.0
    reads_features = True

    def __init__(self, gamma: float = 0.4, order: int = 2):
        super().__init__()
        self.gamma = gamma
        self.order = order

    def forward(self, batch: DistillBatch) -> torch.Tensor:
        difference = self._correlation(batch.features) - self._correlation(batch.teacher_features)
        return difference.square().mean(dim=(-2, -1))

    def _correlation(self, features: torch.Tensor) -> torch.Tensor:
        """Correlations [K, B, B] of features [B, K, D]."""
        features = F.normalize(features.transpose(0, 1), dim=-1)
        similarity = features @ features.transpose(-2, -1)
        total = term = torch.full_like(similarity, math.exp(-2 * self.gamma))
        for p in range(1, self.order + 1):
            term = term * similarity * (2 * self.gamma / p)
            total = total + term
        return total


class CRD(DistillMethod):
    """Tian et al. 2020, "Contrastive Representation Distillation", with the memory bank of the authors' code.

    Student's and teacher's features are embedded by a linear layer each and brought to length 1. A memory keeps both
    embeddings of every training image. An image's embedding is compared with what the memory has of the other network:
    once for the image itself, which should be told apart from N times for images of other classes. With
    h = e / (e + N / M), e = exp(embedding * memory / T) / Z, for M images, the loss is -log h for the image itself and
    -log(1 - h) for each other, student against teacher's memory plus teacher against student's. (The code estimates Z
    once, as M times the mean over its first batch.)

    The code draws other images for every image of the batch. Here the batch shares one draw, those of an image's own
    class left out for that image and the rest weighted up: the same expectation for a fraction of the memory (16,384 x
    128 numbers per image and exit there). A class is known once its images have been seen, so in the first epoch one of
    an image's own class may slip in.

    Args:
        num_learners: Exits that learn, the first ones.
        feature_dim: D.
        num_samples: M.
        embed_dim: Length of the embeddings.
        negatives: N.
        temperature: T.
        momentum: Share of the old embedding that a memory keeps.
    """

    weight = 0.8
    reads_features = True
    hard_labels = True
    needs_indices = True

    def __init__(
        self,
        num_learners: int,
        feature_dim: int,
        num_samples: int,
        embed_dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ):
        super().__init__()
        self.num_learners = num_learners
        self.num_samples = num_samples
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        # one linear layer per learner, as one grouped convolution; first the students', then the teachers'
        self.embed = nn.Conv1d(2 * num_learners * feature_dim, 2 * num_learners * embed_dim, 1, groups=2 * num_learners)
        bound = (3 / embed_dim) ** 0.5
        memory = torch.empty(2 * num_learners, num_samples, embed_dim).uniform_(-bound, bound)
        self.register_buffer('memory', F.normalize(memory, dim=-1))
        self.register_buffer('scale', torch.zeros(2 * num_learners))
        self.register_buffer('labels', torch.full((num_samples,), -1))

    def forward(self, batch: DistillBatch) -> torch.Tensor:
        n, indices = self.num_learners, batch.indices
        pooled = torch.cat([batch.features[:, :n], batch.teacher_features[:, :n]], dim=1)
        embedding = self.embed(pooled.flatten(1).unsqueeze(-1).to(self.embed.weight.dtype))
        embedding = F.normalize(embedding.view(len(pooled), 2 * n, -1).transpose(0, 1), dim=-1)  # [2n, B, E]

        drawn = torch.randint(self.num_samples, (self.negatives,), device=indices.device)
        # a student is compared with its teacher's memory, and the other way round
        own, others = (self.memory[:, i].roll(n, dims=0) for i in (indices, drawn))
        own = (embedding * own).sum(dim=-1, keepdim=True)
        scores = torch.cat([own, embedding @ others.transpose(-2, -1)], dim=-1) / self.temperature
        is_other = self.labels[drawn] != batch.target.unsqueeze(1)  # [B, N]
        counted = torch.cat([torch.ones_like(is_other[:, :1]), is_other], dim=1)

        e = scores.exp()
        with torch.no_grad():
            first = all_reduce_mean((e * counted).sum(dim=(-2, -1)) / counted.sum() * self.num_samples)
            scale = torch.where(self.scale > 0, self.scale, first)
            if self.training:
                self.scale.copy_(scale)
                self._remember(embedding.detach(), batch)
        e = e / scale[:, None, None]
        ratio = self.negatives / self.num_samples
        same = -(e[..., 0] / (e[..., 0] + ratio)).log()
        apart = -((ratio / (e[..., 1:] + ratio)).log() * is_other).sum(dim=-1)
        # as if all that were drawn were of other classes
        apart = apart * (self.negatives / is_other.sum(dim=-1).clamp(min=1).to(apart.dtype))
        losses = (same + apart).mean(dim=-1)
        losses = losses[:n] + losses[n:]
        return F.pad(losses, (0, batch.logits.shape[1] - n))

    def _remember(self, embedding: torch.Tensor, batch: DistillBatch) -> None:
        old = self.memory[:, batch.indices]
        new = F.normalize(self.momentum * old + (1 - self.momentum) * embedding, dim=-1)
        # one NaN would stay for good
        new = torch.where(new.isfinite(), new, old)
        new, indices, target = all_gather_rows(new.transpose(0, 1), batch.indices, batch.target)
        self.memory.index_copy_(1, indices, new.transpose(0, 1))
        self.labels.index_copy_(0, indices, target)


DISTILL_METHODS: Dict[str, Type[DistillMethod]] = {'kd': KD, 'cc': CC, 'crd': CRD, 'dkd': DKD}


def _divergence(log_p: torch.Tensor, log_t: torch.Tensor) -> torch.Tensor:
    """KL(t || p) over the last dimension."""
    return F.kl_div(log_p, log_t, reduction='none', log_target=True).sum(dim=-1)
