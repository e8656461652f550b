"""ShuffleNetV2: torchvision's network, complete as a timm backbone."""

import pytest
import timm
import torch
import torchvision

import timm_mlcsd  # noqa: F401


def make(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('shufflenetv2_050', num_classes=7, **kwargs)


@pytest.mark.parametrize(
    'name, reference',
    [
        ('shufflenetv2_050', torchvision.models.shufflenet_v2_x0_5),
        ('shufflenetv2_100', torchvision.models.shufflenet_v2_x1_0),
        ('shufflenetv2_150', torchvision.models.shufflenet_v2_x1_5),
        ('shufflenetv2_200', torchvision.models.shufflenet_v2_x2_0),
    ],
)
def test_is_torchvisions_network(name, reference):
    model, reference = timm.create_model(name).eval(), reference().eval()
    model.load_state_dict(reference.state_dict())  # strict: the same names
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), reference(x))
    assert model.pretrained_cfg['url'].startswith('https://download.pytorch.org/models/shufflenetv2')


def test_pretrained_weights_load(tmp_path):
    path = tmp_path / 'weights.pth'
    source = torchvision.models.shufflenet_v2_x0_5()
    torch.save(source.state_dict(), path)
    overlay = dict(file=str(path))
    model = timm.create_model('shufflenetv2_050', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert torch.equal(model.stage4[0].branch1[0].weight, source.stage4[0].branch1[0].weight)
    assert model.fc.weight.shape == (3, 1024)


def test_timm_contract():
    model = make(in_chans=1, drop_rate=0.2).eval()
    x = torch.randn(2, 1, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2) and model.in_chans == 1
    assert torch.equal(model.forward_head(features), model(x)) and model(x).shape == (2, 7)
    assert model.forward_head(features, pre_logits=True).shape == (2, 1024)
    final, intermediates = model.forward_intermediates(x)
    assert torch.equal(final, features)
    assert [(f.shape[1], 64 // f.shape[2]) for f in intermediates] == [
        (info['num_chs'], info['reduction']) for info in model.feature_info
    ]
    model.reset_classifier(0)
    assert model(x).shape == (2, 1024)
    model.reset_classifier(5, 'max')
    assert model(x).shape == (2, 5)
    assert isinstance(timm.create_model('shufflenetv2_050', num_classes=0).fc, torch.nn.Identity)


def test_features_only():
    model = make(features_only=True, out_indices=(2, 4))
    assert [f.shape for f in model(torch.randn(1, 3, 64, 64))] == [(1, 48, 8, 8), (1, 192, 2, 2)]
    model = make()
    assert model.prune_intermediate_layers([2]) == [2]
    assert sum(p.numel() for p in model.stage3.parameters()) == 0
    assert (
        model.forward_intermediates(torch.randn(1, 3, 64, 64), indices=[2], intermediates_only=True)[0].shape[1] == 48
    )


def test_gradient_checkpointing_changes_no_gradient():
    model, x = make().eval(), torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize('exits', [8, 4, 1])
@pytest.mark.parametrize('small_input', [False, True])
def test_with_exits(exits, small_input):
    model = timm.create_model('mlcsd_shufflenetv2_050', exits=exits, small_input=small_input, num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    assert model.plan.is_chain and model.num_exits == exits
    with torch.no_grad():
        output = model.forward_exits(x)
        assert torch.equal(output.logits[-1], model.backbone(x))
    assert {f.shape for f in output.features} == {(2, 192, *(2 * [8 if small_input else 2]))}
