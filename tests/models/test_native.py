"""MSDNet and RANet: the public implementations' sizes, stages that stop, timm's contract."""

import pytest
import timm
import torch

from timm_mlcsd import MLCSDLoss, load_backbone
from timm_mlcsd.adaptive import AdaptiveModel, ExitPolicy, evaluate_policy
from timm_mlcsd.cost import exit_costs
from timm_mlcsd.models import create_model

SMALL = {
    'mlcsd_msdnet': dict(num_blocks=4, base=2, step=1, channels=4, growth_rate=4),
    'mlcsd_ranet': dict(step=1, channels=4, growth_rate=4, scales=(1, 2, 3), growth_factors=(4, 2, 1))
    | dict(bottleneck_factors=(4, 2, 1)),
}


@pytest.fixture(params=sorted(SMALL))
def model(request):
    return timm.create_model(request.param, num_classes=7, **SMALL[request.param])


IMAGENET_MSDNET = dict(growth_factors=(1, 2, 4, 4), bottleneck_factors=(1, 2, 4, 4), growth_rate=16, channels=32)
THREE = dict(scales=(1, 2, 3), growth_factors=(4, 2, 1), bottleneck_factors=(4, 2, 1))


# exits, parameters and multiply-adds counted on the public code (kalviny/MSDNet-PyTorch, yangle15/RANet-pytorch) with
# the same arguments; with its weights copied over, all exits' logits were the same bit for bit, too
@pytest.mark.parametrize(
    'name, size, kwargs, expected',
    [
        ('mlcsd_msdnet', 32, dict(num_classes=100), (8, 4_027_812, 112_484_352)),
        (
            'mlcsd_msdnet',
            32,
            dict(num_classes=10, num_blocks=5, base=1, step=1, step_mode='linear', prune='min'),
            (5, 1_867_172, 61_341_952),
        ),
        (
            'mlcsd_msdnet',
            224,
            dict(num_blocks=5, base=4, step=4, stem='imagenet', **IMAGENET_MSDNET),
            (5, 23_958_440, 1_355_606_016),
        ),
        ('mlcsd_ranet', 32, dict(num_classes=100), (8, 3_175_597, 102_100_480)),
        ('mlcsd_ranet', 32, dict(num_classes=10, step=4, **THREE), (6, 2_451_158, 60_942_912)),
        (
            'mlcsd_ranet',
            32,
            dict(num_classes=100, block_step=1, step=2, step_mode='linear', **THREE),
            (4, 1_655_439, 40_174_976),
        ),
    ],
)
def test_sizes_are_the_public_implementations(name, size, kwargs, expected):
    with torch.device('meta'):
        model = timm.create_model(name, **kwargs)
    costs = exit_costs(model, (3, size, size))
    assert (model.num_exits, sum(p.numel() for p in model.parameters()), costs[-1].macs) == expected
    assert [c.macs for c in costs] == sorted({c.macs for c in costs})


def test_widths_differ_with_the_imagenet_stem():
    model = timm.create_model('mlcsd_ranet', stem='imagenet', num_classes=5, **SMALL['mlcsd_ranet'])
    assert model.default_cfg['input_size'] == model.probe_size == (3, 224, 224)
    dims = model.exit_feature_dim
    assert len(dims) == model.num_exits and len(set(dims)) > 1
    output = model(torch.randn(2, 3, 64, 64))
    assert [f.shape[1] for f in output.features] == dims
    criterion = MLCSDLoss(model.num_exits, dims)
    criterion(output, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for m in (model, criterion) for p in m.parameters())


@pytest.mark.parametrize('distill', ['none', 'one-for-all', 'all-for-all'])
def test_every_parameter_learns(model, distill):
    criterion = MLCSDLoss(model.num_exits, model.exit_feature_dim, distill=distill)
    criterion(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for m in (model, criterion) for p in m.parameters())


@torch.no_grad()
def test_stages_and_the_whole_agree(model):
    model.eval()
    images = torch.randn(3, 3, 33, 40)  # neither square nor a multiple of the reduction
    expected = model.forward_exits(images)
    assert torch.equal(model(images), expected.logits[-1])
    assert torch.equal(model.forward_head(model.forward_features(images)), expected.logits[-1])
    for (k, logits), z in zip(model.iter_exits(images), expected.logits):
        assert torch.equal(logits, z), k


def test_stopping_computes_nothing_behind(model):
    ran = []
    for k, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *_, k=k: ran.append(k))
        for part in stage:
            part.register_forward_hook(lambda *_, k=k: ran.append(k))
    next(model.eval().iter_exits(torch.randn(1, 3, 32, 32)))
    assert set(ran) == {0}


@torch.no_grad()
def test_leaves_early_like_any_other(model):
    images = torch.randn(40, 3, 32, 32)
    model.eval()
    logits = torch.stack(model.forward_exits(images).logits)
    surest = logits.softmax(-1).amax(-1)
    policy = ExitPolicy([surest[k].median().item() for k in range(model.num_exits - 1)])
    costs = exit_costs(model, model.probe_size)
    prediction = AdaptiveModel(model, policy).predict(images)
    expected = evaluate_policy(logits, torch.zeros(40, dtype=torch.long), costs, policy)
    fractions = torch.bincount(prediction.exit_index, minlength=model.num_exits) / 40
    torch.testing.assert_close(fractions.tolist(), list(expected.exit_fractions))
    answers = logits[prediction.exit_index, torch.arange(40)]
    torch.testing.assert_close(prediction.logits, answers, rtol=1e-4, atol=1e-5)  # other batch sizes, other kernels


