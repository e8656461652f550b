"""Exit heads: what they compute in reduced precision."""

import pytest
import torch
import torch.nn.functional as F

from timm_mlcsd.models.heads import ExitHead, HeadStyle

WIDTHS = (8, 16, 32)


def strided_depthwise(head):
    return next(m for m in head.reduce.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1)


def test_strided_depthwise_convolutions_train_in_float32_under_cpu_autocast():
    torch.manual_seed(0)
    conv = strided_depthwise(ExitHead(WIDTHS, 32, 10, 'slic_dw', 'max'))
    images = torch.randn(2, 8, 16, 16).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        trained = conv.train()(images)
        evaluated = conv.eval()(images)
    trained.float().square().sum().backward()
    gradient, conv.weight.grad = conv.weight.grad, None
    exact = F.conv2d(images.float(), conv.weight, stride=2, padding=1, groups=8)
    # what leaves it is bfloat16 again, rounded once; so the gradient that comes back is that of the rounded output
    torch.testing.assert_close(trained, exact.bfloat16(), rtol=0, atol=0)
    exact.backward(2 * trained.float().detach().bfloat16().float())
    torch.testing.assert_close(gradient, conv.weight.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(evaluated, trained, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_a_head_trains_in_the_precision_it_was_cast_to(dtype):
    head = ExitHead(WIDTHS, 32, 10, 'slic_dw', 'max', HeadStyle()).to(dtype).train()
    logits, feature = head(torch.randn(2, 8, 16, 16, dtype=dtype))
    logits.sum().backward()
    assert logits.dtype == feature.dtype == strided_depthwise(head).weight.grad.dtype == dtype
