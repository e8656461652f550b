"""A wrapped backbone is the backbone, bit for bit, with exits on the way."""

import copy

import pytest
import timm
import torch

from timm_mlcsd import MultiExitModel, MultiExitOutput, create_multi_exit, load_backbone
from timm_mlcsd.cost import exit_costs

ARCHS = ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'mobilenetv2_100']


def make(arch='resnet18', **kwargs):
    """A network narrow enough for a test, its BatchNorms as after some training."""
    if arch.startswith('resnet') and arch in ('resnet18', 'resnet34'):
        kwargs.setdefault('channels', (8, 16, 24, 32))
    model = timm.create_model(f'mlcsd_{arch}', num_classes=7, **kwargs)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            m.running_mean.uniform_(-0.1, 0.1)
    return model


@pytest.mark.parametrize('small_input', [False, True])
@pytest.mark.parametrize('exits', [8, 4, 1])
@pytest.mark.parametrize('arch', ARCHS)
def test_stages_in_a_row_are_the_backbone(arch, exits, small_input):
    size = 32 if small_input else 64  # a larger one without the first downsamplings takes a minute
    overlay = dict(input_size=(3, size, size))
    model = make(arch, exits=exits, small_input=small_input, pretrained_cfg_overlay=overlay)
    assert isinstance(model, MultiExitModel) and model.resumable and model.num_exits == exits
    x = torch.randn(2, 3, size, size)
    model.eval()
    with torch.no_grad():
        expected = model.backbone(x)
        output = model.forward_exits(x)
        assert torch.equal(output.logits[-1], expected)
        assert torch.equal(model(x), expected)
        assert [torch.equal(z, y) for (_, z), y in zip(model.iter_exits(x), output.logits)] == [True] * exits
    assert all(z.shape == (2, 7) for z in output.logits)
    side = 4 if small_input else 2
    assert all(f.shape == (2, model.exit_feature_dim, side, side) for f in output.features)

    model.train()
    output = model(x)
    assert isinstance(output, MultiExitOutput)
    assert torch.equal(output.logits[-1], model.backbone(x))


@pytest.mark.parametrize(
    'arch, exits, taps',
    [
        ('resnet18', 8, 'layer1.0 layer1.1 layer2.0 layer2.1 layer3.0 layer3.1 layer4.0 layer4.1'),
        ('resnet50', 8, 'layer1.1 layer1.2 layer2.1 layer2.3 layer3.2 layer3.5 layer4.1 layer4.2'),
        ('resnet50', 4, 'layer1.2 layer2.3 layer3.5 layer4.2'),
        ('resnet101', 8, 'layer1.1 layer1.2 layer2.1 layer2.3 layer3.11 layer3.22 layer4.1 layer4.2'),
        ('mobilenetv2_100', 4, 'blocks.1.1 blocks.2.2 blocks.4.2 blocks.6.0'),
        (
            'mobilenetv2_100',
            8,
            'blocks.1.0 blocks.1.1 blocks.2.1 blocks.2.2 blocks.3.3 blocks.4.2 blocks.5.1 blocks.6.0',
        ),
    ],
)
@pytest.mark.parametrize('small_input', [False, True])
def test_exits_follow_the_resolution_groups(arch, exits, taps, small_input):
    assert timm.create_model(f'mlcsd_{arch}', exits=exits, small_input=small_input).exit_names == taps.split()


def test_other_numbers_of_exits_share_the_macs():
    model = make('resnet50', exits=5)
    costs = exit_costs(model, (3, 224, 224))
    shares = [sum(c.stage_macs for c in costs[: k + 1]) for k in range(5)]
    # a bottleneck block is 1/16 of ResNet50, so a tap is at most half of that from its share
    assert [s / shares[-1] for s in shares] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=0.04)


def test_taps_by_name():
    model = make(exits=['layer1.0', 'layer3'])
    assert model.exit_names == ['layer1.0', 'layer3.1', 'layer4.1']
    assert make(exits=('maxpool',)).exit_names == ['maxpool', 'layer4.1']


