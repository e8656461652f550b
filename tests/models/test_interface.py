"""What plain timm models offer, the multi-exit network offers: attributes, methods, tracing, resizing, pruning."""

import copy

import pytest
import timm
import torch
import torchvision.models.feature_extraction as torchvision_extraction
from timm.layers import create_feature_extractor
from timm.models import FeatureListNet, get_model_input_config

import timm_mlcsd
from timm_mlcsd import MLCSDLoss, MultiExitOutput, create_multi_exit
from timm_mlcsd.cost import exit_costs
from timm_mlcsd.models.contract import DELEGATED

FAMILIES = ['resnet18', 'mobilenetv3_small_050', 'test_convnext', 'test_vit', 'deit_tiny_distilled_patch16_224']
FAMILIES += ['swin_s3_tiny_224', 'vit_tiny_patch16_dinov3_qkvb', 'levit_128s', 'sequencer2d_s', 'repvit_m1']

# public, but not of the network with exits: it is reached at model.backbone
EXCEPTIONS = {
    'init_weights': 'would make the backbone new and leave the exits trained',
    'fix_init_weight': 'part of init_weights',
    'weight_init_mode': 'part of init_weights',
    'fix_init': 'part of init_weights',
    'head_init_scale': 'part of init_weights',
    'load_pretrained': "reads the backbone's original files: pretrained_backbone=True, load_backbone",
    'as_sequential': 'the backbone in other modules',
    'fuse': "merges the backbone's layers for good",
    'stage_ends': 'notes of the constructor',
    'num_layers': 'notes of the constructor',
    'use_conv': 'notes of the constructor',
    'stem_feat_idx': 'notes of the constructor',
    'attn_pool': 'None, or a module of the backbone',
    'reg_token': 'None, or a parameter of the backbone',
    'pos_embed': 'None, or a parameter of the backbone',
    'cls_embed': 'notes of the constructor',
    'rope_mixed': 'notes of the constructor',
    'patch_drop': 'None, or a module of the backbone',
}


@pytest.mark.parametrize('name', FAMILIES)
def test_public_names_of_plain_models(name):
    with torch.device('meta'):
        plain = timm.create_model(name)
        model = timm.create_model(f'mlcsd_{name}')
    inside = {*plain._modules, *plain._parameters, *plain._buffers, *dir(torch.nn.Module())}
    public = {n for n in dir(plain) if not n.startswith('_') and n not in inside}
    missing = {n for n in public if not hasattr(model, n)}
    assert missing <= set(EXCEPTIONS), missing - set(EXCEPTIONS)
    for attribute in public - missing:
        assert callable(getattr(model, attribute)) == callable(getattr(plain, attribute)), attribute
        value = getattr(plain, attribute)
        if attribute in DELEGATED and isinstance(value, (int, float, str, tuple, list)):
            assert getattr(model, attribute) == value
    optional = {*DELEGATED, 'group_matcher', 'prune_intermediate_layers', 'set_input_size'}
    assert {n for n in optional if hasattr(model, n)} == {n for n in optional if hasattr(plain, n)}


def test_feature_dim_is_the_axis_that_timm_means():
    with torch.device('meta'):
        assert timm.create_model('mlcsd_sequencer2d_s').feature_dim == -1
        assert not hasattr(timm.create_model('mlcsd_resnet18'), 'feature_dim')


@pytest.mark.parametrize('name', ['resnet18', 'test_convnext', 'mobilenetv3_small_050', 'levit_128s'])
def test_symbolic_tracing(name):
    model = timm.create_model(f'mlcsd_{name}').eval()
    node = f'backbone.{model.feature_info[-1]["module"]}'
    check_traced(model, torchvision_extraction.create_feature_extractor(model, [node]), node)


@pytest.mark.parametrize('name', ['test_vit', 'test_vit_relpos', 'swin_s3_tiny_224'])
def test_symbolic_tracing_with_timms_leaf_functions(name):
    # without them torchvision fails on the plain ones too
    model = timm.create_model(f'mlcsd_{name}').eval()
    node = f'backbone.{model.feature_info[-1]["module"]}'
    check_traced(model, create_feature_extractor(model, [node]), node)


def check_traced(model, extractor, node):
    images, seen = torch.randn(2, *model.probe_size), []
    model.get_submodule(node).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(images)
        assert torch.equal(extractor.eval()(images)[node], seen[0])
        assert extractor.train()(images)[node].shape == seen[0].shape


