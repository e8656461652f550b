"""Names, and networks that come back from a folder."""

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import save_for_hf

from timm_mlcsd import from_pretrained, save_pretrained
from timm_mlcsd.models import create_model


def test_names_are_registered():
    known = timm.list_models()
    assert {f'mlcsd_{name}' for name in known if not name.startswith('mlcsd_')} <= set(known)
    assert timm.create_model('mlcsd_resnet34', pretrained=False).num_exits == 8


def test_pretrained_multi_exit_weights_do_not_exist():
    with pytest.raises(ValueError, match=r'no multi-exit weights for mlcsd_resnet50.*pretrained_backbone=True'):
        timm.create_model('mlcsd_resnet50', pretrained=True)


def test_a_backbone_without_a_tag_is_not_offered_one():
    with pytest.raises(ValueError, match=r'pass pretrained_backbone=True; for your own'):
        timm.create_model('mlcsd_davit_giant', pretrained=True)


def test_a_backbone_without_a_configuration_is_not_offered_a_tag(monkeypatch):
    monkeypatch.setattr('timm_mlcsd.models.registry.get_pretrained_cfg', lambda name: None)
    with pytest.raises(ValueError, match=r'pass pretrained_backbone=True; for your own'):
        timm.create_model('mlcsd_resnet18', pretrained=True)


@pytest.mark.parametrize(
    'name, message',
    [
        ('mlcsd_resnet51', "unknown model 'mlcsd_resnet51'; near names: .*mlcsd_resnet50"),
        ('resnet50', "'resnet50' has no exits; use mlcsd_resnet50"),
        ('qqqq', r"unknown model 'qqqq'; timm.list_models"),
        ('local-dir:/nowhere', 'cannot be made'),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        create_model(name)


def test_unknown_argument():
    with pytest.raises(ValueError, match=r'mlcsd_resnet18 cannot be made: .*colour'):
        create_model('mlcsd_resnet18', colour='red')


def test_folder_rebuilds_the_same_network(tmp_path):
    model_args = dict(exits=4, exit_head='slic', small_input=True, channels=(8, 16, 24, 32))
    model = timm.create_model('mlcsd_resnet18', num_classes=7, **model_args).eval()
    save_for_hf(model, tmp_path, model_args=model_args, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(model.forward_exits(x).logits, again.forward_exits(x).logits))


def test_weights_of_a_folder_for_another_number_of_classes(tmp_path):
    model_args = dict(exits=4, small_input=True, channels=(8, 16, 24, 32))
    model = timm.create_model('mlcsd_resnet18', num_classes=7, **model_args)
    save_for_hf(model, tmp_path, model_args=model_args, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=5)
    assert {z.shape for z in again.eval().forward_exits(torch.randn(2, 3, 32, 32)).logits} == {(2, 5)}
    fresh = ('fc.weight', 'fc.bias')
    state = model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items() if not n.endswith(fresh))


def test_other_readers_of_features():
    with pytest.raises(ValueError, match="feature_cls='fx': expected getter"):
        timm.create_model('mlcsd_resnet18', features_only=True, feature_cls='fx')
    assert len(timm.create_model('mlcsd_resnet18', features_only=True, feature_cls='getter').feature_info) == 5


@pytest.mark.parametrize('name', ['mlcsd_resnet18', 'mlcsd_test_vit', 'mlcsd_msdnet'])
def test_the_image_size_of_the_configuration_is_that_of_the_network(name, tmp_path):
    size = (3, 64, 64)
    model = timm.create_model(name, num_classes=3, pretrained_cfg_overlay=dict(input_size=size))
    assert model.probe_size == size
    save_pretrained(model, tmp_path / 'a')
    again = from_pretrained(tmp_path / 'a')
    assert again.probe_size == size
    save_pretrained(again, tmp_path / 'b')
    assert resolve_data_config(model=from_pretrained(tmp_path / 'b'))['input_size'] == size


def test_a_tag_brings_its_preprocessing(monkeypatch):
    monkeypatch.setattr('timm.models._builder.load_pretrained', lambda *args, **kwargs: None)
    plain = timm.create_model('vit_small_patch16_224.dino', pretrained=True)
    default = timm.create_model('mlcsd_vit_small_patch16_224', exits=2)
    model = timm.create_model('mlcsd_vit_small_patch16_224', exits=2, pretrained_backbone='dino')
    config = resolve_data_config(model=model)
    assert config == resolve_data_config(model=plain) != resolve_data_config(model=default)
    assert model.num_classes == plain.num_classes
    with pytest.raises(ValueError, match='Invalid pretrained tag'):
        create_model('mlcsd_resnet18', pretrained_backbone='nowhere')