@pytest.mark.parametrize(
    'exits, message',
    [
        (0, 'exits=0 is impossible: .* choose 1 to 8'),
        (9, 'exits=9 is impossible: .* choose 1 to 8'),
        (['layer9'], "names 'layer9', which an exit .* cannot tap; choose among conv1"),
        (['layer2', 'layer1'], 'expected different modules in the order'),
        (True, 'expected a number of exits or a list of names'),
        ([], 'expected a number of exits or a list of names'),
        (4.0, 'expected a number of exits or a list of names'),
        ([3], 'expected a number of exits or a list of names'),
        ('layer9', "names 'layer9', which an exit .* cannot tap"),
        (['bn1'], r"overwrites that map in place; tap 'act1'"),
    ],
)
def test_impossible_exits(exits, message):
    with pytest.raises(ValueError, match=message):
        make(exits=exits)


@pytest.mark.parametrize('kwargs', [dict(exit_head='slick'), dict(exit_pool='min')])
def test_unknown_choices_name_the_known_ones(kwargs):
    with pytest.raises(ValueError, match='is unknown; choose one of'):
        make(**kwargs)


def test_exits_upon_exits_are_refused():
    with pytest.raises(ValueError, match='has exits already'):
        create_multi_exit('mlcsd_test_resnet')
    with pytest.raises(ValueError, match='pass pretrained_backbone=True'):
        create_multi_exit('test_resnet', pretrained=True)


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match='Sequential is not a timm model with features: it has no default_cfg'):
        create_multi_exit(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(
    'name',
    [
        'resnet18d',
        'regnetx_002',
        'xception41',
        'test_convnext',
        'test_nfnet',
        'inception_v3',
        'vgg11',
        'hrnet_w18_small',
    ],
)
def test_small_input_keeps_four_times_the_resolution(name):
    with torch.device('meta'):
        plain, small = (create_multi_exit(name, exits=1, small_input=flag) for flag in (False, True))
    before, after = (model.plan.modules[model.plan.taps[-1]].layout for model in (plain, small))
    assert after.channels == before.channels
    # odd sizes and unpadded convs: 299 pixels end at 8, and at 35
    assert after.width == {'inception_v3': 35, 'xception41': 38}.get(name, 4 * before.width)


@pytest.mark.parametrize(
    'name, message',
    [
        ('test_vit', "at most 4 times, got 'patch_embed.proj', which reduces 16 times"),
        ('tresnet_m', 'expected strided convs or pools at the beginning of the backbone, got none'),
        ('efficientformerv2_s0', 'the first two downsamplings of this backbone cannot be removed'),
    ],
)
def test_small_input_where_it_makes_no_sense(name, message):
    with pytest.raises(ValueError, match=message):
        create_multi_exit(name, exits=1, small_input=True)


class WithFlag(timm.models.resnet.ResNet):
    """ResNet whose forward passes more than the images to ``forward_features``."""

    def forward_features(self, x, flag=False):
        return super().forward_features(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x, flag=True))


def test_small_input_of_a_backbone_that_passes_flags():
    backbone = timm.create_model('test_resnet', num_classes=5)
    backbone.__class__ = WithFlag
    model = create_multi_exit(backbone, exits=3, small_input=True)
    assert [f.shape[-1] for f in model.train()(torch.randn(2, 3, 32, 32)).features] == [4, 4, 4]


def test_nothing_behind_the_last_pulled_exit_runs():
    model = make().eval()
    ran = []
    for name in ('layer1.1', 'layer2.0', 'layer4.1'):
        model.backbone.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    exits = model.iter_exits(torch.randn(1, 3, 32, 32))
    next(exits), next(exits)
    assert ran == ['layer1.1']


def test_eval_runs_no_exit_head_but_the_last():
    model = make().eval()
    for head in model.heads:
        head.register_forward_hook(lambda *_: pytest.fail('an exit head ran'))
    model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize('head', ['slic', 'slic_dw', 'conv1x1', 'bottleneck'])
@pytest.mark.parametrize('pool', ['max', 'avg'])
def test_heads_share_one_feature_shape_and_train(head, pool):
    model = make(exit_head=head, exit_pool=pool, small_input=True)
    output = model(torch.randn(4, 3, 32, 32))
    assert {tuple(f.shape) for f in output.features} == {(4, 32, 4, 4)}
    sum(z.square().sum() for z in output.logits).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.heads.parameters())


def test_pools_differ_as_they_say():
    head = make(exit_pool='max').heads[0].eval()
    x = torch.randn(2, 8, 16, 16)
    logits, feature = head(x)
    torch.testing.assert_close(logits, head.fc(feature.amax((2, 3))))
    head = make(exit_pool='avg').heads[0].eval()
    logits, feature = head(x)
    torch.testing.assert_close(logits, head.fc(feature.mean((2, 3))))


