"""Energy that networks take, where the platform tells: RAPL on a CPU, NVML on a GPU, Apple's chips; by zeus."""

import importlib.util
import time
import warnings
from typing import Any, Callable, Optional

import torch

__all__ = ['EnergyMeter']


class EnergyMeter:
    """Energy that a function takes: of the CPU with its memory, and of a GPU if the function runs on one.

    Other work on the machine counts, too.

    Args:
        monitor: Monitor of zeus.
    """

    def __init__(self, monitor: Any):
        self.monitor = monitor

    @staticmethod
    def find(device: torch.device) -> Optional['EnergyMeter']:
        """A meter for a device; None if zeus is not installed or the platform does not tell."""
        if importlib.util.find_spec('zeus') is None:
            return None
        from zeus.monitor import ZeusMonitor

        index = device.index if device.index is not None else 0
        monitor = ZeusMonitor(gpu_indices=[index] if device.type == 'cuda' else [])
        meter = EnergyMeter(monitor)
        # a short try, because drivers and permissions decide what is told
        return meter if meter._joules(lambda: None) is not None else None

    def joules(self, run: Callable[[], Any], seconds: float) -> float:
        """Mean energy of a call, in joules.

        Args:
            run: Function to call repeatedly.
            seconds: Least time to measure over; counters are updated only every 1 to 100 ms.
        """
        calls = 0

        def repeat() -> None:
            nonlocal calls
            start = time.perf_counter()
            while calls == 0 or time.perf_counter() - start < seconds:
                run()
                calls += 1

        total = self._joules(repeat)
        assert total is not None  # as in `find`
        return total / calls

    def _joules(self, run: Callable[[], Any]) -> Optional[float]:
        """Energy of one call; None if the platform does not tell."""
        self.monitor.begin_window('mlcsd', restart=True)
        run()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # zeus warns of windows that are shorter than a counter's period
            measured = self.monitor.end_window('mlcsd')
        parts = [measured.gpu_energy, measured.cpu_energy, measured.dram_energy]
        values = [value for part in parts if part for value in part.values()]
        if measured.soc_energy is not None:
            soc = measured.soc_energy
            values += [v / 1000 for v in (soc.cpu_total_mj, soc.dram_mj, soc.gpu_mj) if v is not None]
        return sum(values) if values else None
