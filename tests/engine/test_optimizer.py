"""Which of PyTorch's implementations of an optimizer runs."""

import copy
from types import SimpleNamespace

import pytest
import torch

from timm_mlcsd.engine import optimizer as owner
from timm_mlcsd.engine.optimizer import OptimizerConfig, load_optimizer_state


@pytest.mark.parametrize(
    'opt, opt_args, device, fused',
    [
        ('sgd', {}, 'cuda', True),
        ('AdamW', {}, 'cuda:0', True),
        ('lookahead_adam', {}, 'cuda', True),
        ('lion', {}, 'cuda', False),
        ('adagrad', {}, 'cuda', False),  # fused in newer PyTorch only
        ('sgd', {'foreach': True}, 'cuda', False),
        ('sgd', {'fused': False}, 'cuda', False),
        ('sgd', {}, 'cpu', False),
    ],
)
def test_fused_is_the_default_on_cuda_where_there_is_one(opt, opt_args, device, fused):
    task = SimpleNamespace(device=torch.device(device), parameters=lambda: [torch.zeros(1)])
    found = owner._implementation(OptimizerConfig(opt=opt, opt_args=opt_args), task)
    assert found == ({'fused': True} if fused else {})


@pytest.mark.parametrize('before, now', [(True, None), (None, True)])
def test_state_from_another_device_keeps_the_implementation_of_this_one(before, now):
    def stepped(fused, state=None):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(5))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        if state:
            load_optimizer_state(optimizer, copy.deepcopy(state))  # PyTorch takes over the tensors themselves
        # opposite to that before: with equal gradients every step of Adam is as long as the first
        weight.grad = torch.arange(5.0) * (-1 if state else 1)
        optimizer.step()
        return weight.detach(), optimizer

    state = stepped(before)[1].state_dict()
    weight, optimizer = stepped(now, state)
    assert optimizer.param_groups[0]['fused'] is now
    # the moments came along: the second step differs from a first one, and not from that of the other implementation
    torch.testing.assert_close(weight, stepped(before, state)[0])
    state['state'] = {}
    assert not torch.allclose(weight, stepped(now, state)[0])


def test_state_of_other_groups_is_refused():
    first, second = (
        torch.optim.SGD([{'params': [torch.nn.Parameter(torch.zeros(1))]} for _ in range(n)], lr=0.1) for n in (1, 2)
    )
    for optimizer, other in ((first, second), (second, first)):
        with pytest.raises(ValueError, match='different number of parameter groups'):
            load_optimizer_state(optimizer, other.state_dict())
