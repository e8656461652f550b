"""A call that fails leaves the backbone as it was, and one backbone belongs to one network."""

import copy
import pickle

import pytest
import timm
import torch

from timm_mlcsd import create_multi_exit

SMALL = dict(num_classes=7, channels=(8, 16, 24, 32))


def everything_of(backbone, images):
    """What a user could notice a change by."""
    modules = [(name, id(m), m.training, str(m), sorted(vars(m))) for name, m in backbone.named_modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in backbone.modules()]
    tensors = [(name, id(t), t.clone()) for name, t in (*backbone.named_parameters(), *backbone.named_buffers())]
    with torch.no_grad():
        output = copy.deepcopy(backbone).eval()(images)
    return modules, hooks, tensors, copy.deepcopy(list(backbone.feature_info)), output


@pytest.mark.parametrize(
    'name, kwargs, message',
    [
        ('resnet18', dict(exits=99), 'exits=99 is impossible'),
        ('resnet18', dict(exits=['layer9']), 'cannot tap'),
        ('resnet18', dict(exits=['layer4']), 'expected a module before the end'),
        ('resnet18', dict(exits=2.5), 'expected a number of exits'),
        ('resnet18', dict(exit_head='slick'), 'exit_head'),
        ('resnet18', dict(exit_head=['slic']), 'exit_head'),
        ('resnet18', dict(exit_pool='min'), 'exit_pool'),
        ('resnet18', dict(num_classes=3), 'cannot be applied'),
        # its branches end at different sizes once strides are gone; its patches reduce 16 times at once
        ('efficientformerv2_s0', dict(exits=1), 'cannot be removed'),
        ('test_vit', dict(exits=1), 'which reduces 16 times'),
    ],
)
def test_a_failed_call_changes_nothing(name, kwargs, message):
    backbone = timm.create_model(name, **(SMALL if name == 'resnet18' else {}))
    images = torch.randn(1, *timm.data.resolve_data_config(model=backbone)['input_size'])
    before = everything_of(backbone, images)
    with pytest.raises(ValueError, match=message):
        create_multi_exit(backbone, small_input=True, **kwargs)
    after = everything_of(backbone, images)
    assert before[0] == after[0] and before[1] == after[1] and before[3] == after[3]
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before[2], after[2]))
    assert torch.equal(before[4], after[4])
    if name == 'resnet18':
        assert create_multi_exit(backbone, exits=4, small_input=True).reduction == 8


def test_exceptions_of_any_kind_change_nothing(monkeypatch):
    from timm_mlcsd.models import backbone as module

    def interrupted(*args):
        raise KeyboardInterrupt

    backbone = timm.create_model('resnet18', **SMALL)
    before = str(backbone)
    monkeypatch.setattr(module, '_make_heads', interrupted)
    with pytest.raises(KeyboardInterrupt):
        create_multi_exit(backbone, small_input=True)
    assert str(backbone) == before and backbone.feature_info[-1]['reduction'] == 32


def test_a_backbone_belongs_to_one_network():
    backbone = timm.create_model('resnet18', **SMALL)
    model = create_multi_exit(backbone, exits=4)
    for again in (backbone, copy.deepcopy(model).backbone, pickle.loads(pickle.dumps(model)).backbone):
        with pytest.raises(ValueError, match=r'^this ResNet is already part of a multi-exit network.*$'):
            create_multi_exit(again, exits=2)
    assert create_multi_exit(copy.deepcopy(backbone), exits=2).num_exits == 2


def test_a_stem_is_cut_once():
    backbone = timm.create_model('resnet18', **SMALL)
    model = create_multi_exit(backbone, exits=4, small_input=True)
    for small_input in (True, False):
        with pytest.raises(ValueError, match=r'have already been removed'):
            create_multi_exit(copy.deepcopy(model.backbone), exits=4, small_input=small_input)


@pytest.mark.parametrize('exits', [['layer4'], 'layer4', ('layer4.1',)])
def test_the_backbones_end_alone_is_one_exit_too_few(exits):
    with pytest.raises(
        ValueError, match=r'expected a module before the end .* name an earlier module too, or use exits=1'
    ):
        create_multi_exit('resnet18', exits=exits, **SMALL)


def test_the_backbones_end_may_be_named_with_another():
    assert create_multi_exit('resnet18', exits=['layer2', 'layer4'], **SMALL).exit_names == ['layer2.1', 'layer4.1']
    assert create_multi_exit('resnet18', exits=1, **SMALL).exit_names == ['layer4.1']
