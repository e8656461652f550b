"""One reading of an image, whatever its file is like."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from timm_mlcsd.data.image import IMAGE_MODES, convert_image, read_image


def file_of(image, format='PNG', **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('format', ['PNG', 'WEBP', 'TIFF'])
def test_orientation(orientation, format):
    upright = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10, 'L').convert('RGB')
    # the transpositions that undo what a viewer does for each value, EXIF 2.3, tag 0x0112
    undo = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = file_of(stored, format, exif=exif, **({'lossless': True} if format == 'WEBP' else {}))
    assert np.array_equal(np.asarray(read_image(file)), np.asarray(upright))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'CMYK', 'I;16'])
def test_orientation_of_a_file_opened_by_name(mode, orientation, tmp_path):
    shape = (3, 4, 4) if mode in ('RGBA', 'CMYK') else (3, 4)
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    stored = Image.fromarray(pixels.astype(np.uint16) * 257) if mode == 'I;16' else Image.fromarray(pixels, mode)
    if mode == 'P':
        stored.putpalette([value for value in range(256) for _ in 'RGB'])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / 'stored.tif', exif=exif)
    # turns to the left after a mirror from left to right, EXIF 2.3, tag 0x0112
    is_mirrored, turns = [(0, 0), (1, 0), (0, 2), (1, 2), (1, 1), (0, 3), (1, 3), (0, 1)][orientation - 1]
    upright = np.rot90(pixels[:, ::-1] if is_mirrored else pixels, turns)
    mode = mode if len(shape) == 3 else 'L'
    assert np.array_equal(read_image(tmp_path / 'stored.tif', mode), upright)
    with Image.open(tmp_path / 'stored.tif') as opened:
        assert np.array_equal(convert_image(opened, mode), upright)
        assert opened.filename == str(tmp_path / 'stored.tif')


@pytest.mark.parametrize('format', ['PNG', 'TIFF'])
def test_16_bits_are_scaled(format):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = np.asarray(read_image(file_of(Image.fromarray(ramp), format), 'L'))
    assert np.array_equal(pixels, np.rint(ramp / 257))
    assert pixels.mean() == pytest.approx(127.5, abs=1e-9)


@pytest.mark.parametrize('dtype, kind', [(np.int32, 'integers'), (np.float32, 'floating point')])
def test_unknown_ranges_are_refused(dtype, kind):
    with pytest.raises(ValueError, match=f'32-bit {kind}.*8 or 16 bits'):
        read_image(file_of(Image.fromarray(np.ones((4, 4), dtype)), 'TIFF'))


@pytest.mark.parametrize('size', [(65000, 1), (1, 2000)])
def test_extreme_proportions_are_refused(size):
    with pytest.raises(ValueError, match=f'{size[0]}x{size[1]}.*at most 256'):
        read_image(file_of(Image.new('L', size)))


@pytest.mark.parametrize('mode', IMAGE_MODES)
def test_every_mode_can_be_asked_for(mode):
    for source in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'):
        image = read_image(file_of(Image.new(source, (4, 4))), mode)
        assert image.mode == mode and np.asarray(image).dtype == np.uint8


def test_a_compressed_tiff_of_a_tar_file_is_read(tmp_path):
    """Pillow asks for a file descriptor, which a member of a tar file has not."""
    image = Image.effect_noise((16, 16), 90)
    for compression in ('tiff_lzw', 'tiff_adobe_deflate'):
        image.save(tmp_path / 'a.tif', compression=compression)
        with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
            tar.add(tmp_path / 'a.tif', 'a.tif')
        with tarfile.open(tmp_path / 'a.tar') as tar:
            assert read_image(tar.extractfile('a.tif')).tobytes() == image.convert('RGB').tobytes()
