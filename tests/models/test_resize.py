"""Weights of one image size in a network of another: resampled as timm does it."""

import pytest
import timm
import torch
from timm.models import save_for_hf

import timm_mlcsd
from timm_mlcsd import load_backbone
from timm_mlcsd._timm import filter_checkpoint

# position embeddings; tables of relative positions; rotary positions; both
NAMES = [
    ('test_vit', (96, 96)),
    ('test_vit', (96, 160)),
    ('swin_s3_tiny_224', (112, 112)),
    ('test_vit_relpos', (96, 96)),
]
NAMES += [('vit_tiny_patch16_dinov3_qkvb', (128, 128)), ('tnt_s_legacy_patch16_224', (112, 112))]


def saved(name, folder, **kwargs):
    """A network in a folder, and its backbone in another."""
    model = timm.create_model(f'mlcsd_{name}', num_classes=5, exits=2, **kwargs).eval()
    for n, p in model.named_parameters():
        if 'pos' in n or 'bias_table' in n:
            torch.nn.init.normal_(p)  # what is zero looks the same at any size
    timm_mlcsd.save_pretrained(model, folder / 'exits')
    args = dict(num_classes=5, **kwargs)
    save_for_hf(model.backbone, folder / 'plain', model_args=args, safe_serialization=True)
    return model


@pytest.mark.parametrize('name, size', NAMES)
def test_a_folder_at_another_image_size(name, size, tmp_path):
    model = saved(name, tmp_path)
    plain = timm.create_model(f'local-dir:{tmp_path}/plain', pretrained=True, img_size=size).eval()
    again = timm_mlcsd.from_pretrained(tmp_path / 'exits', img_size=size)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert torch.equal(again(images), plain(images))
        assert torch.equal(again.forward_exits(images).logits[-1], plain(images))
    heads = model.heads.state_dict()
    assert all(torch.equal(t, heads[n]) for n, t in again.heads.state_dict().items())
    with torch.no_grad():
        same = timm_mlcsd.from_pretrained(tmp_path / 'exits')
        images = torch.randn(2, *model.probe_size)
        assert torch.equal(same(images), model(images))


def test_as_many_tokens_in_another_grid(tmp_path):
    saved('test_vit', tmp_path, img_size=(160, 96))
    plain = timm.create_model(f'local-dir:{tmp_path}/plain', pretrained=True, img_size=(96, 160)).eval()
    again = timm_mlcsd.from_pretrained(tmp_path / 'exits', img_size=(96, 160))
    images = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        assert torch.equal(again(images), plain(images))


def test_another_image_size_and_other_classes(tmp_path):
    saved('test_vit', tmp_path)
    again = timm_mlcsd.from_pretrained(tmp_path / 'exits', img_size=96, num_classes=3)
    assert {z.shape for z in again.forward_exits(torch.randn(2, 3, 96, 96)).logits} == {(2, 3)}


@pytest.mark.parametrize('name, size', NAMES[:4])
def test_a_backbones_weights_at_another_image_size(name, size, tmp_path):
    model = saved(name, tmp_path)
    plain = timm.create_model(f'local-dir:{tmp_path}/plain', pretrained=True, img_size=size).eval()
    images = torch.randn(2, 3, *size)
    for source in (model.state_dict(), model.backbone.state_dict(), tmp_path / 'exits' / 'model.safetensors'):
        for target in (f'mlcsd_{name}', name):
            other = timm.create_model(target, num_classes=5, img_size=size).eval()
            load_backbone(other, source)
            with torch.no_grad():
                assert torch.equal(other(images), plain(images))


def test_weights_of_other_networks_are_still_refused():
    source = timm.create_model('test_vit', num_classes=5).state_dict()
    with pytest.raises(ValueError, match='weights do not fit the backbone'):
        load_backbone(timm.create_model('mlcsd_test_vit', num_classes=3), source)
    with pytest.raises(ValueError, match='weights do not fit the backbone'):
        load_backbone(timm.create_model('mlcsd_test_vit2', num_classes=5), source)


@pytest.mark.parametrize('name', ['resnet18', 'test_convnext', 'test_efficientnet', 'levit_128s', 'regnetx_002'])
def test_weights_that_fit_stay_as_they_are(name):
    model = timm.create_model(name)
    state = model.state_dict()
    filtered = filter_checkpoint(state, model)
    assert filtered.keys() == state.keys() and all(torch.equal(filtered[n], state[n]) for n in state)
