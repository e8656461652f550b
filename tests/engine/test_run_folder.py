"""What a run writes beside its checkpoints."""

import os

import pytest
from scripts import run

from timm_mlcsd.cli import train


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a device that is always full')
@pytest.mark.parametrize('name, message', [('args.yaml', 'cannot be written'), ('summary.csv', 'what epoch 0 came to')])
def test_a_full_disk_is_one_line(name, message, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('timm_mlcsd.engine.run_folder.trim_summary', lambda *_: None)  # reading that device has no end
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / name).symlink_to('/dev/full')
    assert run(train.main, small) == 2
    error = capsys.readouterr().err
    assert message in error and 'No space left on device' in error and 'Traceback' not in error


def test_auto_goes_on_where_only_a_numbered_checkpoint_is_left(small, tmp_path, caplog):
    flags = [*small, '--resume', 'auto']
    assert run(train.main, [*flags, '--epochs', 1]) == 0
    (tmp_path / 'run' / 'last.pth.tar').unlink()
    with caplog.at_level('INFO'):
        assert run(train.main, flags) == 0
    assert 'Resuming after epoch 0' in caplog.text
    assert len((tmp_path / 'run' / 'summary.csv').read_text().splitlines()) == 3
