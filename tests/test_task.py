"""The task trains model and loss together and keeps them apart in checkpoints."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationEvaluator

from timm_mlcsd import MLCSDLoss, MLCSDTask, MultiExitModel


def make(**kwargs):
    model = timm.create_model(
        'mlcsd_resnet18', num_classes=5, exits=4, small_input=True, channels=(8, 8, 16, 16), exit_head='slic'
    )
    return MLCSDTask(model, MLCSDLoss(model.num_exits, model.exit_feature_dim, **kwargs), verbose=False)


def batch():
    return torch.randn(8, 3, 16, 16), torch.randint(5, (8,))


def test_learns_a_batch_and_reports_its_parts():
    task = make(alpha=1.0, beta=1.0)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.02, momentum=0.9)
    images, target = batch()
    losses = []
    for _ in range(25):
        result = task(images, target)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        losses.append(result['cls'].item())
    assert losses[-1] < 0.3 * losses[0]
    assert {'loss', 'cls', 'kd', 'ht', 'cwem', 'output', 'exit_logits'} == set(result)
    assert torch.equal(result['output'], result['exit_logits'][-1])


def test_optimizer_and_clipping_see_both_parameter_sets():
    task = make()
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1, weight_decay=0.1)
    known = {id(p) for group in optimizer.param_groups for p in group['params']}
    assert known == {id(p) for p in task.parameters()}
    assert known == {id(p) for p in task.get_clip_parameters()}
    decayed = {id(p) for g in optimizer.param_groups if g['weight_decay'] for p in g['params']}
    assert id(task.criterion.mixer.conv.weight) in decayed
    assert id(task.criterion.mixer.norm.weight) not in decayed


@pytest.mark.parametrize('name, kwargs', [('mlcsd_test_resnet', dict(exits=3)), ('mlcsd_msdnet', {})])
def test_adaptive_clipping_leaves_the_classifiers_of_all_exits_out(name, kwargs):
    model = timm.create_model(name, num_classes=5, **kwargs)
    task = MLCSDTask(model, MLCSDLoss(model.num_exits, model.exit_feature_dim), verbose=False)
    clipped = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    left_out = {n for n, p in model.named_parameters() if id(p) not in clipped}
    last = {'backbone.fc'} if 'resnet' in name else {f'heads.{model.num_exits - 1}.fc'}
    classifiers = {f'heads.{k}.fc' for k in range(model.num_exits - 1)} | last
    assert left_out == {f'{name}.{part}' for name in classifiers for part in ('weight', 'bias')}
    assert {id(p) for p in task.criterion.parameters()} <= clipped


class OwnNetwork(MultiExitModel):
    """The least that a network of one's own has to define."""

    num_exits = 2
    exit_feature_dim = 4

    def __init__(self):
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Conv2d(3, 4, 1) for _ in range(2))

    def run_stage(self, k, state):
        return state

    def run_head(self, k, state):
        feature = self.heads[k](state)
        return feature.mean(dim=(-2, -1)), feature


def test_a_network_of_ones_own_can_be_optimized():
    model = OwnNetwork()
    task = MLCSDTask(model, MLCSDLoss(model.num_exits, model.exit_feature_dim), verbose=False)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1, weight_decay=0.1)
    assert {id(p) for group in optimizer.param_groups for p in group['params']} == {id(p) for p in task.parameters()}
    task(torch.randn(8, 3, 4, 4), torch.randint(4, (8,)))['loss'].backward()
    optimizer.step()


def test_layer_decay_reaches_criterion_and_model():
    task = make()
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=1.0, layer_decay=0.5)
    scale = {id(p): g['lr_scale'] for g in optimizer.param_groups for p in g['params']}
    assert scale[id(task.criterion.mixer.conv.weight)] == 1.0
    assert scale[id(next(task.get_eval_model().backbone.parameters()))] < 0.2


def test_training_only_parameters_stay_out_of_the_network():
    task = make()
    state = task.get_checkpoint_state()
    assert set(state) == {'state_dict', 'task_state'}
    assert set(state['state_dict']) == set(task.get_eval_model().state_dict())
    assert 'mixer.conv.weight' in state['task_state']['criterion']
    assert set(make(distill='none').get_checkpoint_state()) == {'state_dict'}


