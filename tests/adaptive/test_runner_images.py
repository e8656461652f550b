"""The exported runner makes the same numbers of an image file as the loader that trains and evaluates."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from timm.data import create_loader

from timm_mlcsd.adaptive.export import onnx_runner
from timm_mlcsd.data.image import IMAGE_MODES, MAX_ASPECT_RATIO, read_image


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(len(shape)).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def save_corpus(folder):
    """Files of all kinds."""
    colour = Image.fromarray(noise(48, 72, 3))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        colour.save(folder / f'exif_{orientation}.jpg', exif=exif, quality=95)
        colour.save(folder / f'exif_{orientation}.png', exif=exif)
    grey = Image.fromarray(noise(50, 40))
    grey.save(folder / 'grey.png')
    grey.convert('1').save(folder / 'one_bit.png')
    grey.convert('1').save(folder / 'one_bit.tif')
    Image.fromarray(noise(50, 40, 2), 'LA').save(folder / 'grey_alpha.png')
    Image.fromarray(noise(50, 40, 4), 'RGBA').save(folder / 'alpha.png')
    Image.fromarray(noise(50, 40, 4), 'RGBA').save(folder / 'alpha.webp', lossless=True)
    Image.fromarray(noise(50, 40, 4), 'CMYK').save(folder / 'cmyk.jpg')
    Image.fromarray(noise(50, 40, 4), 'CMYK').save(folder / 'cmyk.tif')
    palette = colour.quantize(16)
    palette.save(folder / 'palette.png', transparency=3)
    palette.save(folder / 'palette_bytes.png', transparency=bytes(range(0, 160, 10)))
    palette.save(folder / 'moving.gif', save_all=True, append_images=[palette.rotate(90)], transparency=3)
    colour.save(folder / 'colour.bmp')
    colour.save(folder / 'photo.webp', quality=80)
    deep = noise(33, 47, dtype=np.uint16)
    Image.fromarray(deep).save(folder / 'deep.png')
    Image.fromarray(deep).save(folder / 'deep.tif')
    Image.frombytes('I;16B', (47, 33), deep.astype('>u2').tobytes()).save(folder / 'deep_other_endian.tif')
    for width, height in ((30, 900), (900, 30), (1, 1), (2, 3), (7, 200), (300, 299), (36, 36)):
        Image.fromarray(noise(height, width, 3)).save(folder / f'{width}x{height}.png')


def save_deep_tiffs(folder):
    """Grey ramps of 16 bits with 0 for white, and of 12 bits."""
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    options = TiffImagePlugin.ImageFileDirectory_v2()
    options[262] = 0
    Image.fromarray(ramp * 16).save(folder / 'white_is_0.tif', tiffinfo=options)
    # Pillow does not write 12 bits: two values in three bytes
    first, second = ramp.reshape(-1, 2).T.astype(np.uint32)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()
    tags = {256: 64, 257: 64, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 64, 279: len(packed)}
    entries = b''.join(struct.pack('<HHLL', tag, 4, 1, value) for tag, value in tags.items())
    header = b'II*\0' + struct.pack('<L', 8 + len(packed))
    folder_of_tags = struct.pack('<H', len(tags)) + entries + struct.pack('<L', 0)
    (folder / 'bits_12.tif').write_bytes(header + packed + folder_of_tags)


def save_rotated_tiffs(folder):
    """Uncompressed files that Pillow maps into memory when it opens them by name."""
    images = dict(L=Image.fromarray(noise(50, 40)), deep=Image.fromarray(noise(50, 40, dtype=np.uint16)))
    images.update(
        {mode: Image.fromarray(noise(50, 40, 4), mode) for mode in ('RGBA', 'CMYK')}, P=images['L'].quantize()
    )
    for orientation in range(5, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for name, image in images.items():
            image.save(folder / f'{name}_{orientation}.tif', exif=exif)


class Files(torch.utils.data.Dataset):
    def __init__(self, paths, mode):
        self.paths, self.mode, self.transform = paths, mode, None

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.transform(read_image(self.paths[i], self.mode)), i


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    save_corpus(folder)
    save_deep_tiffs(folder)
    save_rotated_tiffs(folder)
    return sorted(folder.iterdir())


def loaded(paths, config, mode):
    loader = create_loader(
        Files(paths, mode),
        batch_size=8,
        is_training=False,
        use_prefetcher=True,
        num_workers=0,
        device=torch.device('cpu'),
        persistent_workers=False,
        **{key: value for key, value in config.items() if key != 'input_img_mode'},
    )
    return torch.cat([x for x, _ in loader]).numpy()


def prepared(paths, config):
    model = object.__new__(onnx_runner.AdaptiveModel)  # reading needs no graphs
    model.manifest = dict(data_config=config)
    return np.concatenate([model.prepare(path) for path in paths])


def config_of(**change):
    config = dict(input_size=(3, 32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return dict(config, interpolation='bicubic', crop_pct=0.875, crop_mode='center', **{}) | change


@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('crop_pct', [0.5, 0.875, 0.9, 1.0, 1.3])
@pytest.mark.parametrize('size', [(32, 32), (40, 24), (33, 47)])
def test_crops(corpus, crop_mode, crop_pct, size):
    config = config_of(crop_mode=crop_mode, crop_pct=crop_pct, input_size=(3, *size))
    assert np.array_equal(prepared(corpus, config), loaded(corpus, config, 'RGB'))


@pytest.mark.parametrize('interpolation', onnx_runner.INTERPOLATIONS)
def test_interpolations(corpus, interpolation):
    config = config_of(interpolation=interpolation)
    assert np.array_equal(prepared(corpus, config), loaded(corpus, config, 'RGB'))


@pytest.mark.parametrize('crop_mode', ['center', 'border'])
@pytest.mark.parametrize('mode', IMAGE_MODES)
def test_modes(corpus, mode, crop_mode):
    channels = onnx_runner.IMAGE_MODES[mode]
    config = config_of(
        input_size=(channels, 32, 32), input_img_mode=mode, crop_mode=crop_mode, mean=(0.4,) * channels, std=(0.3,)
    )
    assert np.array_equal(prepared(corpus, config), loaded(corpus, config, mode))


@pytest.mark.parametrize('channels, mode', [(1, 'L'), (2, 'LA'), (3, 'RGB'), (4, 'RGBA')])
def test_the_mode_follows_the_channels(corpus, channels, mode):
    config = config_of(input_size=(channels, 32, 32))  # three means for any number of channels, as in timm's loader
    assert np.array_equal(prepared(corpus, config), loaded(corpus, config, mode))


def test_the_runner_knows_the_same_modes_and_bounds():
    assert tuple(onnx_runner.IMAGE_MODES) == IMAGE_MODES
    assert {mode: len(Image.new(mode, (1, 1)).getbands()) for mode in IMAGE_MODES} == onnx_runner.IMAGE_MODES
    assert onnx_runner.MAX_ASPECT_RATIO == MAX_ASPECT_RATIO


@pytest.mark.parametrize(
    'image',
    [
        Image.fromarray(np.ones((4, 4), np.int32)),
        Image.fromarray(np.ones((4, 4), np.float32)),
        Image.new('L', (65000, 1)),
        Image.new('L', (1, 257)),
    ],
)
def test_what_is_refused(image, tmp_path):
    image.save(tmp_path / 'image.tif')
    messages = []
    for read in (lambda path: read_image(path, 'RGB'), lambda path: prepared([path], config_of())):
        with pytest.raises(ValueError, match=r'32-bit|at most 256') as caught:
            read(tmp_path / 'image.tif')
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_networks_that_image_files_do_not_fit():
    with pytest.raises(ValueError, match='takes 12 channels, which image files do not have'):
        prepared([Image.new('RGB', (4, 4))], config_of(input_size=(12, 32, 32)))


def test_ramps_of_fewer_bits_and_of_white_0(tmp_path):
    save_deep_tiffs(tmp_path)
    ramp = np.arange(64 * 64).reshape(64, 64)
    for name, right in (('white_is_0', 255 - ramp * 16 / 257), ('bits_12', ramp * 255 / 4095)):
        pixels = np.asarray(read_image(tmp_path / f'{name}.tif', 'L'), dtype=float)
        assert np.abs(pixels - right).max() <= 0.51, name  # rounding to integers
