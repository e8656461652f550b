"""timm's contract, on chains and on backbones that run as a whole: a multi-exit network is a timm model."""

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, freeze

import timm_mlcsd  # noqa: F401

NAMES = ['test_resnet', 'test_efficientnet', 'test_convnext', 'test_mambaout', 'test_vit', 'levit_128s']
NAMES += ['xcit_nano_12_p8_224']


def make(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(f'mlcsd_{name}', **kwargs)
    return model, torch.randn(2, *model.probe_size)


@pytest.mark.parametrize('name', NAMES)
def test_forward_and_default_cfg(name):
    model, images = make(name)
    plain = timm.create_model(name)
    model.eval()
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (2, 1000) and logits.isfinite().all()
    cfg = model.default_cfg
    assert cfg['architecture'] == f'mlcsd_{name}' and cfg['classifier'] and cfg['first_conv']
    state = model.state_dict()
    for key in ('classifier', 'first_conv'):
        for module in [cfg[key]] if isinstance(cfg[key], str) else cfg[key]:
            assert f'{module}.weight' in state
    # below backbone. timm's own names, and no others
    below = [n.removeprefix('backbone.') for n in state if n.startswith('backbone.')]
    assert below == list(plain.state_dict())
    assert all(n.startswith(('backbone.', 'heads.')) for n in state)
    assert (model.num_features, model.head_hidden_size) == (plain.num_features, plain.head_hidden_size)


@pytest.mark.parametrize('name', NAMES)
def test_backward_through_the_mean_over_all_exits(name):
    model, images = make(name, num_classes=42)
    torch.stack(model.train()(images).logits).mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == []


@pytest.mark.parametrize('name', NAMES)
def test_classifiers(name):
    model, images = make(name, num_classes=0)
    model.eval()
    with torch.no_grad():
        assert model(images).shape == (2, model.head_hidden_size)
        assert {z.shape[1] for z in model.forward_exits(images).logits[:-1]} == {model.exit_feature_dim}
        model.reset_classifier(5)
        assert not any(module.training for module in model.modules())
        assert {z.shape for z in model.forward_exits(images).logits} == {(2, 5)}
        features = model.forward_features(images)
        assert torch.equal(model.forward_head(features), model(images))
        assert [z.shape for _, z in model.iter_exits(images)] == [(2, 5)] * model.num_exits


@pytest.mark.parametrize('name', [n for n in NAMES if n != 'levit_128s'])
def test_intermediates_and_features_only(name):
    model, images = make(name)
    plain = timm.create_model(name)
    plain.load_state_dict(model.backbone.state_dict())
    model.eval(), plain.eval()
    with torch.no_grad():
        ours, theirs = (m.forward_intermediates(images, indices=2, intermediates_only=True) for m in (model, plain))
        assert len(ours) == 2 and all(torch.equal(a, b) for a, b in zip(ours, theirs))
        extractor = timm.create_model(f'mlcsd_{name}', features_only=True, out_indices=(-2, -1)).eval()
        maps = extractor(images)
    assert [m.shape[1] for m in maps] == extractor.feature_info.channels()


@pytest.mark.parametrize('name', NAMES)
def test_layer_groups_and_freezing(name):
    model, _ = make(name)
    groups = group_parameters(model, model.group_matcher())
    assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scales = {id(p): g['lr_scale'] for g in optimizer.param_groups for p in g['params']}
    first, last = (scales[id(model.heads[k].fc.weight)] for k in (0, -1))
    assert first < last or len(model.heads) == 1
    freeze(model, ['backbone'])
    assert {n.split('.')[0] for n, p in model.named_parameters() if p.requires_grad} == {'heads'}


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_averaged_weights(name):
    model, images = make(name, num_classes=3)
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        ema.update(model)
        answers = [m.eval().forward_exits(images).logits[0] for m in (model, ema.module)]
    assert answers[0].abs().max() == 0 and answers[1].abs().max() > 0


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_checkpoint_path_loads_a_multi_exit_checkpoint(name, tmp_path):
    model, images = make(name, num_classes=3)
    path = tmp_path / 'weights.pth'
    torch.save(model.state_dict(), path)
    again = timm.create_model(f'mlcsd_{name}', num_classes=3, checkpoint_path=str(path))
    with torch.no_grad():
        assert torch.equal(model.eval()(images), again.eval()(images))


def saved_bytes(model, images):
    """What autograd keeps for the backward pass, the weights aside."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = sum(z.float().square().mean() for z in model(images).logits)
    return sum(kept.values()), loss


@pytest.mark.parametrize('name, exits', [('resnet18', 4), ('test_convnext', 4), ('vit_tiny_patch16_224', 4)])
def test_gradient_checkpointing_saves_memory_and_changes_no_gradient(name, exits):
    model, images = make(name, exits=exits, num_classes=3)
    model.eval()  # no statistics that a second run would update
    model.training = True
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.backbone.train(enable and not model.plan.is_chain)  # timm checkpoints in training mode only
        model.zero_grad()
        kept, loss = saved_bytes(model, images)
        loss.backward()
        results.append((kept, [p.grad.clone() for p in model.parameters()]))
    assert results[1][0] < 0.7 * results[0][0]
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize('name', ['mlcsd_resnet18', 'mlcsd_test_vit', 'mlcsd_msdnet'])
def test_features_only_with_gradient_checkpointing(name):
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        features = timm.create_model(name, features_only=True).train()
        features.set_grad_checkpointing(enable)
        size = 160 if 'vit' in name else 64
        sum(f.square().mean() for f in features(torch.ones(2, 3, size, size))).backward()
        gradients.append([p.grad for p in features.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