def test_model_contract(model, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    assert model.get_classifier() is model.heads[-1].fc
    features, intermediates = model.forward_intermediates(images)
    assert len(intermediates) == model.num_exits and torch.equal(features, intermediates[-1])
    assert [f.shape[1] for f in intermediates] == [info['num_chs'] for info in model.feature_info]
    name = model.default_cfg['architecture']
    first = timm.create_model(name, features_only=True, out_indices=(0, 2), **SMALL[name])(images)
    assert [f.shape for f in first] == [intermediates[0].shape, intermediates[2].shape]

    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(3)
    assert all(z.shape == (2, 3) for z in model.forward_exits(images).logits)
    with pytest.raises(ValueError, match="expected 'avg'"):
        model.reset_classifier(3, 'max')

    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sorted(groups) == list(range(model.num_exits + 1))
    assert {n.split('.')[1] for n in groups[1]} == {'0'}


def test_gradient_checkpointing_gives_the_same_gradients(model):
    images = torch.randn(2, 3, 32, 32)
    stats = {n: b.clone() for n, b in model.named_buffers()}
    gradients = []
    for enable in (False, True):
        model.load_state_dict(stats, strict=False)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        sum(z.square().sum() for z in model(images).logits).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_weights_of_other_classes(model, tmp_path):
    path = tmp_path / 'w.safetensors'
    import safetensors.torch

    safetensors.torch.save_file(model.state_dict(), path)
    name = model.default_cfg['architecture']
    overlay = dict(file=str(path), num_classes=7)
    again = timm.create_model(name, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay, **SMALL[name])
    assert torch.equal(again.heads[0].reduce[0][0].weight, model.heads[0].reduce[0][0].weight)
    assert again.heads[0].fc.weight.shape[0] == 3


@pytest.mark.parametrize(
    'name, kwargs, message',
    [
        ('mlcsd_msdnet', dict(exits=4), 'exits does not apply to mlcsd_msdnet, which is designed with exits'),
        ('mlcsd_ranet', dict(small_input=True), 'small_input does not apply'),
        ('mlcsd_msdnet', dict(pretrained=True), 'there are no weights for mlcsd_msdnet'),
        ('mlcsd_ranet', dict(pretrained_backbone=True), 'pretrained_backbone does not apply'),
        ('mlcsd_msdnet', dict(step_mode='odd'), "step_mode='odd' is unknown; choose one of even, linear"),
        ('mlcsd_msdnet', dict(prune='x'), "prune='x' is unknown"),
        ('mlcsd_ranet', dict(stem='x'), "stem='x' is unknown"),
        ('mlcsd_msdnet', dict(growth_factors=(1, 2)), 'one number per scale'),
        ('mlcsd_msdnet', dict(growth_rate=3, growth_factors=(1, 1, 2)), 'must be even'),
        ('mlcsd_msdnet', dict(base=0), 'at least 1'),
        ('mlcsd_ranet', dict(scales=(1, 3, 3, 3)), 'must begin with 1 and increase by 0 or 1'),
        ('mlcsd_ranet', dict(compress_factor=0.01), 'without channels'),
        ('mlcsd_msdnet', dict(reduction=0.01), 'reduction=0.01 keeps none of'),
        ('mlcsd_ranet', dict(reduction=2), 'reduction=2: expected a number above 0'),
    ],
)
def test_mistakes_are_named(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize('layers', [1, 2, 3])
def test_fewer_layers_than_scales(layers):
    model = timm.create_model('mlcsd_msdnet', num_blocks=layers, base=1, step=1, prune='min', num_classes=3).eval()
    assert len(model.forward_exits(torch.randn(1, 3, 32, 32)).logits) == layers


def test_pruned_model_is_consistent(model):
    model.prune_intermediate_layers([0, 1], prune_head=False)
    output = model(torch.randn(2, 3, 32, 32))
    assert len(output.logits) == model.num_exits == len(model.exit_names) == len(model.feature_info) == 2
    MLCSDLoss(model.num_exits, model.exit_feature_dim)(output, torch.tensor([0, 1])).backward()


def test_input_size_of_an_overlay_wins():
    overlay = dict(input_size=(3, 256, 256))
    model = timm.create_model('mlcsd_msdnet', stem='imagenet', pretrained_cfg_overlay=overlay, **SMALL['mlcsd_msdnet'])
    assert model.default_cfg['input_size'] == (3, 256, 256) and model.default_cfg['classifier'] == 'heads.3.fc'


def test_no_backbone_to_load(model):
    with pytest.raises(ValueError, match='has no backbone to load'):
        load_backbone(model, {})


def test_small_images_are_refused(model):
    with pytest.raises(ValueError, match='image size 2x2 is too small'):
        model.check_input_size(2, 2)
