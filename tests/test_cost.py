"""Costs counted from the modules, against the numbers of the literature."""

import pytest
import timm
import torch

from timm_mlcsd.cli import cost
from timm_mlcsd.cost import exit_costs, exit_times


def costs(name='mlcsd_resnet18', size=32, **kwargs):
    return exit_costs(timm.create_model(name, num_classes=100, **kwargs), (3, size, size))


def test_resnet18_for_cifar_costs_what_the_paper_says():
    plain = costs(exits=1, small_input=True)[0]
    assert plain.macs / 1e9 == pytest.approx(0.556, abs=0.001)
    slic = costs(exit_head='slic', small_input=True)
    assert 1.24 < slic[-1].macs / plain.macs < 1.26
    depthwise = costs(exit_head='slic_dw', small_input=True)
    assert 1.04 < depthwise[-1].macs / plain.macs < 1.06


@pytest.mark.parametrize(
    'name, gmacs, depth',
    # torchvision's published multiply-adds; the depths are the names
    [
        ('resnet18', 1.82, 18),
        ('resnet34', 3.67, 34),
        ('resnet50', 4.09, 50),
        ('resnet101', 7.80, 101),
        ('mobilenetv2_100', 0.30, 53),
    ],
)
def test_plain_backbones(name, gmacs, depth):
    plain = exit_costs(timm.create_model(f'mlcsd_{name}', exits=1), (3, 224, 224))[0]
    assert plain.macs / 1e9 == pytest.approx(gmacs, rel=0.02)
    assert plain.depth == depth
    assert plain.params == sum(p.numel() for p in timm.create_model(name).parameters())


@pytest.mark.parametrize('head, share', [('slic', 1.83), ('slic_dw', 1.15)])
def test_heads_on_resnet50(head, share):
    plain = costs('mlcsd_resnet50', 224, exits=1)[0]
    multi = costs('mlcsd_resnet50', 224, exits=4, exit_head=head)[-1]
    assert multi.macs / plain.macs == pytest.approx(share, abs=0.005)


def test_costs_add_up():
    model = timm.create_model('mlcsd_mobilenetv2_100', num_classes=100)
    exits = exit_costs(model, (3, 96, 96))
    total = 0
    for exit in exits:
        total += exit.stage_macs + exit.head_macs
        assert exit.macs == total
    plain = costs('mlcsd_mobilenetv2_100', 96, exits=1)[0]
    assert sum(e.stage_macs for e in exits) + exits[-1].head_macs == plain.macs
    assert exits[-1].params == sum(p.numel() for p in model.parameters())
    assert all(a.params < b.params and a.depth < b.depth for a, b in zip(exits, exits[1:]))


def test_counting_changes_nothing():
    model = timm.create_model('mlcsd_resnet18', num_classes=7, channels=(8, 8, 8, 8)).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    exit_costs(model, (3, 64, 64))
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_whole_networks_have_no_cost_per_exit():
    model = timm.create_model('mlcsd_resnet18', channels=(8, 8, 8, 8))
    model.executor.unsupported_reason = lambda model: 'no reason'
    for count in (exit_costs, exit_times):
        with pytest.raises(ValueError, match='runs as a whole'):
            count(model, (3, 64, 64))


def test_too_small_images():
    with pytest.raises(ValueError, match='16x16 is too small'):
        costs(size=16)


def test_times_grow_from_exit_to_exit():
    model = timm.create_model('mlcsd_resnet18', num_classes=7, channels=(8, 8, 8, 8))
    times = exit_times(model, (3, 64, 64), repeats=3)
    assert len(times) == 8 and all(0 < a < b for a, b in zip(times, times[1:]))


def test_plan_compares_all_heads_and_warns(capsys):
    cost.main(['mlcsd_resnet50', '--exits', '4', '--input-size', '3', '64', '64', '--repeats', '1'])
    printed = capsys.readouterr().out
    for words in (
        'slic',
        'slic_dw',
        'conv1x1',
        'bottleneck',
        'layer3.5',
        'MMACs',
        'Parameters',
        'Depth',
        'ms to answer',
    ):
        assert words in printed
    assert 'warning: bottleneck: the first exit costs 7' in printed


def test_plan_names_mistakes(capsys):
    with pytest.raises(SystemExit) as e:
        cost.main(['mlcsd_resnet51'])
    assert e.value.code == 2
    assert capsys.readouterr().err.count('\n') == 1
