"""The evaluator, as a script uses it."""

import pytest
import timm
import torch

import timm_mlcsd  # noqa: F401  # registers the networks
from timm_mlcsd import MLCSDLoss
from timm_mlcsd.engine import Evaluator, TrainConfig
from timm_mlcsd.engine.validate_config import ValidateConfig
from timm_mlcsd.errors import UserError


@pytest.fixture
def evaluator():
    model = timm.create_model('mlcsd_test_resnet', exits=3, num_classes=3)
    return Evaluator(model, dict(input_size=(3, 64, 64)))


def test_no_images_are_an_error_everywhere(evaluator):
    criterion = MLCSDLoss(3, evaluator.model.exit_feature_dim)
    for result in (evaluator.evaluate, evaluator.logits, lambda data: evaluator.mean_mixing_weights(criterion, data)):
        with pytest.raises(UserError, match='there are no images'):
            result([])


def test_modes_of_all_modules_are_restored(evaluator):
    model = evaluator.model.train()
    model.heads[0].eval()
    criterion = MLCSDLoss(3, model.exit_feature_dim)
    before = [m.training for m in (*model.modules(), *criterion.modules())]
    data = [(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))] * 2
    evaluator.evaluate(data)
    weights = evaluator.mean_mixing_weights(criterion, data, max_batches=1)
    assert [m.training for m in (*model.modules(), *criterion.modules())] == before
    # every row is a mean of softmax outputs
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))


@pytest.mark.parametrize('kind', [TrainConfig, ValidateConfig])
def test_configurations_round_trip_and_refuse_unknown_names(kind):
    config = kind.from_dict(dict(img_size=64, device='cpu'))
    assert config.data.img_size == 64 and config.device.device == 'cpu'
    assert kind.from_dict(config.to_dict()) == config
    for name in ('imgsize', 'data'):
        with pytest.raises(ValueError, match=f'unknown settings: {name}'):
            kind.from_dict({name: 64})
