"""Multi-level collaborative self-distillation as a loss: every exit learns from a teacher mixed from all exits.

With logits z_k, features f_k, labels y, K exits, temperature T and weights w_i of the exits:

    W_i   = softmax_k CWEM_i(maxpool(f_i))          mixing weights of the teacher of exit i
    t_i   = sum_k W_i[k] z_k                        teacher logits, paper eq. 3 (MCLSM)
    g_i   = sum_k W_i[k] f_k                        teacher feature, eq. 5 (MCFSM)
    L_CLS = sum_i w_i CE(z_i, y)                    eq. 2
    L_KD  = sum_i w_i T^2 KL(softmax(t_i / T) || softmax(z_i / T)), batch mean      eq. 4
    L_HT  = sum_i w_i MSE(f_i, g_i)                 eq. 6
    L     = gamma L_CLS + alpha L_KD + beta L_HT    eq. 7

No gradient of L_KD and L_HT flows into the logits and features that t_i and g_i are mixed from. The CWEM is
the paper's classifier weight encoding module; `TEACHERS` lists alternatives to it for W_i, `DISTILL_METHODS`
alternatives to L_KD.
"""

import math
from typing import Dict, List, Optional, Sequence, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.loss import JsdCrossEntropy

from .batched import (
    Weights,
    at_least_float32,
    expand_target,
    is_mean_over_rows,
    scaled,
    stack_maps,
    sum_of_losses,
    weighted,
)
from .distill import CC, CRD, DISTILL_METHODS, DistillBatch, DistillMethod
from .ramp import DISTILL_RAMPS, FEATURE_SHARE, LOGIT_SHARE, AccuracyRamp, label_pull, limit_gradient
from .teachers import CWEM, TEACHERS, TeacherMixer

__all__ = ['CWEM_SUPERVISIONS', 'MLCSDLoss']

CWEM_SUPERVISIONS = ('ce', 'kd', 'none')