def test_a_trace_in_training_has_all_exits():
    model = timm.create_model('mlcsd_resnet18', exits=3, num_classes=5, channels=(8, 16, 24, 32)).train()
    images = torch.randn(2, 3, 64, 64)
    state = copy.deepcopy(model.state_dict())
    expected = model(images)
    model.load_state_dict(state)
    output = torch.fx.symbolic_trace(model)(images)
    assert isinstance(output, MultiExitOutput)
    for ours, theirs in zip((*output.logits, *output.features), (*expected.logits, *expected.features)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize('name', ['resnet18', 'test_vit', 'test_convnext', 'swin_s3_tiny_224', 'vgg11', 'levit_128s'])
def test_no_pool_and_no_classes(name):
    kwargs = dict(num_classes=0, global_pool='')
    torch.manual_seed(0)
    plain = timm.create_model(name, **kwargs).eval()
    model = timm.create_model(f'mlcsd_{name}', exits=3, **kwargs).eval()
    model.backbone.load_state_dict(plain.state_dict())
    images = torch.randn(2, *model.probe_size)
    with torch.no_grad():
        expected = plain(images)
        assert torch.equal(model(images), expected)
        output = model.forward_exits(images)
        assert torch.equal(output.logits[-1], expected)
        # the other exits have a pool of their own
        assert {z.shape for z in output.logits[:-1]} == {(2, model.exit_feature_dim)}
        assert torch.equal([z for _, z in model.iter_exits(images)][-1], expected)
        model = timm.create_model(f'mlcsd_{name}', exits=3).eval()
        model.reset_classifier(0, '')
        assert model(images).shape == expected.shape


@pytest.mark.parametrize('name', ['mlcsd_resnet18', 'mlcsd_test_vit', 'mlcsd_msdnet', 'mlcsd_ranet'])
def test_no_pool_but_classes_are_refused(name):
    for num_classes in (None, 5):
        with pytest.raises(ValueError, match=r"global_pool=''.*num_classes=0"):
            timm.create_model(name, num_classes=num_classes, global_pool='')
    model = timm.create_model(name, num_classes=5)
    with pytest.raises(ValueError, match=r"global_pool=''.*num_classes=0"):
        model.reset_classifier(3, '')
    assert model.num_classes == 5


@pytest.mark.parametrize('name', ['mlcsd_msdnet', 'mlcsd_ranet'])
def test_native_networks_without_a_pool(name):
    model = timm.create_model(name, num_classes=0, global_pool='').eval()
    images = torch.randn(2, 3, 32, 32)
    output = model.forward_exits(images)
    assert all(torch.equal(z, f) and z.ndim == 4 for z, f in zip(*output))
    assert torch.equal(model(images), model.forward_features(images))
    model.reset_classifier(5, 'avg')
    assert model(images).shape == (2, 5)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)


@pytest.mark.parametrize('name', ['mlcsd_msdnet', 'mlcsd_ranet', 'mlcsd_resnet18', 'mlcsd_test_vit'])
@pytest.mark.parametrize('device, dtype', [('cpu', torch.bfloat16), ('meta', torch.float64)])
def test_device_and_dtype(name, device, dtype):
    model = timm.create_model(name, num_classes=3, device=device, dtype=dtype).eval()
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    assert {t.dtype for t in model.parameters()} == {dtype} and {t.device.type for t in tensors} == {device}
    logits = model.forward_exits(torch.zeros(2, *model.probe_size, device=device, dtype=dtype)).logits
    assert {z.dtype for z in logits} == {dtype} and {z.device.type for z in logits} == {device}


@pytest.mark.parametrize(
    'name, size',
    [('test_vit', 96), ('swin_s3_tiny_224', 112), ('vit_tiny_patch16_dinov3_qkvb', 128), ('test_vit_relpos', 96)],
)
def test_set_input_size(name, size, tmp_path):
    model = timm.create_model(f'mlcsd_{name}', exits=3, num_classes=5).eval()
    plain = timm.create_model(name, num_classes=5).eval()
    plain.load_state_dict(model.backbone.state_dict())
    taps, heads = model.exit_names, list(model.heads)
    with torch.no_grad():
        list(model.iter_exits(torch.randn(2, *model.probe_size)))  # stages for the old size
    before = exit_costs(model, model.probe_size)[-1].macs
    for m in (model, plain):
        m.set_input_size(img_size=(size, size))
    assert model.probe_size == (3, size, size) == get_model_input_config(model)['input_size']
    assert model.exit_names == taps and list(model.heads) == heads and model.resumable
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = plain(images)
        assert torch.equal(model(images), expected)
        assert torch.equal(model.forward_exits(images).logits[-1], expected)
        assert torch.equal([z for _, z in model.iter_exits(images)][-1], expected)
    assert exit_costs(model, model.probe_size)[-1].macs < before
    assert len({f.shape[2:] for f in model.forward_exits(images).features}) <= 2
    model.train()(images).logits[0].sum().backward()
    timm_mlcsd.save_pretrained(model, tmp_path / 'net')
    again = timm_mlcsd.from_pretrained(tmp_path / 'net')
    with torch.no_grad():
        assert again.probe_size == model.probe_size and torch.equal(again(images), expected)


def test_an_input_size_that_does_not_exist():
    model = timm.create_model('mlcsd_resnet18')
    with pytest.raises(AttributeError):
        model.set_input_size(img_size=96)


