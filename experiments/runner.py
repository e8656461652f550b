"""Runner of the missing runs: several resumable trainings in parallel, each done once."""

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import timm
import torch
import yaml

import timm_mlcsd
from timm_mlcsd.errors import UserError

from .plan import ROOT, Run, load_datasets

__all__ = ['Runner', 'load_results']


def load_results(path: Path) -> Dict[str, Dict[str, Any]]:
    """Load the records of finished runs.

    Args:
        path: File of JSON lines; it need not exist.

    Returns:
        Records by run id.
    """
    if not path.exists():
        return {}
    return {record['id']: record for record in map(json.loads, path.read_text().splitlines())}


class Runner:
    """Trains and measures runs.

    Args:
        results: File of JSON lines, one per finished run.
        work: Folder of the runs' checkpoints and logs.
        data: Path of the data set; None for data sets that need no files.
        scale: Name of the scale, for the records.
        device: Device, as for train.py; None (default) for its default.
        deadline: Time, as of `time.monotonic`, at which runs are stopped and no more are started; they can be resumed.
            Default: none.
        test_split: Split that finished runs are measured on; default: the test split.
    """

    def __init__(
        self,
        results: Path,
        work: Path,
        data: Optional[str],
        scale: str,
        device: Optional[str] = None,
        deadline: Optional[float] = None,
        test_split: str = 'test',
    ):
        self.results = results
        self.work = work
        self.data = data
        self.scale = scale
        self.device = device
        self.deadline = deadline
        self.test_split = test_split

    def run(self, runs: List[Run], jobs: int) -> List[str]:
        """Run the missing ones of some runs.

        Args:
            runs: Runs; repeated and finished ones are skipped.
            jobs: Number of parallel runs.

        Returns:
            Error messages, one per failed run. A run that the deadline stopped is not an error.

        Raises:
            UserError: The data does not exist.
        """
        done = load_results(self.results)
        missing = list({run.id: run for run in runs if run.id not in done}.values())
        for run in missing:
            self._data_flags(run)  # reports wrong data before any run starts
        print(f'{len({run.id for run in runs})} runs, {len(missing)} missing', flush=True)
        environment = dict(os.environ)
        if jobs > 1 and not torch.cuda.is_available():
            environment.setdefault('OMP_NUM_THREADS', str(max((os.cpu_count() or 1) // jobs, 1)))
        with ThreadPoolExecutor(jobs) as pool:
            errors = list(pool.map(lambda run: self._one(run, environment), missing))
        return [error for error in errors if error]

    def _one(self, run: Run, environment: Dict[str, str]) -> Optional[str]:
        folder = self.work / run.id
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / 'lock') as lock:
            # another runner may hold it, or may have finished it in the meantime
            if lock is None or run.id in load_results(self.results) or self._deadline_passed():
                return None
            config = folder / 'flags.yaml'
            # the paper's loss has no ramp; a table may set one
            flags = {'distill_ramp': 'none', **run.flags, 'seed': run.seed, **self._data_flags(run)}
            config.write_text(yaml.safe_dump(flags, sort_keys=False))
            seconds = folder / 'seconds'
            before = float(seconds.read_text()) if seconds.exists() else 0.0
            device = ['--device', self.device] if self.device else []
            where = ['--output', str(folder), '--experiment', 'train']
            train = ['-m', 'experiments.train', '--config', str(config), *where, *device]
            if (folder / 'train' / 'last.pth.tar').exists():
                train += ['--resume', str(folder / 'train')]
            measured = folder / 'measured.json'
            start = time.monotonic()
            finished = self._call(train, folder, environment, lock)
            seconds.write_text(str(before + time.monotonic() - start))
            if finished:
                split = ['--test-split', self.test_split]
                measure = ['-m', 'experiments.measure', str(folder / 'train'), str(measured), *split, *device]
                finished = self._call(measure, folder, environment, lock)
            if not finished:
                return None if self._deadline_passed() else f'run {run.id} failed; see {folder / "log.txt"}'
            record = dict(
                id=run.id,
                dataset=run.dataset,
                scale=self.scale,
                seed=run.seed,
                flags=run.flags,
                test_split=self.test_split,
                **json.loads(measured.read_text()),
                seconds=round(float(seconds.read_text()), 1),
                versions=_versions(self.device),
            )
            with open(self.results, 'a') as f:
                fcntl.flock(f, fcntl.LOCK_EX)
                f.write(json.dumps(record) + '\n')
            mean = sum(record['test']) / len(record['test'])
            print(f'{run.id} seed {run.seed}: {self.test_split} mean {mean:.2f}, {record["seconds"]:.0f} s', flush=True)
        return None

    def _deadline_passed(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _call(self, command: List[str], folder: Path, environment: Dict[str, str], lock: int) -> bool:
        """Run a script until it ends or the deadline passes, with its output in a log file.

        The child process inherits the run's lock, so the lock holds until the child ends, even if this process dies.
        """
        with open(folder / 'log.txt', 'a') as log:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log, pass_fds=(lock,)
            )
            try:
                left = None if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)
                return process.wait(left) == 0
            except subprocess.TimeoutExpired:
                return False
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()

    def _data_flags(self, run: Run) -> Dict[str, Any]:
        """Flags of train.py that locate the data."""
        name = load_datasets()[run.dataset].get('reader', '')
        if name == 'digits':
            return dict(dataset='digits')
        if not self.data or not Path(self.data).exists():
            raise UserError(f'--data {self.data!r}: expected an existing file or folder with {run.dataset}.')
        path = Path(self.data).resolve()
        if any(path.rglob('*.parquet')):
            return dict(dataset=f'hfds/{path}', data_dir=str(self.work / 'cache'))
        if '[' in run.flags.get('train_split', ''):
            raise UserError(f'--data {self.data!r}: expected Parquet files, because this scale reads parts of a split.')
        return dict(dataset=name, data_dir=str(path))


def _versions(device: Optional[str]) -> Dict[str, str]:
    try:
        commit = subprocess.run(
            ['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True
        ).stdout
    except OSError:
        commit = ''  # git is not installed
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    return dict(
        timm_mlcsd=timm_mlcsd.__version__,
        commit=commit.strip(),
        timm=timm.__version__,
        torch=torch.__version__,
        device=torch.cuda.get_device_name(device) if 'cuda' in device else f'{device} ({platform.machine()})',
    )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[Optional[int]]:
    """Yield a file descriptor with an exclusive lock on a file; None if another process holds the lock."""
    with open(path, 'w') as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield f.fileno()