def test_timm_contract():
    model = make(drop_rate=0.1, in_chans=1)
    plain = timm.create_model('resnet18', num_classes=7, channels=(8, 16, 24, 32), in_chans=1)
    x = torch.randn(2, 1, 64, 64)
    assert (model.num_features, model.head_hidden_size, model.num_classes, model.in_chans) == (32, 32, 7, 1)
    assert model.get_classifier() is model.backbone.fc
    model.eval()
    features = model.forward_features(x)
    assert features.shape == plain.forward_features(x).shape
    torch.testing.assert_close(model.forward_head(features), model(x), rtol=0, atol=0)
    assert model.forward_head(features, pre_logits=True).shape == (2, 32)
    assert [f.shape for f in model.forward_intermediates(x, intermediates_only=True)] == [
        f.shape for f in plain.forward_intermediates(x, intermediates_only=True)
    ]
    model.reset_classifier(3)
    assert {z.shape for z in model.forward_exits(x).logits} == {(2, 3)}
    model.reset_classifier(0)
    assert {z.shape for z in model.forward_exits(x).logits} == {(2, 32)}
    assert model.num_classes == 0


def test_default_cfg_is_the_backbones_without_its_weights():
    cfg, plain = make().default_cfg, timm.create_model('resnet18').default_cfg
    assert cfg['architecture'] == 'mlcsd_resnet18'
    assert (cfg['first_conv'], cfg['classifier']) == ('backbone.conv1', 'backbone.fc')
    assert not any(cfg.get(key) for key in ('url', 'hf_hub_id', 'file'))
    assert (
        create_multi_exit('resnet50').default_cfg['crop_pct'] == timm.create_model('resnet50').default_cfg['crop_pct']
    )
    assert all(cfg[key] == plain[key] for key in ('mean', 'std', 'input_size', 'interpolation', 'crop_pct'))


def test_heads_belong_to_the_layer_group_of_their_tap():
    model = make('resnet50')
    group = model.group_matcher()
    for k, tap in enumerate(model.exit_names[:-1]):
        assert group(f'heads.{k}.fc.weight') == group(f'backbone.{tap}.conv3.weight')
    assert group('backbone.conv1.weight') == 0
    assert group('backbone.fc.weight') >= group('backbone.layer4.2.conv3.weight')


def test_group_matcher_knows_modules_and_pools():
    from timm.models import group_modules

    model = make(exits=('maxpool', 'layer3'))
    group = model.group_matcher()
    assert group('heads.0.fc.weight') == group('backbone.bn1.weight') == 0
    modules = {name for names in group_modules(model, model.group_matcher()).values() for name in names}
    assert {'backbone.conv1', 'heads.1.fc', 'backbone.layer4.1.conv2'} <= modules


def test_layer_decay_gives_deeper_layers_more():
    from timm.optim import create_optimizer_v2

    model = make()
    optimizer = create_optimizer_v2(model, opt='sgd', lr=1.0, layer_decay=0.5)
    scale = {id(p): g['lr_scale'] for g in optimizer.param_groups for p in g['params']}
    named = {n: scale[id(p)] for n, p in model.named_parameters()}
    assert named['backbone.conv1.weight'] < named['heads.0.fc.weight'] < named['heads.6.fc.weight']


def test_gradient_checkpointing_changes_no_gradient():
    model, x = make().eval(), torch.randn(2, 3, 64, 64)  # eval-mode norms: running statistics update once, not twice
    model.train()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
    blocks_run = []
    model.backbone.layer2[1].register_forward_pre_hook(lambda *_: blocks_run.append(1))
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        sum(z.sum() for z in model(x).logits).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert len(blocks_run) == 3  # once without; forward and recomputation with
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_pretrained_backbone_keeps_its_accuracy(tmp_path):
    plain = timm.create_model('resnet18', num_classes=7, channels=(8, 16, 24, 32)).eval()
    path = str(tmp_path / 'weights.pth')
    torch.save(plain.state_dict(), path)
    overlay = dict(file=path, num_classes=7)
    kwargs = dict(num_classes=7, channels=(8, 16, 24, 32), pretrained_cfg_overlay=overlay)
    model = create_multi_exit('resnet18', pretrained_backbone=True, **kwargs).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), plain(x))


