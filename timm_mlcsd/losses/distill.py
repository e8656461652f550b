"""Distillation methods of the paper's Table 10, each of which can serve as L_KD in the total loss.

A method maps a `DistillBatch` to one loss per exit. The teacher of exit i is given by the mixed logits t_i, or by the
pooled mixed feature g_i for methods that compare features; `TEACHERS` lists the ways to mix them. With the last exit
as the only teacher, this is the usual self-distillation.
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
    """Outputs of the exits and their teachers for one batch.

    Attributes:
        logits: Logits z_i of the exits, [B, K, C].
        teacher_logits: Logits t_i of the teachers, [B, K, C].
        features: Average-pooled features f_i, [B, K, D]; None for methods that do not read features.
        teacher_features: Average-pooled features g_i of the teachers, [B, K, D]; None likewise.
        target: Class indices [B], or soft targets [B, C].
        indices: Indices of the images in the training set, [B]; None for methods that do not need them.
    """

    logits: torch.Tensor
    teacher_logits: torch.Tensor
    features: Optional[torch.Tensor]
    teacher_features: Optional[torch.Tensor]
    target: torch.Tensor
    indices: Optional[torch.Tensor]


class DistillMethod(nn.Module):
    """Base class of distillation methods.

    Attributes:
        weight: Default of alpha for this method.
        reads_features: Whether the method compares features instead of logits.
        hard_labels: Whether the target must be class indices.
        needs_indices: Whether the batch must contain the indices of the images.
    """

    weight = 1.0
    reads_features = False
    hard_labels = False
    needs_indices = False

    def forward(self, batch: DistillBatch) -> torch.Tensor:
        """Compute the losses of the exits.

        Args:
            batch: Outputs of the exits and their teachers.

        Returns:
            Losses averaged over the batch, [K].
        """
        raise NotImplementedError

    def limited(self, batch: DistillBatch, strength: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """Compute the losses with a limited gradient per image, if the method supports it, else as `forward` does.

        Args:
            batch: Outputs of the exits and their teachers.
            strength: Factors that the losses are multiplied by in the total loss, [K].
            bounds: Largest lengths of the gradients, [B, K].

        Returns:
            Losses averaged over the batch, [K].
        """
        losses: torch.Tensor = self(batch)
        return losses


class KD(DistillMethod):
    """Knowledge distillation (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"), the paper's eq. 4.

    T^2 KL(softmax(t / T) || softmax(z / T)).

    Args:
        temperature: Temperature T; default 4. `MLCSDLoss` passes its own.
    """

    weight = 5.0

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, batch: DistillBatch) -> torch.Tensor:
        """Compute the losses [K]; see `DistillMethod.forward`."""
        log_p, log_t = self._log_probs(batch)
        return self.temperature**2 * _divergence(log_p, log_t).mean(dim=0)

    def limited(self, batch: DistillBatch, strength: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """Compute the losses [K] with limited gradients; see `DistillMethod.limited`."""
        log_p, log_t = self._log_probs(batch)
        gap = log_p.detach().exp() - log_t.detach().exp()  # gradient with respect to the logits, divided by T
        loss = self.temperature**2 * _divergence(log_p, log_t)
        return limit_gradient(loss, strength * self.temperature * gap.norm(dim=-1), bounds).mean(dim=0)

    def _log_probs(self, batch: DistillBatch) -> Tuple[torch.Tensor, torch.Tensor]:
        log_p, log_t = (F.log_softmax(z / self.temperature, dim=-1) for z in (batch.logits, batch.teacher_logits))
        return log_p, log_t


class DKD(DistillMethod):
    """Decoupled knowledge distillation (Zhao et al. 2022): T^2 (a TCKD + b NCKD).

    With softened probabilities p and the label y, TCKD is the KL divergence between the two-class distributions
    (p[y], 1 - p[y]), and NCKD the KL divergence between the distributions over the other classes. The defaults are
    the authors' settings for CIFAR-100, where cross-entropy has weight 1.

    Args:
        temperature: Temperature T; default 4.
        target_weight: Weight a of TCKD; default 1.
        other_weight: Weight b of NCKD; default 8.
    """

    hard_labels = True

    def __init__(self, temperature: float = 4.0, target_weight: float = 1.0, other_weight: float = 8.0):
        super().__init__()
        self.temperature = temperature
        self.target_weight = target_weight
        self.other_weight = other_weight

    def forward(self, batch: DistillBatch) -> torch.Tensor:
        """Compute the losses [K]; see `DistillMethod.forward`."""
        student, teacher = (self._split(z, batch.target) for z in (batch.logits, batch.teacher_logits))
        tckd, nckd = (_divergence(p, t).mean(dim=0) for p, t in zip(student, teacher))
        return self.temperature**2 * (self.target_weight * tckd + self.other_weight * nckd)

    def _split(self, logits: torch.Tensor, target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Split the log-probabilities of logits [B, K, C].

        Returns:
            Log-probabilities of the target and of all other classes together, [B, K, 2], and of each class given that
            it is not the target, [B, K, C]; the entry of the target is 0, for student and teacher alike.
        """
        is_target = F.one_hot(target, logits.shape[-1]).bool().unsqueeze(1)
        log_p = F.log_softmax(logits / self.temperature, dim=-1)
        own = log_p.masked_fill(~is_target, float('-inf')).logsumexp(dim=-1)
        rest = log_p.masked_fill(is_target, float('-inf')).logsumexp(dim=-1)
        return torch.stack([own, rest], dim=-1), (log_p - rest.unsqueeze(-1)).masked_fill(is_target, 0.0)


class CC(DistillMethod):
    """Correlation congruence (Peng et al. 2019, "Correlation Congruence for Knowledge Distillation").

    The loss is the squared difference between the correlations of student and teacher, averaged over all pairs of
    images of the batch. The correlation k(x, y) = exp(-2 g) sum_p (2 g)^p / p! (x^T y)^p is the Taylor series of the
    Gaussian kernel for features of length 1. The defaults are those of public implementations.

    Args:
        gamma: Kernel parameter g; default 0.4.
        order: Largest exponent p of the series; default 2.
    """

    weight = 100.0
    reads_features = True

    def __init__(self, gamma: float = 0.4, order: int = 2):
        super().__init__()
        self.gamma = gamma
        self.order = order

    def forward(self, batch: DistillBatch) -> torch.Tensor:
        """Compute the losses [K]; see `DistillMethod.forward`."""
        assert batch.features is not None and batch.teacher_features is not None  # as reads_features is set
        difference = self._correlation(batch.features) - self._correlation(batch.teacher_features)
        return difference.square().mean(dim=(-2, -1))

    def _correlation(self, features: torch.Tensor) -> torch.Tensor:
        """Compute the correlations [K, B, B] of features [B, K, D]."""
        features = F.normalize(features.transpose(0, 1), dim=-1)
        similarity = features @ features.transpose(-2, -1)
        total = term = torch.full_like(similarity, math.exp(-2 * self.gamma))
        for p in range(1, self.order + 1):
            term = term * similarity * (2 * self.gamma / p)
            total = total + term
        return total


class CRD(DistillMethod):
    """Contrastive representation distillation (Tian et al. 2020), with the memory bank of the authors' code.

    Features of student and teacher are embedded by one linear layer each and normalised to length 1. A memory bank
    stores both embeddings of every training image. The embedding of an image is compared with stored embeddings of the
    other network: with that of the same image (positive) and with those of N images of other classes (negatives).
    With h = e / (e + N / M) and e = exp(embedding * memory / T) / Z for M training images, the loss is -log h for the
    positive and -log(1 - h) for each negative, summed over both directions: student against the memory of the teacher
    and teacher against the memory of the student. As in the authors' code, Z is estimated once, as M times the mean
    over the first batch.

    The authors' code draws negatives for every image. Here all images of a batch share one draw: images of the same
    class are left out for each image, and the weight of the others is increased. The expectation is the same, and much
    less memory is needed (the authors' code uses 16,384 x 128 numbers per image and exit). The class of a training
    image is unknown until the image has been seen, so negatives of the same class are possible in the first epoch.

    Args:
        num_learners: Number of exits with a teacher, which are the first ones.
        feature_dim: Channels D of the features.
        num_samples: Number of training images M.
        embed_dim: Size of the embeddings; default 128.
        negatives: Number of negatives N; default 16384.
        temperature: Temperature T; default 0.07.
        momentum: Weight of the stored embedding in an update of the memory; default 0.5.
    """

    weight = 0.8
    reads_features = True
    hard_labels = True
    needs_indices = True

    memory: torch.Tensor
    scale: torch.Tensor
    labels: torch.Tensor

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
        # one linear layer per student, then one per teacher, as one grouped convolution
        self.embed = nn.Conv1d(2 * num_learners * feature_dim, 2 * num_learners * embed_dim, 1, groups=2 * num_learners)
        bound = (3 / embed_dim) ** 0.5
        memory = torch.empty(2 * num_learners, num_samples, embed_dim).uniform_(-bound, bound)
        self.register_buffer('memory', F.normalize(memory, dim=-1))
        self.register_buffer('scale', torch.zeros(2 * num_learners))
        self.register_buffer('labels', torch.full((num_samples,), -1))

    def forward(self, batch: DistillBatch) -> torch.Tensor:
        """Compute the losses [K], and in training mode update the memory; see `DistillMethod.forward`."""
        n, indices = self.num_learners, batch.indices
        # as reads_features and needs_indices are set
        assert batch.features is not None and batch.teacher_features is not None and indices is not None
        pooled = torch.cat([batch.features[:, :n], batch.teacher_features[:, :n]], dim=1)
        embedding = self.embed(pooled.flatten(1).unsqueeze(-1).to(self.embed.weight.dtype))
        embedding = F.normalize(embedding.view(len(pooled), 2 * n, -1).transpose(0, 1), dim=-1)  # [2n, B, E]

        drawn = torch.randint(self.num_samples, (self.negatives,), device=indices.device)
        # students are compared with the memory of their teachers, and teachers with that of their students
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
                self._update_memory(embedding.detach(), indices, batch.target)
        e = e / scale[:, None, None]
        ratio = self.negatives / self.num_samples
        positive = -(e[..., 0] / (e[..., 0] + ratio)).log()
        negative = -((ratio / (e[..., 1:] + ratio)).log() * is_other).sum(dim=-1)
        # scale to the full number of negatives
        negative = negative * (self.negatives / is_other.sum(dim=-1).clamp(min=1).to(negative.dtype))
        losses = (positive + negative).mean(dim=-1)
        losses = losses[:n] + losses[n:]
        return F.pad(losses, (0, batch.logits.shape[1] - n))

    def _update_memory(self, embedding: torch.Tensor, indices: torch.Tensor, target: torch.Tensor) -> None:
        """Average the embeddings [2n, B, E] of a batch into the memory, and store the labels, in all processes."""
        old = self.memory[:, indices]
        new = F.normalize(self.momentum * old + (1 - self.momentum) * embedding, dim=-1)
        # a NaN would remain in the memory through all later averages
        new = torch.where(new.isfinite(), new, old)
        new, indices, target = all_gather_rows(new.transpose(0, 1), indices, target)
        self.memory.index_copy_(1, indices, new.transpose(0, 1))
        self.labels.index_copy_(0, indices, target)


DISTILL_METHODS: Dict[str, Type[DistillMethod]] = {'kd': KD, 'cc': CC, 'crd': CRD, 'dkd': DKD}


def _divergence(log_p: torch.Tensor, log_t: torch.Tensor) -> torch.Tensor:
    """Compute KL(t || p) over the last dimension from log-probabilities."""
    return F.kl_div(log_p, log_t, reduction='none', log_target=True).sum(dim=-1)
