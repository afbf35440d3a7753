"""Runs of launch/train.py for tests: in this process or in others, and what they leave behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from launch import checkpoint, cli, loop, metrics, train

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / 'configs' / 'tiny.py'
# What differs between two equal runs.
CLOCKS = ('time', 'seconds', 'tokens_per_second')


def config_file(folder):
  """A config like tiny, without its generated task: data are read from files."""
  path = Path(folder) / 'config.py'
  path.write_text('''
from configs import base, tiny

def get_config():
  c = tiny.get_config()
  c.arithmetic.update(base.get_config().arithmetic)
  c.sft.data.format = c.rl.data.format = 'problem'
  return c
''')
  return path


def pretraining(folder):
  """Overrides for a small phase of pretraining, on a file that is written."""
  path = Path(folder) / 'text.txt'
  path.write_bytes(bytes(range(32, 127)) * 12)
  return 'pretrain.rows=8', 'pretrain.length=16', f'pretrain.data.files={path}'


def arguments(workdir, *overrides, config=TINY):
  """The command line of a run on one device without a report; 'a.b=v' overrides a key."""
  options = ('mesh.data=1', 'report=false', 'log.tensorboard=false', *overrides)
  return ['--config', str(config), '--workdir', str(workdir),
          *(o if o.startswith('--') else f'--config.{o}' for o in options)]


def run(workdir, *overrides, **options):
  """Trains in this process; returns the exit status."""
  return train.main(arguments(workdir, *overrides, **options))


def refused(monkeypatch, capsys, workdir, *overrides, **options):
  """The one line on stderr of a run that must end with status 2 before anything is compiled."""
  def never(*args, **kwargs):
    raise AssertionError('the run began')

  monkeypatch.setattr(loop, 'train', never)
  line = failed(monkeypatch, capsys, workdir, *overrides, **options)
  left = {p.name for p in Path(workdir).iterdir()} if Path(workdir).exists() else set()
  assert left <= {'data'}, left                       # indexes of files, nothing of a run
  return line


def failed(monkeypatch, capsys, workdir, *overrides, **options):
  """The one line on stderr of a run that must end with status 2."""
  monkeypatch.setattr(sys, 'argv', ['train.py', *arguments(workdir, *overrides, **options)])
  capsys.readouterr()
  with pytest.raises(SystemExit) as ended:
    cli.run(train.main)
  lines = capsys.readouterr().err.splitlines()
  assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith('error: '), lines
  return lines[0].removeprefix('error: ')


def start(workdir, *overrides, devices=8, flags=(), **options):
  """Starts a run as people do, in a process with so many devices."""
  environment = os.environ | {
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}', 'PYTHONUNBUFFERED': '1'}
  command = [sys.executable, str(ROOT / 'launch' / 'train.py'), *flags,
             *arguments(workdir, *overrides, **options)]
  return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)


def rewound(workdir, step, to):
  """A copy of a finished run as it would be, had it been killed right after it saved `step`.

  Lines of metrics that come later stay, except where the next phase begins: those are never cut.
  """
  shutil.copytree(workdir, to)
  for later in steps(to):
    if later > step:
      shutil.rmtree(Path(to) / checkpoint.FOLDER / str(later))
  phase = checkpoint.read_meta(Path(to) / checkpoint.FOLDER / str(step))['phase']
  path = Path(to) / metrics.METRICS
  lines = path.read_text().splitlines(keepends=True)
  ahead = lambda line: line['step'] == step and line['phase'] != phase
  path.write_text(''.join(line for line in lines if not ahead(json.loads(line))))
  return to


def steps(workdir):
  return checkpoint.whole_steps(Path(workdir) / checkpoint.FOLDER)


def state(workdir, step):
  """{name: array} of all that a checkpoint holds of the devices."""
  folder = Path(workdir) / checkpoint.FOLDER / str(step) / 'state'
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    shapes = reader.metadata(folder).item_metadata
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes.tree)
    tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=how))
  return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def memory(workdir, step):
  """What feed and methods remember, as the text of the checkpoint."""
  folder = Path(workdir) / checkpoint.FOLDER / str(step) / 'memory'
  return json.loads(next(folder.glob('metadata')).read_text())


def assert_same_checkpoint(a, b, step):
  """Bit for bit."""
  left, right = state(a, step), state(b, step)
  assert left.keys() == right.keys() and len(left) > 20
  for name, x in left.items():
    np.testing.assert_array_equal(x, right[name], err_msg=name)
  assert memory(a, step) == memory(b, step)


def logged(workdir, evaluations=False):
  """{(phase, step): {metric: number}} of the steps, or of the evaluations, without clocks."""
  found = {}
  for line in metrics.read_metrics(workdir):
    kept = {k: v for k, v in line.items()
            if k not in (*CLOCKS, 'step', 'phase') and not k.startswith('time/')}
    if ('learning_rate' in kept) != evaluations:
      found[line['phase'], line['step']] = kept
  return found
