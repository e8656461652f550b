"""The official zip file's layout, in small: labelled images become folders, or nothing is left."""

import hashlib
import http.server
import io
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

from timm_mlcsd.data.tiny_imagenet import main, unpack

CLASSES = ('n01443537', 'n01629819')


def jpeg(grey=False):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64) if grey else (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'JPEG')
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / 'tiny-imagenet-200.zip'
    root = 'tiny-imagenet-200'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as f:
        f.writestr(f'{root}/wnids.txt', '\n'.join(CLASSES))
        for name in CLASSES:
            f.writestr(f'{root}/train/{name}/{name}_boxes.txt', '')
            for i in range(3):
                f.writestr(f'{root}/train/{name}/images/{name}_{i}.JPEG', jpeg(grey=i == 0))
        f.writestr(
            f'{root}/val/val_annotations.txt',
            f'val_0.JPEG\t{CLASSES[1]}\t0\t1\t2\t3\nval_1.JPEG\t{CLASSES[0]}\t0\t1\t2\t3\n',
        )
        for i in range(2):
            f.writestr(f'{root}/val/images/val_{i}.JPEG', jpeg())
        f.writestr(f'{root}/test/images/test_0.JPEG', jpeg())
        f.writestr(f'{root}/train/../../outside/images/x.JPEG', jpeg())  # hostile
    return path


def test_labelled_images_become_folders(archive, tmp_path):
    folder = tmp_path / 'there' / 'tiny'
    assert unpack(folder, archive) == dict(train=6, test=2)
    assert sorted(p.name for p in folder.iterdir()) == ['test', 'train']
    assert [p.name for p in (folder / 'test' / CLASSES[1]).iterdir()] == ['val_0.JPEG']
    assert not list(tmp_path.rglob('x.JPEG')) and [p.name for p in folder.parent.iterdir()] == ['tiny']
    train = create_dataset('', root=str(folder), split='train')
    assert len(train) == 6 and all(train[i][0].mode == 'RGB' for i in range(6))  # grey ones too


def test_a_folder_with_something_in_it_is_left_alone(archive, tmp_path):
    (tmp_path / 'tiny').mkdir()
    (tmp_path / 'tiny' / 'mine').touch()
    with pytest.raises(ValueError, match='exists already'):
        unpack(tmp_path / 'tiny', archive)
    assert [p.name for p in (tmp_path / 'tiny').iterdir()] == ['mine']


@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'other', 'missing'])
def test_damaged_files_leave_nothing(damage, archive, tmp_path, capsys):
    data = bytearray(archive.read_bytes())
    if damage == 'truncated':
        archive.write_bytes(data[: len(data) // 2])
    elif damage == 'flipped':
        data[len(data) // 2] ^= 255
        archive.write_bytes(data)
    elif damage == 'other':
        with zipfile.ZipFile(archive, 'w') as f:
            f.writestr('readme.txt', 'hello')
    else:
        archive.unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path / 'tiny'), '--zip', str(archive)])
    assert exit.value.code == 2 and 'cannot be read as the zip file' in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def server(archive):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(archive.read_bytes())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}/tiny.zip'
        httpd.shutdown()


def test_download_is_checked(server, archive, tmp_path, monkeypatch):
    monkeypatch.delenv('http_proxy', raising=False)
    with pytest.raises(ValueError, match='cannot be downloaded'):
        unpack(tmp_path / 'tiny', url=server)  # not the official file
    assert not (tmp_path / 'tiny').exists()
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    assert unpack(tmp_path / 'tiny', url=server, md5=md5)['train'] == 6