class MLCSDLoss(nn.Module):
    """Total loss of the paper; each of its terms can be switched off.

    ``distill='none'`` trains a multi-exit network with cross-entropy alone (MENM). With ``'one-for-all'`` the exits
    learn from the last exit, with ``beta=0`` from its logits only. ``'all-for-all'`` is MLCSD. The other `TEACHERS`
    are the methods that the paper compares with. All terms are computed in at least float32, under autocast too.

    The loss owns the CWEM, whose parameters must be trained: pass the parameters of model and loss to the optimizer,
    or use `MLCSDTask`. The paper does not specify the training signal of the CWEM; `cwem_supervision` selects it:

    * ``ce``: cross-entropy of the mixed teacher logits, with weight 1, summed over the exits. Its gradient reaches the
      CWEM only.
    * ``kd``: L_KD, through t_i. The CWEM then learns to make each exit its own teacher, which minimises L_KD.
    * ``none``: no training; the CWEM keeps its random initial weights. Nor is the CWEM of the authors' released code
      trained, but without a BatchNorm its weights are nearly uniform.

    Mean top-1 on half of CIFAR-100 (experiments/cifar100_cpu.md) is 49.1, 48.5 and 47.1%, and 48.2% without teachers.

    Args:
        num_exits: Number of exits K.
        feature_dim: Channels D of the features, or one number per exit, [K]; if they differ, 1x1 convs that are used
            in training only project all features to the channels of the last.
        alpha: Weight of L_KD; default that of the method, 5 for ``kd`` (best value in the paper).
        beta: Weight of L_HT; default 10 (best value in the paper).
        gamma: Weight of L_CLS; default 1 (best value in the paper).
        temperature: Temperature T; default 4 (best value in the paper).
        cls_loss: Criterion from logits [B, C] and target to a scalar, such as timm's classification losses; default
            cross-entropy.
        exit_weights: Weights w_i of the exits, [K]; default all 1, as in the paper. They stay as they are.
        distill: Teacher of the exits: ``none`` or a key of `TEACHERS`; default ``all-for-all``.
        cwem_supervision: Training signal of the CWEM: ``ce`` (default), ``kd`` or ``none``.
        method: Distillation method for L_KD: a key of `DISTILL_METHODS` with the hyperparameters of its authors, or a
            `DistillMethod`; default ``kd``.
        distill_ramp: ``accuracy``, the default of train.py, multiplies the terms of exit i in L_KD and L_HT by its
            running training accuracy (`AccuracyRamp`), so that distillation starts as the exit learns, and limits the
            gradient of each image to half (L_KD, only for ``kd``) and to a tenth (L_HT) of that of its label
            (`limit_gradient`). ``none`` (default) is the loss of the paper.
        num_samples: Number of images in the training set; required by ``crd``.

    Raises:
        ValueError: An argument is unknown or out of range, or ``crd`` lacks `num_samples`.

    Examples:
        ```python
        criterion = MLCSDLoss(model.num_exits, model.exit_feature_dim, distill_ramp='accuracy')
        optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.05, momentum=0.9)
        for images, target in loader:
            loss = criterion(model.train()(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ```
    """

    exit_weights: torch.Tensor
    distill_scale: torch.Tensor

    def __init__(
        self,
        num_exits: int,
        feature_dim: Union[int, Sequence[int]],
        *,
        alpha: Optional[float] = None,
        beta: float = 10.0,
        gamma: float = 1.0,
        temperature: float = 4.0,
        cls_loss: Optional[nn.Module] = None,
        exit_weights: Optional[Sequence[float]] = None,
        distill: str = 'all-for-all',
        cwem_supervision: str = 'ce',
        method: Union[str, DistillMethod] = 'kd',
        distill_ramp: str = 'none',
        num_samples: Optional[int] = None,
    ):
        super().__init__()
        _check_choices(distill=distill, cwem_supervision=cwem_supervision, distill_ramp=distill_ramp)
        if not isinstance(method, DistillMethod) and method not in DISTILL_METHODS:
            raise ValueError(
                f'method={method!r} is unknown; choose one of {", ".join(DISTILL_METHODS)}, or pass a DistillMethod.'
            )
        if alpha is None:
            alpha = (DISTILL_METHODS[method] if isinstance(method, str) else method).weight
        _check_terms(temperature, cls_loss, alpha=alpha, beta=beta, gamma=gamma)
        exit_weights = [1.0] * num_exits if exit_weights is None else list(exit_weights)
        _check_exit_weights(exit_weights, num_exits)
        dims = _dims(feature_dim, num_exits)
        self.num_exits = num_exits
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature
        self.cls_loss = cls_loss if cls_loss is not None else nn.CrossEntropyLoss()
        self.distill = distill
        self.cwem_supervision = cwem_supervision
        # one number for all exits takes fewer operations
        self._weight = float(exit_weights[0]) if len(set(exit_weights)) == 1 else None
        self.register_buffer('exit_weights', torch.tensor(exit_weights, dtype=torch.float32), persistent=False)
        # a tensor, because torch.compile would recompile the loss for every new number
        self.register_buffer('distill_scale', torch.ones(()), persistent=False)

        self.mixer: Optional[TeacherMixer] = None
        self.method: Optional[DistillMethod] = None
        self.ramp: Optional[AccuracyRamp] = None
        self.projections = nn.ModuleList()
        # a single exit has no other exit as teacher
        if distill != 'none' and (alpha or beta) and num_exits > 1:
            self.mixer = TEACHERS[distill](num_exits, dims[-1])
            self.ramp = AccuracyRamp(num_exits) if distill_ramp == 'accuracy' else None
            # DDP expects gradients for all parameters that require them
            self.mixer.requires_grad_(cwem_supervision == 'ce' or (cwem_supervision == 'kd' and alpha > 0))
            if alpha:
                learners = num_exits - (not self.mixer.supervises_last_exit)
                self.method = self._make_method(method, learners, num_samples, dims[-1])
            if len(set(dims)) > 1:
                last = dims[-1]
                self.projections.extend(nn.Identity() if d == last else nn.Conv2d(d, last, 1, bias=False) for d in dims)
                self.projections.requires_grad_(beta > 0 or (self.method is not None and self.method.reads_features))

    def _make_method(
        self, method: Union[str, DistillMethod], learners: int, num_samples: Optional[int], feature_dim: int
    ) -> DistillMethod:
        if isinstance(method, DistillMethod):
            return method
        if method == 'cc':
            return CC()
        if method == 'crd':
            if not num_samples:
                raise ValueError("method='crd' stores every training image: pass their number as num_samples.")
            return CRD(learners, feature_dim, num_samples)
        return DISTILL_METHODS[method](self.temperature)

    @property
    def needs_hard_labels(self) -> bool:
        """Whether the target must be class indices."""
        return self.method is not None and self.method.hard_labels

    @property
    def needs_indices(self) -> bool:
        """Whether `forward` needs the indices of the images in the training set."""
        return self.method is not None and self.method.needs_indices

    def bank_buffer_names(self) -> List[str]:
        """Return the names of the buffers that store training images; the loss itself synchronises them, not DDP."""
        return [name for name, _ in self.named_buffers() if self.needs_indices and name.startswith('method.')]

    def set_distill_scale(self, scale: float) -> None:
        """Set a factor of alpha and beta, for example during a warm-up.

        Args:
            scale: Factor from 0 to 1.
        """
        self.distill_scale.fill_(scale)

    def forward(
        self,
        output: Sequence[Sequence[torch.Tensor]],
        target: torch.Tensor,
        return_components: bool = False,
        indices: Optional[torch.Tensor] = None,
    ) -> Union[torch.Tensor, Dict[str, torch.Tensor]]:
        """Compute the loss.

        Args:
            output: `MultiExitOutput` with K logits [B, C] and K features [B, D, H, W].
            target: Class indices [B], or another target that `cls_loss` supports, such as soft targets [B, C].
            return_components: Whether to return a dict of components; default False.
            indices: Indices of the images in the training set, [B]; required if `needs_indices`, default None.

        Returns:
            Loss, a scalar. With `return_components` a dict of ``loss`` and its components before weighting: ``cls``
            (L_CLS) and, with a teacher, ``kd`` (L_KD), ``ht`` (L_HT) and ``cwem`` (cross-entropy for the CWEM); terms
            that are switched off are missing.

        Raises:
            ValueError: `output` is a single tensor or has another number of exits, the loss has been cast to half
                precision, `target` must be class indices, or `indices` are missing.
        """
        if isinstance(output, torch.Tensor):
            raise ValueError(
                'output is one tensor, as a model returns in evaluation mode; use model.train(), or '
                'model.forward_exits(images).'
            )
        logits, features = output
        if len(logits) != self.num_exits:
            raise ValueError(f'output has {len(logits)} exits, the loss was made for num_exits={self.num_exits}.')
        if self.exit_weights.dtype in (torch.float16, torch.bfloat16):
            raise ValueError('the loss must stay in float32 or float64, independent of the model; call .float() on it.')
        with torch.autocast(logits[0].device.type, enabled=False):
            stacked = at_least_float32(torch.stack(list(logits), dim=1))
            is_batched = target.ndim in (1, 2) and is_mean_over_rows(self.cls_loss)
            expanded = expand_target(target, self.num_exits) if is_batched else None
            parts = {'cls': sum_of_losses(self.cls_loss, stacked, target, expanded, self._weights(stacked.dtype))}
            loss = scaled(parts['cls'], self.gamma)
            if self.mixer is not None:
                parts.update(self._distill(self.mixer, stacked, features, target, expanded, indices))
                distill_loss = sum(w * parts[n] for n, w in (('kd', self.alpha), ('ht', self.beta)) if n in parts)
                loss = loss + self.distill_scale * distill_loss + parts.get('cwem', 0.0)
        return dict(loss=loss, **parts) if return_components else loss

    def mixing_weights(self, output: Sequence[Sequence[torch.Tensor]], target: torch.Tensor) -> torch.Tensor:
        """Compute the mixing weights of the teachers (paper, Table 15).

        Args:
            output: `MultiExitOutput` with K logits [B, C] and K features [B, D, H, W].
            target: Class indices [B] or soft targets [B, C].

        Returns:
            Weights W [B, K, K]; row i belongs to the teacher of exit i.

        Raises:
            ValueError: The loss has no teacher.
        """
        if self.mixer is None:
            raise ValueError(f'distill={self.distill!r} has no teacher, so there are no mixing weights.')
        logits, features = output
        with torch.autocast(logits[0].device.type, enabled=False):
            stacked = at_least_float32(torch.stack(list(logits), dim=1))
            return self._mix(self.mixer, stacked, self._align(features), target)

    def _weights(self, dtype: torch.dtype) -> Weights:
        return self.exit_weights.to(dtype) if self._weight is None else self._weight

    def _align(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Stack the features in at least float32, with the channels and size of the last one, [B, K, D, H, W]."""
        if self.projections:
            features = [project(at_least_float32(f)) for project, f in zip(self.projections, features)]
        height, width = features[-1].shape[-2:]
        size = (height, width)
        if any(f.shape[-2:] != size for f in features):
            features = [at_least_float32(f) for f in features]
            features = [f if f.shape[-2:] == size else F.adaptive_avg_pool2d(f, size) for f in features]
        return stack_maps(features)

    def _mix(
        self, mixer: TeacherMixer, logits: torch.Tensor, features: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        pooled = features.detach().amax(dim=(-2, -1))
        weights: torch.Tensor = mixer(pooled.to(self.exit_weights.dtype), logits.detach(), target)
        return weights.to(logits.dtype)

    def _distill(
        self,
        mixer: TeacherMixer,
        logits: torch.Tensor,
        features: Sequence[torch.Tensor],
        target: torch.Tensor,
        expanded: Optional[torch.Tensor],
        indices: Optional[torch.Tensor],
    ) -> Dict[str, torch.Tensor]:
        """Compute the components ``kd``, ``ht`` and ``cwem``, those of them that are on."""
        self._check_batch(target, indices)
        parts: Dict[str, torch.Tensor] = {}
        maps = self._align(features)
        pool = logits.detach()
        weights = self._mix(mixer, pool, maps, target)
        teacher = weights @ pool
        if isinstance(mixer, CWEM) and self.cwem_supervision == 'ce':
            parts['cwem'] = sum_of_losses(self.cls_loss, teacher, target, expanded, 1.0)
        exit_weights, bounds = self._weights(logits.dtype), None
        if self.ramp is not None:
            exit_weights = self.ramp(logits, target) * exit_weights
            bounds = label_pull(logits, target)
        if self.method is not None:
            trains_mixer, pooled, teacher_pooled = self.cwem_supervision == 'kd', None, None
            if self.method.reads_features:
                pooled = maps.mean(dim=(-2, -1))
                teacher_pooled = (weights if trains_mixer else weights.detach()) @ pooled.detach()
            teacher = teacher if trains_mixer else teacher.detach()
            batch = DistillBatch(logits, teacher, pooled, teacher_pooled, target, indices)
            if bounds is None:
                losses = self.method(batch)
            else:
                losses = self.method.limited(
                    batch, self.alpha * self.distill_scale * exit_weights, LOGIT_SHARE * bounds
                )
            parts['kd'] = weighted(losses.to(logits.dtype), exit_weights)
        if self.beta:
            # the mean is independent of the order of the elements, so flatten them in memory order
            maps = maps.permute(0, 1, 3, 4, 2) if maps.stride(2) == 1 else maps
            parts['ht'] = self._feature_loss(maps.flatten(2), weights.detach(), exit_weights, bounds)
        return parts

    def _feature_loss(
        self, features: torch.Tensor, weights: torch.Tensor, exit_weights: Weights, bounds: Optional[torch.Tensor]
    ) -> torch.Tensor:
        """Compute L_HT from features [B, K, N] and mixing weights [B, K, K]; a ramp limits the gradients."""
        teachers = weights @ features.detach()
        if isinstance(exit_weights, float):
            return self.num_exits * exit_weights * F.mse_loss(features, teachers)
        losses = (features - teachers).square().mean(dim=2)
        if bounds is not None:
            # the gradient of the mean of N squares is 2/N times the difference
            lengths = 2 * (losses.detach() / features.shape[2]).sqrt()
            strengths = self.beta * self.distill_scale * exit_weights * lengths
            losses = limit_gradient(losses, strengths, FEATURE_SHARE * bounds)
        return weighted(losses.mean(dim=0), exit_weights)

    def _check_batch(self, target: torch.Tensor, indices: Optional[torch.Tensor]) -> None:
        name = type(self.method).__name__
        if self.needs_hard_labels and target.ndim != 1:
            raise ValueError(
                f'{name} needs class indices [B] as target, got shape {list(target.shape)}; switch off mixup and '
                f"cutmix, or use method='kd' or 'cc'."
            )
        if self.needs_indices and indices is None:
            raise ValueError(f'{name} needs indices [B], the indices of the images in the training set.')


def _check_choices(**given: str) -> None:
    """Raise a ValueError for an argument that is none of its choices."""
    choices = dict(distill=('none', *TEACHERS), cwem_supervision=CWEM_SUPERVISIONS, distill_ramp=DISTILL_RAMPS)
    for name, value in given.items():
        if value not in choices[name]:
            raise ValueError(f'{name}={value!r} is unknown; choose one of {", ".join(choices[name])}.')


def _check_terms(temperature: float, cls_loss: Optional[nn.Module], **weights: float) -> None:
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f'{name}={value} must be finite and not negative; 0 switches the term off.')
    if not 0 < temperature < math.inf:
        raise ValueError(f'temperature={temperature} must be positive and finite.')
    if isinstance(cls_loss, JsdCrossEntropy):
        raise ValueError(
            'cls_loss=JsdCrossEntropy compares augmented copies of each image across the batch, while the '
            'teachers and their targets are per image; use a loss without augmentation splits.'
        )


def _dims(feature_dim: Union[int, Sequence[int]], num_exits: int) -> List[int]:
    """Channels of every exit's features, [K]."""
    dims = [feature_dim] * num_exits if isinstance(feature_dim, int) else list(feature_dim)
    if len(dims) != num_exits:
        raise ValueError(f'feature_dim has {len(dims)} numbers for {num_exits} exits.')
    return dims


def _check_exit_weights(weights: Sequence[float], num_exits: int) -> None:
    """Raise a ValueError for weights that are not K finite numbers of which one is above 0."""
    if len(weights) != num_exits:
        raise ValueError(f'exit_weights has {len(weights)} numbers for {num_exits} exits.')
    if not all(0 <= w < math.inf for w in weights):
        raise ValueError(f'exit_weights={weights} must be finite and not negative.')
    if not any(weights):
        raise ValueError(f'exit_weights={weights} leaves no exit to train: give one above 0.')
