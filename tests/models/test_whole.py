"""Stages in a row are the backbone's own call, or the network says that they are not and runs as a whole."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
from timm.models.resnet import BasicBlock, ResNet

from timm_mlcsd import create_multi_exit
from timm_mlcsd.adaptive import AdaptiveModel, ExitPolicy
from timm_mlcsd.cost import exit_costs


def make_backbone(cls=ResNet):
    backbone = cls(BasicBlock, [1, 1, 1, 1], num_classes=5, channels=(8, 8, 8, 8))
    backbone.default_cfg = backbone.pretrained_cfg = timm.create_model('resnet18').default_cfg | dict(
        input_size=(3, 64, 64)
    )
    return backbone


def randomise(backbone):
    for m in backbone.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            m.running_mean.uniform_(-0.1, 0.1)
    return backbone


class Scaled(ResNet):
    def forward(self, x):
        return super().forward(x) * 2


class Normalised(ResNet):
    def forward(self, x):
        return super().forward((x - 0.5) / 0.5)


class Flipped(ResNet):
    def forward(self, x):
        return (super().forward(x) + super().forward(x.flip(-1))) / 2


class WithoutFeatures(ResNet):
    def forward(self, x):
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        return self.fc(self.global_pool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))) + 1


class WrittenInPlace(ResNet):
    def forward(self, x):
        return super().forward(x).mul_(2)


def with_forward_hook(backbone):
    backbone.register_forward_hook(lambda module, args, output: output * 2)


def with_pre_hook(backbone):
    backbone.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def with_kwargs_pre_hook(backbone):
    backbone.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)


def with_instance_forward(backbone):
    forward = backbone.forward
    backbone.forward = lambda x: forward(x) + 1


def with_instance_features(backbone):
    forward_features = backbone.forward_features
    backbone.forward_features = lambda x: forward_features(x) + 1


def with_hook_on_a_stage(backbone):
    backbone.layer2.register_forward_hook(lambda module, args, output: output * 2)


def with_writing_hook_on_a_stage(backbone):
    def write(module, args, output):
        output.data.mul_(2)  # which no tensor's version tells of

    backbone.layer2.register_forward_hook(write)


def with_pre_hook_on_a_stage(backbone):
    backbone.layer3.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def with_instance_forward_of_a_stage(backbone):
    forward = backbone.layer3.forward
    backbone.layer3.forward = lambda x: forward(x) * 2


def with_a_block_more(backbone):
    backbone.layer2.append(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))


CLASSES = [Scaled, Normalised, Flipped, WithoutFeatures, WrittenInPlace]
CHANGES = [with_forward_hook, with_pre_hook, with_kwargs_pre_hook, with_instance_forward, with_hook_on_a_stage]
CHANGES += [
    with_instance_features,
    with_pre_hook_on_a_stage,
    with_instance_forward_of_a_stage,
    with_writing_hook_on_a_stage,
]


class PadsOddImages(timm.models.resnet.ResNet):
    """Does more than its chain for images of some sizes."""

    def forward_features(self, x):
        padding = -x.shape[-1] % 32
        return super().forward_features(torch.nn.functional.pad(x, (padding, 0)) if padding else x)


@pytest.mark.parametrize('training', [False, True])
def test_a_forward_that_depends_on_the_size(training):
    backbone = timm.create_model('resnet18', num_classes=3, channels=(8, 8, 8, 8))
    backbone.__class__ = PadsOddImages
    model = create_multi_exit(backbone, exits=3, img_size=64).eval()
    same, odd = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 70)
    assert model.resumable
    assert torch.equal(model.forward_exits(same).logits[-1], model(same))
    for module in model.modules():
        module.training = training and not isinstance(module, nn.BatchNorm2d)
    assert torch.equal(model.forward_exits(odd).logits[-1], backbone(odd))
    # training runs such a backbone as a whole, whatever the size
    assert model.resumable if training else 'differs' in model.why_not_resumable


def check_runs_as_whole(model, reason):
    images = torch.randn(2, 3, 64, 64)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images), model.forward_exits(images).logits[-1])
    assert not model.resumable and reason in model.why_not_resumable
    with pytest.raises(ValueError, match='stages cannot run one by one'):
        next(model.iter_exits(images))
    with pytest.raises(ValueError, match='cannot stop at an exit'):
        AdaptiveModel(model, ExitPolicy([0.5] * (model.num_exits - 1)))
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    output = model(images)
    assert torch.equal(output.logits[-1], model.backbone(images))
    sum(z.square().sum() for z in output.logits).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('cls', CLASSES, ids=lambda c: c.__name__)
def test_an_overridden_forward(cls):
    model = create_multi_exit(randomise(make_backbone(cls)), exits=3)
    check_runs_as_whole(model, "the backbone's forward does more than its forward_features")


@pytest.mark.parametrize('change', CHANGES, ids=lambda f: f.__name__)
def test_what_hangs_on_the_backbone(change):
    backbone = randomise(make_backbone())
    change(backbone)
    model = create_multi_exit(backbone, exits=2)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), model.forward_exits(images).logits[-1])
        if model.resumable:  # a stage that is called whole takes its hooks along
            assert torch.equal([z for _, z in model.iter_exits(images)][-1], model(images))
        else:
            assert model.why_not_resumable


@pytest.mark.parametrize('change', [*CHANGES, with_a_block_more], ids=lambda f: f.__name__)
def test_what_comes_later(change):
    model = create_multi_exit(randomise(make_backbone()), exits=3)
    assert model.resumable
    change(model.backbone)
    check_runs_as_whole(model, 'which' if change is not with_a_block_more else 'other modules')


def test_a_copy_of_a_whole_runs_its_own_backbone():
    model = create_multi_exit(randomise(make_backbone(Scaled)), exits=3).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_exits(images).logits
        again = copy.deepcopy(model)
        for p in model.parameters():
            p.zero_()
        assert all(torch.equal(a, b) for a, b in zip(again.forward_exits(images).logits, expected))


def test_stages_come_back_when_the_hook_goes():
    model = create_multi_exit(make_backbone(), exits=3)
    handle = model.backbone.register_forward_hook(lambda *args: None)
    assert not model.resumable
    handle.remove()
    assert model.resumable and len(list(model.eval().iter_exits(torch.randn(1, 3, 64, 64)))) == 3


class SideChannel(ResNet):
    """Passes a map around the modules: a chain for who watches the modules, not for an image that leaves early."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        first, last = self.layer1[0], self.layer4[0]
        first.register_forward_hook(lambda module, args, output: setattr(first, 'mean', output.mean((1, 2, 3))))
        last.register_forward_hook(lambda module, args, output: output + last.first[0].mean[:, None, None, None])
        last.first = [first]


