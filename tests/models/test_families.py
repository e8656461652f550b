"""Every kind of backbone: chains and others, NCHW, NHWC and tokens, isotropic and hierarchical."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch.nn.utils.prune import l1_unstructured

from timm_mlcsd import MLCSDLoss, create_multi_exit
from timm_mlcsd.cost import exit_costs

CHAINS = ['test_convnext', 'test_mambaout', 'test_nfnet', 'test_efficientnet', 'regnetx_002', 'gmlp_ti16_224']
CHAINS += ['pvt_v2_b0', 'test_vit', 'deit_tiny_distilled_patch16_224']
# rotary positions, tuples, several streams, windows: cut out of the exported graph
GRAPHS = ['vit_tiny_patch16_dinov3_qkvb', 'xcit_nano_12_p8_224', 'tnt_s_legacy_patch16_224', 'hiera_tiny_224']
GRAPHS += ['levit_128s', 'cspresnet50', 'selecsls42', 'crossvit_tiny_240', 'test_vit_relpos']
# as many blocks as a test needs, because the export takes time for each
FEW_BLOCKS = {name: dict(depth=4) for name in GRAPHS[:3]}


def make(name, **kwargs):
    torch.manual_seed(0)
    model = create_multi_exit(name, num_classes=5, **FEW_BLOCKS.get(name, {}), **kwargs).eval()
    return model, torch.randn(3, *model.probe_size)


@pytest.mark.parametrize('name', CHAINS + GRAPHS)
def test_stages_in_a_row_are_the_backbone(name):
    model, images = make(name)
    assert model.resumable and model.why_not_resumable is None
    with torch.no_grad():
        expected = model.forward_exits(images)
        assert torch.equal(expected.logits[-1], model.backbone(images))
        assert torch.equal(model(images), expected.logits[-1])
        for batch in (images, images[:1]):  # what is cut for one batch runs for another
            state = batch
            for k in range(model.num_exits):
                state = model.run_stage(k, state)
                assert all(t.shape[0] == len(batch) for t in (state if isinstance(state, tuple) else [state]))
                logits, feature = model.run_head(k, state)
                if len(batch) == 3:
                    assert torch.equal(logits, expected.logits[k]) and torch.equal(feature, expected.features[k])
                else:
                    # kernels may sum in another order for another batch: a few float32 roundings
                    torch.testing.assert_close(logits, expected.logits[k][:1], rtol=1e-4, atol=1e-4)
    assert {f.shape[1] for f in expected.features} == {model.exit_feature_dim}


@pytest.mark.parametrize('name', ['test_vit', 'test_vit_relpos', 'test_mambaout', 'test_convnext', 'levit_128s'])
def test_one_training_step_reaches_every_parameter(name):
    model, images = make(name)
    model.train()
    criterion = MLCSDLoss(model.num_exits, model.exit_feature_dim)
    criterion(model(images), torch.tensor([0, 1, 2])).backward()
    for part in (model, criterion):
        assert [n for n, p in part.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize('name', ['test_vit', 'test_vit_relpos'])
def test_samples_may_leave_between_stages(name):
    model, images = make(name, exits=3)
    with torch.no_grad():
        state = model.run_stage(0, images)
        survivors = tuple(t[[0, 2]] for t in state)
        state = model.run_stage(2, model.run_stage(1, survivors))
        torch.testing.assert_close(model.run_head(2, state)[0], model(images)[[0, 2]], rtol=1e-4, atol=1e-4)


def test_stages_read_the_live_weights():
    model, images = make('test_vit_relpos', exits=2)
    assert model.resumable
    with torch.no_grad():
        model.backbone.blocks[-1].mlp.fc2.weight.mul_(-1)
        last = [z for _, z in model.iter_exits(images)][-1]
        assert torch.equal(last, model.backbone(images))


def test_new_classifiers_are_in_the_stages():
    model, images = make('test_vit_relpos', exits=2)
    with torch.no_grad():
        list(model.iter_exits(images))
        model.reset_classifier(3)
        assert torch.equal([z for _, z in model.iter_exits(images)][-1], model.backbone(images))
        model.backbone.head.weight.zero_()
        model.backbone.head.bias.zero_()
        assert [z for _, z in model.iter_exits(images)][-1].abs().max() == 0


def test_a_copy_has_taps_and_stages_of_its_own():
    model, images = make('test_vit_relpos', exits=2)
    assert model.resumable
    again = copy.deepcopy(model)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
        assert all(z.abs().max() == 0 for z in again.forward_exits(images).logits)
        assert all(z.abs().max() == 0 for _, z in again.iter_exits(images))
        assert model.forward_exits(images).logits[0].abs().max() > 0


def test_stages_of_a_whole_backbone_refuse_training_mode():
    model, images = make('test_vit_relpos', exits=2)
    with pytest.raises(RuntimeError, match='not a chain of modules, so its stages run one by one only'):
        model.train().run_stage(0, images)


@pytest.mark.parametrize('name', ['test_vit', 'vit_tiny_patch16_dinov3_qkvb'])
def test_stages_at_two_image_sizes(name):
    model, _ = make(name, exits=2, dynamic_img_size=True)
    with torch.no_grad():
        for size in (160, 192):
            batch = torch.randn(2, 3, size, size)
            assert torch.equal([z for _, z in model.iter_exits(batch)][-1], model.backbone(batch))


@pytest.mark.parametrize('name', ['test_vit', 'vit_tiny_patch16_dinov3_qkvb'])
def test_maps_have_the_proportions_of_their_images(name):
    model, _ = make(name, exits=2, dynamic_img_size=True)
    images = torch.randn(2, 3, 256, 64)  # as many patches as 128x128
    with torch.no_grad():
        output = model.forward_exits(images)
        tokens = model.backbone.forward_intermediates(images, indices=1, norm=False, intermediates_only=True)[0]
        assert output.features[-1].shape[2:] == (16, 4)
        assert torch.equal(output.features[-1], tokens)
        assert torch.equal(next(z for _, z in model.iter_exits(images)), output.logits[0])


def test_costs_at_another_size_and_what_comes_after():
    model, _ = make('vit_tiny_patch16_dinov3_qkvb', exits=2, dynamic_img_size=True)
    small, large = (exit_costs(model, (3, size, size))[-1].macs for size in (160, 192))
    assert large > small
    images = torch.randn(1, 3, 192, 192)
    with torch.no_grad():
        assert torch.equal([z for _, z in model.iter_exits(images)][-1], model(images))


def test_threads_do_not_disturb_each_other():
    model, _ = make('test_vit_relpos', exits=2)
    batches = [torch.randn(1, *model.probe_size) for _ in range(4)]
    with torch.no_grad():
        expected = [model.forward_exits(x).logits for x in batches]

    @torch.no_grad()
    def work(i):
        for _ in range(10):
            # the first of these cuts the graph, while others run the model
            staged = [z for _, z in model.iter_exits(batches[i])]
            for z, s, y in zip(model.forward_exits(batches[i]).logits, staged, expected[i]):
                assert torch.equal(z, y) and torch.equal(s, y)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_stages_know_nothing_of_the_autocast_they_were_cut_under():
    model, images = make('test_vit_relpos', exits=2)
    with torch.no_grad():
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert [z.dtype for _, z in model.iter_exits(images)][-1] == torch.bfloat16
        assert torch.equal([z for _, z in model.iter_exits(images)][-1], model(images))


def test_weights_that_are_not_finite_cost_no_stages():
    model, _ = make('test_vit_relpos', exits=2)
    torch.nn.init.constant_(model.backbone.head.bias, float('nan'))
    assert model.resumable


def test_what_a_backbone_keeps_of_its_weights_is_not_cut_in():
    model, images = make('levit_128s', exits=2)
    with torch.no_grad():
        model(images)  # LeViT keeps attention biases in evaluation mode
        list(model.iter_exits(images))
        for name, p in model.backbone.named_parameters():
            if 'attention_biases' in name:
                p.normal_()
        model.train().eval()  # and drops them here
        assert torch.equal([z for _, z in model.iter_exits(images)][-1], model(images))


def test_replaced_modules_are_in_the_stages():
    model, images = make('test_vit_relpos', exits=2)
    with torch.no_grad():
        list(model.iter_exits(images))
        block = model.backbone.blocks[0]
        block.mlp.fc1 = torch.nn.Linear(block.mlp.fc1.in_features, block.mlp.fc1.out_features)
        assert torch.equal([z for _, z in model.iter_exits(images)][-1], model(images))


@pytest.mark.parametrize('name', ['test_vit', 'test_vit_relpos', 'test_convnext'])
def test_half_precision_weights(name):
    model = timm.create_model(f'mlcsd_{name}', exits=2, num_classes=5, dtype=torch.bfloat16).eval()
    images = torch.randn(2, *model.probe_size, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal([z for _, z in model.iter_exits(images)][-1], model(images))
    assert exit_costs(model, model.probe_size)[0].macs > 0


def test_what_cannot_be_cut_trains_and_says_why():
    model, images = make('test_vit_relpos', exits=2)
    block = model.backbone.blocks[1]
    forward = block.forward
    # a branch on the data is no graph
    block.forward = lambda x, **kwargs: forward(x, **kwargs) if x.sum() > 1e9 else forward(x * 1, **kwargs)
    assert not model.resumable
    assert 'torch.export cannot export its forward' in model.why_not_resumable
    model.train()(images).logits[0].sum().backward()
    with pytest.raises(ValueError, match='runs as a whole'):
        exit_costs(model, model.probe_size)


@pytest.mark.parametrize('name, prefix', [('test_vit', 1), ('vit_tiny_patch16_dinov3_qkvb', 5)])
def test_prefix_tokens_are_no_part_of_the_map(name, prefix):
    model, images = make(name)
    with torch.no_grad():
        tokens = model.backbone.forward_intermediates(images, indices=[0], norm=False, output_fmt='NLC')[1][0]
        state = model.run_stage(0, images)
    assert model.exit_names[0] == 'blocks.0'
    assert torch.equal(state[0], tokens.transpose(1, 2).unflatten(2, state[0].shape[2:]))
    assert model.backbone.num_prefix_tokens == prefix


def test_token_models_on_images_that_are_not_square():
    model, images = make('test_vit', img_size=(160, 96))
    assert images.shape[2:] == (160, 96)
    with torch.no_grad():
        output = model.forward_exits(images)
        assert {tuple(f.shape[2:]) for f in output.features} == {(10, 6)}
        assert torch.equal([z for _, z in model.iter_exits(images)][-1], output.logits[-1])


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'test_mambaout'])
def test_chains_on_images_that_are_not_square(name):
    model, _ = make(name)
    with torch.no_grad():
        output = model.forward_exits(torch.randn(2, 3, 96, 128))
    assert output.features[-1].shape[2:] == (3, 4)


@pytest.mark.parametrize(
    'name, norm, act',
    [
        ('resnet18', 'BatchNorm2d', 'ReLU'),
        ('mobilenetv2_100', 'BatchNorm2d', 'ReLU6'),
        ('test_convnext', 'LayerNorm2d', 'GELUTanh'),
    ],
)
def test_heads_follow_the_backbones_style(name, norm, act):
    head = timm.create_model(f'mlcsd_{name}').heads[0]
    kinds = {type(m).__name__ for m in head.reduce}
    assert {norm, act} <= kinds
    assert isinstance(head.reduce[0], torch.nn.Conv2d) == (norm == 'BatchNorm2d')


def test_as_many_exits_as_there_are_blocks():
    assert make('test_vit')[0].num_exits == 6
    with pytest.raises(ValueError, match='exits=7 is impossible: this backbone has 6 blocks'):
        make('test_vit', exits=7)


def test_costs_of_a_cut_graph():
    model, _ = make('test_vit_relpos', exits=3)
    costs = exit_costs(model, model.probe_size)
    plain = make('test_vit_relpos', exits=1)[0]
    assert sum(c.stage_macs for c in costs) + costs[-1].head_macs == exit_costs(plain, plain.probe_size)[0].macs
    assert 0 < costs[0].macs < costs[1].macs < costs[2].macs
    assert costs[-1].params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('name', ['test_vit', 'test_vit_relpos', 'test_convnext'])
def test_every_exit_compiles_and_exports(name):
    model, images = make(name, exits=3)
    with torch.no_grad():
        expected = model.forward_exits(images).logits
        compiled = torch.compile(model.forward_exits, backend='aot_eager', fullgraph=True)
        for z, y in zip(compiled(images).logits, expected):
            torch.testing.assert_close(z, y)

        class Exits(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, x):
                return self.model.forward_exits(x).logits

        program = torch.export.export(Exits(), (images,), strict=False)
        for z, y in zip(program.module()(images), expected):
            torch.testing.assert_close(z, y)


def set_act(backbone):
    backbone.blocks[0].mlp.act = torch.nn.ReLU()


def set_eps(backbone):
    backbone.blocks[1].norm1.eps = 10.0


def set_array(backbone):
    set_eps(backbone)
    backbone.embed_dim = np.array([64, 64])  # no comparison of it has one truth value


@pytest.mark.parametrize('change', [set_act, set_eps, set_array])
def test_changes_that_leave_the_weights_are_in_the_stages(change):
    model, images = make('test_vit_relpos', exits=2)
    for name, p in model.backbone.named_parameters():
        torch.nn.init.ones_(p) if name.endswith('gamma') else p.data.mul_(3)
    with torch.no_grad():
        before = model(images)
        assert torch.equal([z for _, z in model.iter_exits(images)][-1], before)
        change(model.backbone)
        after = model(images)
        assert (after - before).abs().max() > 0.01
        model.executor.prepare(model, model.probe_size)  # cuts anew
        assert torch.equal([z for _, z in model.iter_exits(images)][-1], after)


@pytest.mark.parametrize('name, place', [('test_resnet', 'layer2.0.conv1'), ('test_vit_relpos', 'blocks.1.mlp.fc1')])
@pytest.mark.parametrize('change', [torch.nn.utils.weight_norm, partial(l1_unstructured, name='weight', amount=0.5)])
def test_weights_that_are_computed(name, place, change):
    """Pruning and weight normalisation leave a tensor that is no parameter, which cannot be copied."""
    model, images = make(name, exits=2)
    change(model.backbone.get_submodule(place))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal([z for _, z in model.iter_exits(images)][-1], model(images))
            next(p for n, p in model.backbone.get_submodule(place).named_parameters() if n != 'bias').mul_(3)
    assert model.resumable


@pytest.mark.parametrize('name', ['test_vit', 'eva02_tiny_patch14_224', 'hiera_tiny_224'])
def test_dropped_patches_leave_no_map(name):
    with pytest.raises(ValueError, match=r'patch_drop_rate=0\.75: expected 0'):
        create_multi_exit(name, patch_drop_rate=0.75)


class Random(torch.nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def test_a_module_that_prevents_stages_may_come_and_go():
    model, images = make('test_vit_relpos', exits=2)
    mlp = model.backbone.blocks[1].mlp
    for act, works in ((Random(), False), (torch.nn.GELU(), True), (Random(), False)):
        mlp.act = act
        assert model.resumable == works
    with torch.no_grad():
        mlp.act = torch.nn.ReLU()
        assert torch.equal([z for _, z in model.iter_exits(images)][-1], model(images))


def test_a_module_in_training_mode_is_not_left_out_of_a_graph():
    model, images = make('test_vit_relpos', exits=2)
    assert model.resumable
    model.backbone.blocks[1].mlp.drop1.train()
    with pytest.raises(
        RuntimeError, match=r"'blocks.1.mlp.drop1' is in training mode, which the exported graph leaves"
    ):
        next(model.iter_exits(images))
    model.eval()
    assert len([*model.iter_exits(images)]) == 2