def test_small_input_with_pretrained_weights_warns_and_keeps_all_but_the_stem(tmp_path, caplog):
    plain = timm.create_model('resnet18', num_classes=7, channels=(8, 16, 24, 32))
    path = str(tmp_path / 'weights.pth')
    torch.save(plain.state_dict(), path)
    overlay = dict(file=path, num_classes=7)
    model = create_multi_exit(
        'resnet18',
        pretrained_backbone=True,
        small_input=True,
        num_classes=7,
        channels=(8, 16, 24, 32),
        pretrained_cfg_overlay=overlay,
    )
    assert 'stem conv gets new random weights' in caplog.text
    assert model.backbone.conv1.weight.shape == (64, 3, 3, 3)
    state, loaded = plain.state_dict(), model.backbone.state_dict()
    assert all(torch.equal(state[name], loaded[name]) for name in state if name != 'conv1.weight')


def test_instance_is_wrapped_not_copied():
    plain = timm.create_model('resnet18', num_classes=7, channels=(8, 16, 24, 32))
    assert create_multi_exit(plain, exits=4).backbone is plain
    with pytest.raises(ValueError, match=r"\['num_classes'\] cannot be applied to an existing backbone"):
        create_multi_exit(plain, exits=4, num_classes=3)


def test_weights_go_from_plain_to_multi_exit_and_back(tmp_path):
    plain = timm.create_model('resnet18', num_classes=7, channels=(8, 16, 24, 32)).eval()
    x = torch.randn(2, 3, 64, 64)
    copies = [copy.deepcopy(plain) for _ in range(2)]
    for i, source in enumerate((plain, create_multi_exit(copies[0], exits=1), create_multi_exit(copies[1], exits=8))):
        path = tmp_path / f'{i}.pth'
        torch.save(dict(state_dict=source.state_dict()), path)
        for weights in (source.state_dict(), path):
            for target in (make(), timm.create_model('resnet18', num_classes=7, channels=(8, 16, 24, 32))):
                load_backbone(target, weights)
                assert torch.equal(target.eval()(x), plain(x))
    averaged = {name: t * 2 for name, t in plain.state_dict().items()}
    torch.save(dict(state_dict=plain.state_dict(), state_dict_ema=averaged), path)
    for use_ema, weights in ((False, plain.state_dict()), (True, averaged)):
        load_backbone(target, path, use_ema=use_ema)
        assert torch.equal(target.state_dict()['fc.weight'], weights['fc.weight'])
    with pytest.raises(ValueError, match='weights do not fit the backbone'):
        load_backbone(make('resnet50'), plain.state_dict())
    with pytest.raises(ValueError, match='cannot be read as weights'):
        load_backbone(plain, tmp_path / 'nothing.pth')


@pytest.mark.parametrize('value', ['false', 0, None])
def test_small_input_is_true_or_false(value):
    plain = timm.create_model('resnet18', channels=(8, 8, 8, 8))
    with pytest.raises(ValueError, match='expected True or False'):
        create_multi_exit(plain, exits=2, small_input=value)
    create_multi_exit(plain, exits=2)  # unchanged by the try


def test_too_small_images_are_named():
    with pytest.raises(ValueError, match=r'16x40 is too small: the network reduces 32 times.*small_input=True'):
        make().check_input_size(16, 40)
    make(small_input=True).check_input_size(8, 8)


def test_construction_leaves_the_backbone_untouched():
    torch.manual_seed(1)
    plain = timm.create_model('mobilenetv2_100')
    before = {n: t.clone() for n, t in plain.state_dict().items()}
    create_multi_exit(plain)
    assert plain.training and not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert all(torch.equal(t, before[n]) for n, t in plain.state_dict().items())


@pytest.mark.parametrize('mode', [torch.inference_mode, torch.no_grad])
def test_can_be_made_without_autograd(mode):
    with mode():
        model = make(small_input=True).eval()
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
        assert exit_costs(model, (3, 32, 32))[-1].depth == 18


def test_compiles_in_one_graph():
    model = make(small_input=True).eval()
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model.forward_exits, backend='aot_eager', fullgraph=True)
    for z, expected in zip(compiled(x).logits, model.forward_exits(x).logits):
        torch.testing.assert_close(z, expected)


def test_heads_that_are_left_out_are_told(caplog):
    load_backbone(make(), make(exits=1).state_dict())
    load_backbone(make(exits=1), make().state_dict())  # has no heads to load
    assert caplog.text == ''
    load_backbone(make(), make().state_dict())
    assert 'weights of exit heads out, so the heads stay as they are' in caplog.text