def test_stages_are_compared_on_real_images_of_which_one_leaves():
    model = create_multi_exit(randomise(make_backbone(SideChannel)), exits=3).eval()
    assert not model.resumable and model.why_not_resumable.startswith('its stages ')
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), model.forward_exits(images).logits[-1])


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_vit_relpos'])
def test_comparing_leaves_nothing_behind(name):
    model = timm.create_model(f'mlcsd_{name}').train()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert model.resumable
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_on_the_meta_device():
    with torch.device('meta'):
        model = timm.create_model('mlcsd_resnet18', exits=4)
    assert model.resumable and exit_costs(model, (3, 64, 64))[0].macs > 0


def test_a_hook_that_comes_to_a_cut_graph():
    model = timm.create_model('mlcsd_test_vit_relpos', exits=2, num_classes=5).eval()
    images = torch.randn(2, *model.probe_size)
    with torch.no_grad():
        list(model.iter_exits(images))
        for module in (model.backbone, model.backbone.blocks[1]):
            module.register_forward_hook(lambda module, args, output: output * 2)
            assert torch.equal([z for _, z in model.iter_exits(images)][-1], model(images))


def test_a_hook_that_a_cut_graph_does_not_call_is_told(caplog):
    model = timm.create_model('mlcsd_test_vit_relpos', exits=2, num_classes=5).eval()
    assert model.resumable and 'forward hooks' not in caplog.text
    model.backbone.blocks[0].register_forward_hook(lambda module, args, output: None)
    assert model.resumable and "'blocks.0' of the backbone has forward hooks" in caplog.text


def test_checkpointing_of_a_whole_changes_no_gradient():
    model = create_multi_exit(make_backbone(Scaled), exits=3)
    images, gradients = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing == model.backbone.grad_checkpointing == enable
        model.zero_grad()
        sum(z.square().sum() for z in model.train()(images).logits).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


class DropsInTraining(ResNet):
    def forward_features(self, x):
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        x = x * 0 if self.training else x
        return self.layer4(self.layer3(self.layer2(x)))


class StageThatDrops(nn.Sequential):
    def forward(self, x):
        return super().forward(x * 0 if self.training else x)


def stage_that_drops():
    backbone = make_backbone()
    backbone.layer2.__class__ = StageThatDrops
    return backbone


@pytest.mark.parametrize('make', [lambda: make_backbone(DropsInTraining), stage_that_drops])
def test_what_other_code_does_in_training_only(make):
    model = create_multi_exit(randomise(make()), exits=3).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert model.resumable and torch.equal(model.forward_exits(x).logits[-1], model.backbone(x))
        model.train()
        output = model(x)
        assert torch.equal(output.logits[-1], model.backbone(x))
        assert torch.equal(output.logits[-1][0], output.logits[-1][1])  # nothing of the images is left
        with pytest.raises(RuntimeError, match=r'may do something else in training mode.*call model.eval'):
            model.run_stage(0, x)


class StageThatDoubles(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


def double_by_class(backbone):
    backbone.layer2.__class__ = StageThatDoubles


def double_by_module(backbone):
    backbone.layer2 = StageThatDoubles(*backbone.layer2)


@pytest.mark.parametrize('change', [double_by_class, double_by_module])
def test_a_stage_that_is_replaced_after_the_comparison(change):
    model = create_multi_exit(randomise(make_backbone()), exits=3).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert model.resumable and torch.equal(model.forward_exits(x).logits[-1], model.backbone(x))
        change(model.backbone)
        assert torch.equal(model.forward_exits(x).logits[-1], model.backbone(x))
        assert not model.resumable


def test_a_verdict_is_repeated_after_a_change():
    backbone = randomise(make_backbone())
    model = create_multi_exit(backbone, exits=3).eval()
    double_by_class(backbone)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(2):
            assert not model.resumable
            assert torch.equal(model.forward_exits(x).logits[-1], backbone(x))
            backbone.drop_rate += 0.1  # a setting without effect in evaluation
            assert torch.equal(model.forward_exits(x).logits[-1], backbone(x))
