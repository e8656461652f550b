"""Which images the HTML report shows."""

import torch

from timm_mlcsd.adaptive import ExitPolicy, evaluate_policy
from timm_mlcsd.engine.evaluator import LabelledLogits
from timm_mlcsd.engine.gallery import PICTURES, ExampleGallery, _varied


def test_first_images_are_of_many_classes():
    labels = [0] * 20 + [1] * 3 + [2]
    # all of the rare classes, and the first of the others, in their order
    assert _varied(range(24), labels) == [0, 1, 2, 3, 4, 5, 6, 7, 20, 21, 22, 23]
    assert _varied([23, 5], labels) == [23, 5] and _varied([], labels) == []


def test_groups():
    torch.manual_seed(0)
    test = LabelledLogits(3 * torch.randn(3, 300, 4), torch.randint(4, (300,)))
    policy = ExitPolicy([0.9, 0.8])
    result = evaluate_policy(*test, [1.0, 2.0, 3.0], policy)
    gallery = ExampleGallery(result, test, policy, dict(mean=(0.5,) * 3, std=(0.5,) * 3))
    whole = test.logits[-1].argmax(-1) == test.targets
    for i in gallery.groups['lost']:
        assert whole[i] and result.prediction[i] != test.targets[i]
    assert all(len(group) == PICTURES for group in gallery.groups.values())
    assert all(result.exit_index[i] == 0 for i in gallery.groups['first'])
    assert all(result.exit_index[i] == 2 for i in gallery.groups['last'])
    assert len({int(test.targets[i]) for i in gallery.groups['first']}) == 4
