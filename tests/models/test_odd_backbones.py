"""What a tester found: networks that would answer otherwise than they say, refused or run as a whole."""

import pytest
import timm
import torch

import timm_mlcsd
from timm_mlcsd.models import weights_digest
from timm_mlcsd.stored import check_model_source, check_values


def make(**kwargs):
    return timm.create_model('mlcsd_test_resnet', exits=3, num_classes=5, **kwargs).eval()


def test_a_hook_on_the_network_itself():
    model = make()
    handle = model.register_forward_hook(lambda module, args, output: output * 2)
    assert not model.resumable and 'the network itself has forward hooks' in model.why_not_resumable
    handle.remove()
    assert model.resumable


class _Centered(torch.nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def test_a_module_that_mixes_images_is_found_below_a_new_classifier():
    """Logits of a new classifier are small, and so are their differences."""
    plain = timm.create_model('test_resnet', num_classes=5)
    plain.layer3.add_module('centered', _Centered())
    model = timm_mlcsd.create_multi_exit(plain, exits=3).eval()
    assert not model.resumable and 'differs from that of the backbone' in model.why_not_resumable


def test_a_compiled_backbone_is_refused():
    with pytest.raises(ValueError, match='the backbone is compiled'):
        timm_mlcsd.create_multi_exit(torch.compile(timm.create_model('test_resnet')), exits=3)


def test_a_backbone_in_evaluation_mode_stays_in_it():
    model = timm_mlcsd.create_multi_exit(timm.create_model('test_resnet').eval(), exits=3)
    assert not model.training and not any(module.training for module in model.modules())
    assert isinstance(model(torch.zeros(1, 3, 64, 64)), torch.Tensor)


def test_what_would_load_as_another_network_is_not_saved(tmp_path):
    model = make()
    model.backbone.act1 = torch.nn.GELU()
    with pytest.raises(ValueError, match=r"'backbone.act1' is a GELU, but would be loaded as ReLU"):
        timm_mlcsd.save_pretrained(model, tmp_path / 'net')
    model = make()
    model.backbone.layer1.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match=r"'backbone.layer1' has forward hooks"):
        timm_mlcsd.save_pretrained(model, tmp_path / 'net')
    with pytest.raises(ValueError, match=r'crop_pct=0: expected'):
        timm_mlcsd.save_pretrained(make(), tmp_path / 'net', data_config=dict(crop_pct=0))
    assert not (tmp_path / 'net').exists()


def test_the_digest_knows_the_exits():
    first, second = make(), make(exit_pool='avg')
    second.load_state_dict(first.state_dict())
    assert weights_digest(first) != weights_digest(second)
    second = make()
    second.load_state_dict(first.state_dict())
    assert weights_digest(first) == weights_digest(second.to(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda t: t.to(torch.complex64), 'type torch.complex64'),
        (lambda t: t.long(), 'type torch.int64'),
        (lambda t: t.bool(), 'type torch.bool'),
        (lambda t: t * float('nan'), 'not finite'),
    ],
)
def test_weights_that_would_be_cast_or_are_not_numbers(change, message):
    model = make()
    tensors = {**model.state_dict(), 'heads.0.fc.weight': change(model.heads[0].fc.weight.detach())}
    with pytest.raises(ValueError, match=message):
        check_values(tensors, model)


def test_rates_and_preprocessing_of_stored_networks():
    with pytest.raises(ValueError, match='drop_rate=5: expected a rate'):
        check_model_source('mlcsd_test_resnet', dict(drop_rate=5))
    with pytest.raises(ValueError, match='data_config lacks crop_pct, input_size'):
        check_model_source('mlcsd_test_resnet', {}, dict(mean=(0, 0, 0), std=(1, 1, 1), interpolation='bicubic'))
