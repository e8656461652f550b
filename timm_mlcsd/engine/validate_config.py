"""The configuration of a validation: what validate.py's flags set."""

from dataclasses import dataclass, field
from typing import List, Optional, Union

from .data_config import DataConfig
from .device import DeviceConfig
from .flat_config import FlatConfig

__all__ = ['ValidateConfig']


@dataclass
class ValidateConfig(FlatConfig):
    """A validation; the names of all fields are those of validate.py's flags.

    Attributes:
        data: Data and preprocessing.
        device: Device, precision and memory format.
        checkpoint: Checkpoint of train.py or folder of a run, empty where `model` is given.
        model: ``hf-hub:REPO`` or ``local-dir:PATH``.
        use_ema: Whether the averaged weights of the checkpoint are used.
        split: Split to evaluate on.
        held_out: Whether to evaluate on the images that training held out instead.
        real_labels: File of the reassessed labels of ImageNet's validation images, or True for those in timm.
        valid_labels: File of the class indices that the data has, empty for all.
        adaptive: Whether images leave early.
        budget: Mean cost per image, in MMACs or percent of the plain backbone.
        latency_budget: Mean milliseconds per image.
        max_drop: Risk in points that is allowed.
        confidence: Probability with which the risk on new images is allowed; None for the calibration images alone.
        risk: Kind of risk.
        score: Exit score of a fitted policy.
        aggregate: Kind of answers of a fitted policy.
        method: How thresholds are found.
        calibration_split: Split that a policy is fitted to.
        calibration_images: Files, folders and patterns of images without labels that a policy is fitted to instead.
        policy: File of the policy to use.
        save_policy: File of the fitted policy, or True for the one beside the weights.
        report: HTML page to write, empty for none.
        results_file: Table to write as .csv or .json, empty for none.
        plot: Figure to write as .png, empty for none.
        against: Static networks to compare an adaptive one with: checkpoints, or names of timm's pretrained networks.
        corruptions: Corruptions to evaluate an adaptive network under, or ``all``; empty for none.
        severity: Severity of the corruptions, 1 to 5.
        exported: Folder of exported stages to compare with the network, empty for none.
        trust_exported: Whether the author of that folder is trusted, which PyTorch's exported programs need.
    """

    data: DataConfig = field(default_factory=DataConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    checkpoint: str = ''
    model: str = ''
    use_ema: bool = False
    split: str = 'validation'
    held_out: bool = False
    real_labels: Union[str, bool, None] = None
    valid_labels: str = ''
    adaptive: bool = False
    budget: Optional[str] = None
    latency_budget: Optional[float] = None
    max_drop: Optional[float] = None
    confidence: Optional[float] = 0.95
    risk: str = 'drop'
    score: Optional[str] = None
    aggregate: Optional[str] = None
    method: Optional[str] = None
    calibration_split: Optional[str] = None
    calibration_images: List[str] = field(default_factory=list)
    policy: Optional[str] = None
    save_policy: Union[str, bool, None] = None
    report: str = ''
    results_file: str = ''
    plot: str = ''
    against: List[str] = field(default_factory=list)
    corruptions: List[str] = field(default_factory=list)
    severity: int = 3
    exported: str = ''
    trust_exported: bool = False

    @property
    def source(self) -> str:
        """The network that is validated, as the user named it."""
        return self.checkpoint or self.model