@pytest.mark.parametrize(
    'name, indices, prune_head',
    [
        ('resnet18', [0, 2], True),
        ('test_vit', [0, 3], True),
        ('test_vit', [0, 3], False),
        ('test_vit_relpos', [1, 3], False),
    ],
)
def test_pruning(name, indices, prune_head):
    model = timm.create_model(f'mlcsd_{name}', num_classes=5).eval()
    plain = timm.create_model(name, num_classes=5).eval()
    plain.load_state_dict(model.backbone.state_dict())
    exits, number = model.exit_names, model.num_exits
    taken = [m.prune_intermediate_layers(indices, prune_head=prune_head) for m in (model, plain)]
    assert taken[0] == taken[1]
    images = torch.randn(2, *model.probe_size)
    with torch.no_grad():
        assert torch.equal(model(images), plain(images))
        output = model.forward_exits(images)
        assert torch.equal(output.logits[-1], plain(images))
    assert 1 < model.num_exits < number and model.exit_names[:-1] == exits[: model.num_exits - 1]
    assert len(model.heads) == model.num_exits - 1 == len(model.exit_args['exits'])
    assert model.resumable and len(exit_costs(model, model.probe_size)) == model.num_exits
    assert {n.partition('.')[0] for n in model.state_dict()} == {'backbone', 'heads'}
    assert all(g >= 0 for g in map(model.group_matcher(), (n for n, _ in model.named_parameters())))
    if not prune_head:
        criterion = MLCSDLoss(model.num_exits, model.exit_feature_dim)
        criterion(model.train()(images), torch.tensor([0, 1])).backward()


def test_pruning_may_leave_one_exit_and_keeps_what_is_frozen():
    model = timm.create_model('mlcsd_test_vit', exits=3, num_classes=5)
    model.freeze_backbone()
    model.prune_intermediate_layers([0], prune_head=False)
    assert model.num_exits == 1 and model.exit_args['exits'] == 1
    model.freeze_backbone(False)
    assert all(p.requires_grad for p in model.parameters())


def test_intermediate_layers_of_a_vit():
    model = timm.create_model('mlcsd_test_vit', num_classes=5).eval()
    images = torch.randn(2, *model.probe_size)
    with torch.no_grad():
        ours = model.get_intermediate_layers(images, n=2, reshape=True)
        theirs = model.backbone.get_intermediate_layers(images, n=2, reshape=True)
    assert len(ours) == 2 and all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize('name', ['levit_128s', 'deit_tiny_distilled_patch16_224', 'pit_ti_distilled_224'])
def test_training_with_distillation_tokens(name):
    model = timm.create_model(f'mlcsd_{name}', exits=3, num_classes=5)
    model.set_distilled_training(True)
    assert model.backbone.distilled_training and model.distilled_training
    images = torch.randn(2, *model.probe_size)
    output = model.train()(images)
    assert [z.shape for z in output.logits] == [(2, 5)] * 3
    output.logits[-1].sum().backward()
    assert model.backbone.head_dist is None or all(p.grad is not None for p in model.backbone.head_dist.parameters())
    with torch.no_grad():
        assert torch.equal(model.eval()(images), model.forward_exits(images).logits[-1])


def test_features_only_keeps_a_wrapped_backbone_whole():
    model = timm.create_model('mlcsd_resnet18', features_only=True, out_indices=(1, 2))
    assert not isinstance(model, FeatureListNet)
    assert [f.shape[1] for f in model(torch.randn(1, 3, 64, 64))] == [64, 128]


def test_a_backbone_that_is_made_first_keeps_its_own_arguments():
    backbone = timm.create_model('test_vit', num_classes=0, global_pool='')
    model = create_multi_exit(backbone, exits=2).eval()
    images = torch.randn(2, *model.probe_size)
    with torch.no_grad():
        assert torch.equal(model(images), model.forward_exits(images).logits[-1])


def test_weights_of_a_plain_backbone_are_named():
    plain = timm.create_model('test_resnet', num_classes=5)
    model = timm.create_model('mlcsd_test_resnet', num_classes=5, exits=3)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match='load those of a plain backbone with'):
            model.load_state_dict(plain.state_dict(), strict=strict)
    assert not model.load_state_dict({}, strict=False).unexpected_keys


def test_a_file_that_holds_no_weights(tmp_path):
    path = tmp_path / 'pointer.pth'
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n')
    with pytest.raises(ValueError, match='expected a file of weights') as error:
        timm_mlcsd.load_backbone(timm.create_model('test_resnet'), path)
    assert 'weights_only' not in str(error.value)


def test_jit_trace():
    model = timm.create_model('mlcsd_test_resnet', num_classes=5, exits=3).eval()
    images = torch.randn(2, 3, 64, 64)
    traced = torch.jit.trace(model, images)
    assert torch.equal(traced(images), model(images))
