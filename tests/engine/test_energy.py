"""Energy of networks, from counters as Linux shows them."""

import itertools
import json

import pytest
import torch
from scripts import run
from test_static_networks import small

from timm_mlcsd.cli import validate
from timm_mlcsd.engine import static_networks
from timm_mlcsd.engine.energy import EnergyMeter

rapl = pytest.importorskip('zeus.device.cpu.rapl')
CPU = torch.device('cpu')


@pytest.fixture
def counters(tmp_path, monkeypatch):
    """Folders of a CPU's and its memory's energy counters, in the place of the system's."""
    import zeus.device.cpu

    cpu = tmp_path / 'powercap' / 'intel-rapl:0'
    memory = cpu / 'intel-rapl:0:0'
    memory.mkdir(parents=True)
    for folder, name in ((cpu, 'package-0'), (memory, 'dram')):
        for file, text in (('name', name), ('energy_uj', '0'), ('max_energy_range_uj', '262143328850')):
            (folder / file).write_text(text)
    monkeypatch.setattr(rapl, 'RAPL_DIR', str(cpu.parent))
    monkeypatch.setattr(rapl.RAPLFile, 'wraparound_tracker', type('', (), {'get_num_wraparounds': lambda self: 0})())
    monkeypatch.setattr(zeus.device.cpu, '_cpus', None)
    rapl.rapl_is_available.cache_clear()
    yield cpu / 'energy_uj', memory / 'energy_uj'
    rapl.rapl_is_available.cache_clear()


def test_joules_of_a_call(counters):
    meter = EnergyMeter.find(CPU)
    count = itertools.count(1)

    def work():
        n = next(count)
        counters[0].write_text(str(3_000_000 * n))
        counters[1].write_text(str(500_000 * n))

    assert meter.joules(work, 0.02) == pytest.approx(3.5)
    assert next(count) > 2  # repeated until the time was over


def test_nothing_where_the_platform_does_not_tell(tmp_path, monkeypatch):
    import zeus.device.cpu

    monkeypatch.setattr(rapl, 'RAPL_DIR', str(tmp_path / 'none'))
    monkeypatch.setattr(rapl, 'CONTAINER_RAPL_DIR', str(tmp_path / 'none'))
    monkeypatch.setattr(zeus.device.cpu, '_cpus', None)
    rapl.rapl_is_available.cache_clear()
    assert EnergyMeter.find(CPU) is None
    rapl.rapl_is_available.cache_clear()
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert EnergyMeter.find(CPU) is None


def test_a_column_of_validate(adaptive_run, folder, counters, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(static_networks, 'ENERGY_SECONDS', 0.0)

    class Meter:
        """A counter that takes 7 joules per call."""

        def joules(self, run, seconds):
            run()
            return 7.0

    monkeypatch.setattr(EnergyMeter, 'find', staticmethod(lambda device: Meter()))
    other = small(tmp_path / 'small', num_classes=3)
    flags = [folder, '--checkpoint', adaptive_run, '--split', 'test', '--device', 'cpu', '-j', 0, '-b', 5, '--adaptive']
    more = ['--budget', '97%', '--against', other, '--results-file', tmp_path / 'a.json']
    assert run(validate.main, [*flags, *more]) == 0
    assert 'mJ per image' in capsys.readouterr().out
    results = json.loads((tmp_path / 'a.json').read_text())
    images = results['num_samples']
    assert [row['joules'] for row in results['adaptive']['against']] == [pytest.approx(7 / images)] * 3
