"""A chain is proven by watching tensors, not by trusting module lists."""

import pytest
import torch
import torch.nn as nn

from timm_mlcsd.models.stages.chain import read_chain
from timm_mlcsd.models.stages.probe import probe

BLOCKS = {'body.0', 'body.1'}


def trace_chain(net, input_size):
    return read_chain(probe(net, input_size), BLOCKS)


class Net(nn.Module):
    """Two lists of blocks; `forward_features` is what each test makes of them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(2)))

    def forward_features(self, x):
        return self.body(self.act(self.stem(x)))


def names(net):
    leaves = trace_chain(net, (3, 8, 8))
    return leaves and [leaf.name for leaf in leaves]


def test_plain_chain_is_opened_to_its_blocks():
    net = Net()
    leaves = trace_chain(net, (3, 8, 8))
    assert names(net) == ['stem', 'act', 'body.0', 'body.1']
    assert [leaf.writes_input for leaf in leaves] == [False, True, False, False]
    assert [leaf.is_block for leaf in leaves] == [False, False, True, True]
    layout = leaves[0].layout
    assert (layout.kind, layout.channels, layout.height, layout.width) == ('NCHW', 4, 4, 4)
    # 3x3 conv on 4x4 places: 4*3*9*16 MACs; 1x1 convs: 4*4*16 each
    assert [leaf.macs for leaf in leaves] == [1728, 1728, 1984, 2240]


class FunctionBetween(Net):
    def forward_features(self, x):
        return self.body(self.act(self.stem(x)) * 2)


class WriteBetween(Net):
    def forward_features(self, x):
        x = self.act(self.stem(x))
        x += 1  # the same tensor object, other values
        return self.body(x)


class FunctionAtTheEnd(Net):
    def forward_features(self, x):
        return self.body(self.act(self.stem(x))).relu()


class TwoInputs(Net):
    def __init__(self):
        super().__init__()
        self.mix = nn.Bilinear(4, 4, 4)

    def forward_features(self, x):
        x = self.act(self.stem(x))
        return self.body(self.mix(x, x))


class RunsTwice(Net):
    def forward_features(self, x):
        return self.body(self.body(self.act(self.stem(x))))


@pytest.mark.parametrize('cls', [FunctionBetween, WriteBetween, FunctionAtTheEnd, TwoInputs, RunsTwice])
def test_no_chain(cls):
    assert names(cls()) is None


def test_block_with_an_in_place_residual_stays_whole():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
            self.act = nn.ReLU()

        def forward(self, x):
            y = self.convs(x)
            y += x
            return self.act(y)

    net = Net()
    net.body = nn.Sequential(Residual(), Residual())
    leaves = trace_chain(net, (3, 8, 8))
    assert [leaf.name for leaf in leaves] == ['stem', 'act', 'body.0', 'body.1']
    assert [leaf.is_block for leaf in leaves] == [False, False, True, True]


def test_tracing_needs_no_arithmetic_and_leaves_no_trace():
    net = Net().train()
    with torch.no_grad():
        net.stem.weight.fill_(float('nan'))
    assert names(net)
    assert net.training and net.body[0][0].training
    assert net.stem.weight.device.type == 'cpu'
    assert not any(m._forward_hooks for m in net.modules())
