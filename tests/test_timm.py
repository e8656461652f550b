"""What is used of timm's private parts is still there, and does what it did: one test per name of _timm.py."""

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest
import timm
import torch

from timm_mlcsd import _timm

PACKAGE = Path(inspect.getfile(_timm)).parent
# modules of timm whose names are no part of its documented interface
PRIVATE = ('timm.data.loader', 'timm.data.readers', 'timm.data.model_config', 'timm.data.dataset')


def methods(module, cls):
    """Names of the methods of a class, read from its source, because its packages may be missing."""
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    found = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls)
    return {n.name for n in found.body if isinstance(n, ast.FunctionDef)}


def test_private_parts_are_used_in_one_file_only():
    for path in PACKAGE.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('timm.') and path.name != '_timm.py':
                private = any(part.startswith('_') for part in node.module.split('.'))
                private |= any(alias.name.startswith('_') for alias in node.names)
                assert not private and not node.module.startswith(PRIVATE), f'{path}: {node.module}'


def test_feature_take_indices():
    assert _timm.feature_take_indices(4, 2) == ([2, 3], 3)
    assert _timm.feature_take_indices(4, [0, 2]) == ([0, 2], 2)


def test_feature_getter_net():
    net = _timm.FeatureGetterNet(timm.create_model('test_resnet'), out_indices=(0, 1))
    assert len(net(torch.zeros(1, 3, 32, 32))) == 2


def test_fast_collate():
    image = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    images, targets = _timm.fast_collate([(image, 1), (image, 0)])
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 2, 2) and targets.tolist() == [1, 0]


def test_resolve_input_data_config():
    config = _timm.resolve_input_data_config(timm.create_model('test_resnet'), {'img_size': 48}, pretrained_cfg=None)
    assert config['input_size'] == (3, 48, 48) and {'mean', 'std', 'crop_pct', 'interpolation'} <= set(config)


def test_class_map_runs_no_code(tmp_path):
    (tmp_path / 'map.txt').write_text('b\na\n')
    assert _timm.class_map.load_class_map(str(tmp_path / 'map.txt')) == {'b': 0, 'a': 1}
    (tmp_path / 'map.pkl').write_bytes(b'cos\nsystem\n(S"true"\ntR.')
    with pytest.raises(Exception, match=r'(?i)forbidden|not allowed|global|unpickl'):
        _timm.class_map.load_class_map(str(tmp_path / 'map.pkl'))


def test_image_extensions():
    before = _timm.get_img_extensions(as_set=False)
    try:
        _timm.set_img_extensions(['.odd'])
        assert tuple(_timm.get_img_extensions(as_set=False)) == ('.odd',)
    finally:
        _timm.set_img_extensions(list(before))


def test_get_field():
    assert _timm.get_field({'a': 1}, 'a') == 1
    assert _timm.get_field({'a': {'b': 2}}, 'a/b') == 2


def test_hub_names():
    assert _timm.HF_SAFE_WEIGHTS_NAME == 'model.safetensors'
    assert _timm.hf_split('owner/name@branch') == ('owner/name', 'branch')
    assert _timm.get_global_pool(timm.create_model('test_resnet')) == 'avg'
    assert {'model_config', 'model_args'} <= set(inspect.signature(_timm.save_config_for_hf).parameters)


@pytest.mark.parametrize('source, cls', [('hfids', 'ReaderHfids'), ('tfds', 'ReaderTfds'), ('wds', 'ReaderWds')])
def test_readers_open_their_data_lazily(source, cls):
    assert '_lazy_init' in methods(f'timm.data.readers.reader_{source}', cls)


def test_intercept_open():
    class Reader:
        def _lazy_init(self):
            calls.append('own')

    def prepare(open_reader):
        calls.append('before')
        open_reader()

    calls, reader = [], Reader()
    _timm.intercept_open(reader, prepare)
    reader._lazy_init()
    assert calls == ['before', 'own']


def test_input_decoders():
    assert '_input_decoders' in methods('timm.data.readers.reader_tfds', 'ReaderTfds')

    class Reader:
        def _input_decoders(self):
            return 2

    reader = Reader()
    _timm.input_decoders(reader, lambda decoders: 10 * decoders)
    assert reader._input_decoders() == 20


def test_wds_target_error():
    pytest.importorskip('webdataset')
    assert issubclass(_timm.wds_target_error(), Exception)


def test_names_of_reader():
    source = Path(importlib.util.find_spec('timm.data.readers.reader_hfds').origin).read_text()
    assert '_source_names' in source
    assert _timm.names_of_reader(object()) == {}


def test_filter_checkpoint():
    model = timm.create_model('test_vit', img_size=160)
    small = timm.create_model('test_vit', img_size=96)
    fitted = _timm.filter_checkpoint(small.state_dict(), model)
    assert fitted['pos_embed'].shape == model.pos_embed.shape != small.pos_embed.shape