@pytest.mark.parametrize('ema', [False, True])
def test_checkpoint_state_round_trip(ema):
    source, target = make(), make()
    if ema:
        source.setup_ema(decay=0.5)
        target.setup_ema(decay=0.5)
    for p in source.parameters():
        torch.nn.init.normal_(p)
    source.update_ema()
    state = source.get_checkpoint_state(ema=ema)
    suffix = '_ema' if ema else ''
    target.load_checkpoint_state(state[f'state_dict{suffix}'], state[f'task_state{suffix}'], ema=ema)
    again = target.get_checkpoint_state(ema=ema)
    for name, value in state[f'state_dict{suffix}'].items():
        assert torch.equal(value, again[f'state_dict{suffix}'][name])
    for name, value in state[f'task_state{suffix}']['criterion'].items():
        assert torch.equal(value, again[f'task_state{suffix}']['criterion'][name])


def test_ema_averages_model_and_criterion():
    task = make()
    task.setup_ema(decay=0.5)
    conv = task.criterion.mixer.conv.weight
    before = conv.clone()
    with torch.no_grad():
        conv.add_(1.0)
    task.update_ema()
    averaged = task.get_trainable_module(ema=True).module.criterion.mixer.conv.weight
    torch.testing.assert_close(averaged, before + 0.5)
    assert task.get_eval_model(ema=True) is not task.get_eval_model()


def test_ema_takes_the_arguments_of_timm_by_position():
    ema = make().setup_ema(0.5, True, torch.device('cpu'))
    assert (ema.decay, ema.use_warmup, ema.device) == (0.5, True, torch.device('cpu'))


def test_ema_does_not_average_what_is_remembered_of_images():
    torch.manual_seed(0)
    model = timm.create_model('mlcsd_resnet18', num_classes=5, exits=3, small_input=True, channels=(8, 8, 8, 8))
    criterion = MLCSDLoss(3, model.exit_feature_dim, num_samples=20, method='crd')
    task = MLCSDTask(model, criterion, verbose=False)
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    indices = torch.arange(4)
    task.train()(torch.randn(4, 3, 16, 16), indices, indices)['loss'].backward()
    optimizer.step()
    before = {name: criterion.get_buffer(name).clone() for name in criterion.bank_buffer_names()}
    task.update_ema(step=5)
    averaged = task.get_trainable_module(ema=True).module.criterion
    assert before
    for name, memory in before.items():
        assert averaged.get_buffer(name) is criterion.get_buffer(name)
        assert torch.equal(criterion.get_buffer(name), memory)
    # a checkpoint from before they were one
    task.load_task_state({'criterion': {n: t + 1 for n, t in criterion.state_dict().items()}}, ema=True)
    for name, memory in before.items():
        assert torch.equal(criterion.get_buffer(name), memory)
    # and what learns is averaged
    pairs = list(zip(averaged.parameters(), criterion.parameters()))
    assert not pairs or any(not torch.equal(a, b) for a, b in pairs)


def test_eval_model_works_with_timms_evaluator():
    task = make()
    images, target = batch()
    evaluator = task.create_evaluator()
    assert isinstance(evaluator, ClassificationEvaluator)
    evaluator.update(task.get_eval_model().eval()(images), target)
    assert 0 <= evaluator.compute()['top1'] <= 100


def test_compiled_task_gives_the_same_loss():
    torch.compiler.reset()
    task, images, target = make(), *batch()
    expected = task(images, target)['loss']
    eval_model = task.compile(backend='aot_eager')
    # the same operations on the same weights; only running statistics differ, which training does not read
    torch.testing.assert_close(task(images, target)['loss'], expected)
    assert eval_model.eval()(images).shape == (8, 5)
    assert set(task.get_checkpoint_state()['state_dict']) == set(make().get_eval_model().state_dict())


def test_goes_where_the_model_is():
    model = timm.create_model('mlcsd_resnet18', num_classes=5, exits=4, channels=(8, 8, 16, 16)).to('meta')
    task = MLCSDTask(model, MLCSDLoss(4, model.exit_feature_dim), verbose=False)
    assert {p.device.type for p in task.parameters()} == {'meta'} and task.device.type == 'meta'
