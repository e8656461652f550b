"""Numbers of operations of a training step, which decide the time of small batches on a GPU."""

from collections import Counter

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import timm_mlcsd  # noqa: F401  # registers the networks
from timm_mlcsd import MLCSDLoss

EXITS = 8
# views start no kernel; these neither
FREE = ('detach', '_unsafe_view', 'lift_fresh', 'empty', 'new_empty_strided')


class Operations(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition('::')[2]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in FREE:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def count(self):
        return sum(self.names.values())


def outputs():
    """Model, its training outputs and labels."""
    model = timm.create_model('mlcsd_resnet18', num_classes=10, exits=EXITS, small_input=True).train()
    return model, model(torch.randn(4, 3, 32, 32)), torch.randint(10, (4,))


def operations_of_loss(criterion):
    _, output, target = outputs()
    # not leaves, whose gradients would be copied
    output = type(output)(*([x.detach().requires_grad_().view_as(x) for x in part] for part in output))
    with Operations() as counted:
        criterion(output, target).backward()
    # gradients that arrive at the leaves of this test
    return counted.count - counted.names['copy_']


def test_loss_takes_few_operations():
    """59 of the paper's loss; exit by exit they were 196."""
    assert operations_of_loss(MLCSDLoss(EXITS, 512)) <= 60


def test_number_of_operations_does_not_grow_with_the_exits():
    counts = []
    for exits in (4, 8):
        model = timm.create_model('mlcsd_resnet18', num_classes=10, exits=exits, small_input=True).train()
        output, target = model(torch.randn(4, 3, 32, 32)), torch.randint(10, (4,))
        criterion = MLCSDLoss(exits, 512)
        with Operations() as counted:
            criterion(output, target)
        counts.append(counted.count)
    assert counts[0] == counts[1]


def test_step_takes_few_operations():
    """406 with the optimizer (foreach); 534 when the loss was computed exit by exit."""
    model, _, target = outputs()
    criterion = MLCSDLoss(EXITS, 512)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1, momentum=0.9, foreach=True)
    images = torch.randn(4, 3, 32, 32)
    for _ in range(2):  # the first step makes the momentum buffers
        with Operations() as counted:
            criterion(model(images), target).backward()
            optimizer.step()
        optimizer.zero_grad()
    assert counted.count <= 420
