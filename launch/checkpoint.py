"""Checkpoints: <workdir>/checkpoints/<step> holds device state, memory (launch/memory.py) and meta.

A step folder appears whole, by a rename, or not at all. The newest few and the best one are kept.
"""

import contextlib
import dataclasses
import errno
import functools
import importlib.metadata
import json
import logging
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import launch.memory
from launch import hf_files
from nn import param
from nn.config import MTP, ModelConfig

Tree = Any

FOLDER = 'checkpoints'
HEADS = 'params/mtp/'      # how names of the heads of multi-token prediction begin in the meta data
PACKAGE = 'nacre'
TRASH = 'deleted'          # moved here first: a half-deleted step must not look like a whole one
ROOT = Path(__file__).resolve().parent.parent


class Checkpointer:
  """The checkpoints of one run. All processes call all methods, in the same order.

  Args:
    workdir: the run's folder.
    keep: how many of the newest checkpoints stay.
    best_metric: name of the metric by which one more stays; '': none.
    best_mode: 'max' or 'min'.
  """

  def __init__(self, workdir: str | Path, *, keep: int = 2, best_metric: str = '',
               best_mode: str = 'max'):
    if keep < 1:
      raise ValueError(f'checkpoint.keep is {keep}, wanted at least 1')
    if best_mode not in ('max', 'min'):
      raise ValueError(f'checkpoint.best_mode is {best_mode!r}, wanted max or min')
    self._folder = Path(workdir).absolute() / FOLDER
    self._metric, self._sign = best_metric, 1 if best_mode == 'max' else -1
    self._writing = (0, 0)                                   # step, bytes
    self._failure = ''                                       # then the manager is closed
    policies = [ocp.checkpoint_managers.LatestN(keep)]
    if best_metric:
      policies.append(ocp.checkpoint_managers.BestN(get_metric_fn=self._score, n=1))
    _quiet()
    self._manager = ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(
        best_fn=self._score,         # only makes orbax write metrics down; the policy decides
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
        todelete_subdir=TRASH))

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def save(self, step: int, state: Tree, memory: Tree, meta: Mapping[str, Any],
           metrics: Mapping[str, float] | None = None, wait: bool = False) -> bool:
    """Starts writing; the arguments may be changed or donated as soon as it returns.

    Args:
      step: steps done.
      state: pytree of arrays, typed random keys included; `load_params` wants an entry 'params'.
      memory: see launch/memory.py. Each process passes what it holds; the parts are united.
      meta: config, data contract and so on, as JSON can hold them; `provenance` is added.
      metrics: for choosing the best checkpoint.
      wait: return when it is on disk.

    Returns:
      False if this step was saved before.

    Raises:
      ValueError: something that cannot be saved, or a step before the newest checkpoint.
      OSError: this or the previous checkpoint could not be written. Nothing is saved after that.
    """
    if self._failure:
      raise OSError(errno.EIO, f'no more checkpoints are saved, because {self._failure}')
    if step in self._manager.all_steps():
      if wait:
        self.wait()
      return False
    if (latest := self._manager.latest_step()) is not None and step < latest:
      raise ValueError(f'step {step} is older than the newest checkpoint, {latest}, '
                       f'in {self._folder}')
    leaves = _leaves(state)
    document, arrays = launch.memory.encode(launch.memory.gather(memory))
    metrics = {name: float(value) for name, value in (metrics or {}).items()}
    meta = _json({**provenance(), **meta, 'step': step, 'metrics': metrics, 'leaves': leaves})
    items = {'state': ocp.args.StandardSave(state), 'memory': ocp.args.JsonSave(document),
             'meta': ocp.args.JsonSave(meta)}
    if arrays:
      items['arrays'] = ocp.args.StandardSave(arrays)
    self.wait()
    self._empty_trash()
    self._writing = step, sum(x.nbytes for x in (*jax.tree.leaves(state), *arrays.values()))
    with self._explained():
      self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)
    if wait:
      self.wait()
    return True

  def wait(self) -> None:
    """Returns when nothing is being written any more; raises OSError if that failed."""
    with self._explained():
      if not self._failure:
        self._manager.wait_until_finished()

  def check(self) -> None:
    """Raises OSError if writing in the background has failed; never waits."""
    if not self._failure and not self._manager.is_saving_in_progress():
      self.wait()

  def close(self) -> None:
    """Waits, then gives up threads and files."""
    self.wait()
    if not self._failure:
      self._manager.close()
      self._empty_trash()

  def steps(self) -> list[int]:
    """Steps with a whole checkpoint, oldest first."""
    return whole_steps(self._folder)

  def latest(self) -> int | None:
    return max(self.steps(), default=None)

  def best(self) -> int | None:
    """The step with the best best_metric, the newest of equals; None if no step has a value."""
    scores = [(self._score(self.meta(step)['metrics']), step) for step in self.steps()]
    score, step = max(scores, default=(-math.inf, None))
    return step if score > -math.inf else None

  def folder(self, step: int) -> Path:
    """The folder of a step. ValueError if there is none."""
    if step not in (steps := self.steps()):
      raise ValueError(f'{self._folder} has no checkpoint of step {step}; there are {steps}')
    return self._folder / str(step)

  def meta(self, step: int) -> dict[str, Any]:
    """The meta given to save, `provenance`, 'step', 'metrics', 'leaves' {name: [shape, dtype]}."""
    return read_meta(self.folder(step))

  def memory(self, step: int) -> Tree:
    """The memory of all processes of that time together; also of a step that is being written."""
    self.wait()
    return load_memory(self.folder(step))

  def restore(self, step: int, abstract_state: Tree) -> Tree:
    """The state of a step, placed as abstract_state says: its shardings may be of another mesh.

    Args:
      abstract_state: tree of ShapeDtypeStructs (or arrays) with shardings.

    Raises:
      ValueError: what check_state says, or that the checkpoint is damaged.
    """
    return load_state(self.folder(step), abstract_state)

  def _score(self, metrics: Mapping[str, float]) -> float:
    value = self._sign * metrics.get(self._metric, math.nan)
    return -math.inf if math.isnan(value) else value

  def _empty_trash(self) -> None:
    if jax.process_index() == 0:
      shutil.rmtree(self._folder / TRASH, ignore_errors=True)

  @contextlib.contextmanager
  def _explained(self):
    """Turns what writing raised into one OSError; what was on disk before stays as it was."""
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      step, needed = self._writing
      # Only closing waits for every thread that writes; the same error comes out of it again.
      with contextlib.suppress(Exception):
        self._manager.close()
      _remove_partial(self._folder / str(step))
      explained = _not_written(f'the checkpoint of step {step}', self._folder, needed, error,
                               f'; checkpoints of steps {self.steps()} are whole')
      self._failure = explained.strerror
      raise explained from error


def check_state(folder: str | Path, abstract_state: Tree) -> None:
  """Compares the state in a step folder with a template; reads no arrays.

  Raises:
    ValueError: names leaves that are missing, not wanted, or of another shape or dtype.
  """
  _compare(folder, read_meta(folder)['leaves'], _leaves(abstract_state), dtypes=True)


def load_state(folder: Path, abstract_state: Tree) -> Tree:
  """The state in a step folder, see Checkpointer.restore; nothing is written there."""
  check_state(folder, abstract_state)
  _quiet()
  with _damaged(folder), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
    return reader.restore(
        folder / 'state', args=ocp.args.StandardRestore(_placed(abstract_state)))


def load_memory(folder: Path) -> Tree:
  """The memory in a step folder; nothing is written there."""
  with _damaged(folder):
    document = json.loads((folder / 'memory' / 'metadata').read_text())
    arrays, sizes = {}, launch.memory.sizes(document)
    if sizes:
      template = {name: np.zeros(size, np.uint8) for name, size in sizes.items()}
      _quiet()
      with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        arrays = reader.restore(folder / 'arrays', args=ocp.args.StandardRestore(template))
    return launch.memory.decode(document, arrays)


def check_params(path: str | Path, abstract_params: Tree, cfg: ModelConfig | None = None) -> None:
  """Compares parameters that a path means, see `find`, with a template; reads no arrays.

  Heads of multi-token prediction that the template lacks are left out.

  Args:
    cfg: the model, without which Hugging Face folders cannot be read.

  Raises:
    ValueError: no checkpoint there, or parameters that are missing, not wanted or misshapen.
  """
  if cfg and hf_files.is_folder(path):
    hf_files.Opened(path, _held(cfg, abstract_params))
  else:
    _check_folder(find(path), abstract_params)


def _held(cfg: ModelConfig, abstract_params: Tree) -> ModelConfig:
  """The model of these parameters, which may be without heads of multi-token prediction."""
  return cfg if 'mtp' in abstract_params else dataclasses.replace(cfg, mtp=MTP())


def _check_folder(folder: Path, abstract_params: Tree) -> None:
  found = {k: v for k, v in read_meta(folder)['leaves'].items()
           if k.startswith('params/') and ('mtp' in abstract_params or not k.startswith(HEADS))}
  _compare(folder, found, _leaves({'params': abstract_params}), dtypes=False)


def as_saved(path: str | Path, abstract_params: Tree) -> Tree:
  """abstract_params without what path's model lacks: adapters, heads of multi-token prediction."""
  saved = optional(path)
  return {name: part for name, part in abstract_params.items()
          if name in saved or name not in ('lora', 'mtp')}


def optional(path: str | Path) -> set[str]:
  """Which of lora and mtp the model that a path means has."""
  if hf_files.is_folder(path):
    return {'mtp'} if hf_files.model_config(path).mtp.depth else set()
  return {name.split('/')[1] for name in read_meta(find(path))['leaves']
          if name.startswith(('params/lora/', HEADS))}


def load_params(path: str | Path, abstract_params: Tree, cfg: ModelConfig | None = None) -> Tree:
  """Parameters only, placed and cast as abstract_params says; see `check_params`."""
  if cfg and hf_files.is_folder(path):
    return hf_files.load(path, _held(cfg, abstract_params), abstract_params)
  folder, wanted = find(path), {'params': _placed(abstract_params)}
  _check_folder(folder, abstract_params)
  _quiet()
  with _damaged(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    how = ocp.checkpoint_utils.construct_restore_args(wanted)
    return reader.restore(folder / 'state', args=ocp.args.PyTreeRestore(
        wanted, restore_args=how, partial_restore=True))['params']


@contextlib.contextmanager
def reader(path: str | Path) -> Iterator[Callable[[str], np.ndarray]]:
  """array(name of a parameter) -> the parameter, in the dtype it was saved in; one at a time."""
  folder, leaves = find(path), read_meta(find(path))['leaves']
  _quiet()
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as opened:
    def array(name):
      if f'params/{name}' not in leaves:
        raise ValueError(f'checkpoint {folder} has no parameter {name}')
      shape, dtype = leaves[f'params/{name}']
      wanted = {'params': param.unflat({name: jax.ShapeDtypeStruct(shape, dtype)})}
      wanted = _placed(wanted)
      with _damaged(folder):
        found = opened.restore(folder / 'state', args=ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True))
      return np.asarray(jax.tree.leaves(found)[0])
    yield array


def save_params(folder: str | Path, params: Tree, meta: Mapping[str, Any]) -> None:
  """Writes parameters alone, as a step folder for `load_params`; returns when they are on disk.

  Raises:
    ValueError: the folder exists.
    OSError: it could not be written.
  """
  folder, state = Path(folder).absolute(), {'params': params}
  if folder.exists():
    raise ValueError(f'{folder} exists and is never written over')
  meta = _json({**provenance(), **meta, 'leaves': _leaves(state)})
  _quiet()
  try:
    # Floats do not compress, and trying takes as much memory again as they have.
    plain = ocp.PyTreeCheckpointHandler(use_compression=False)
    handler = ocp.CompositeCheckpointHandler(state=plain, meta=ocp.JsonCheckpointHandler())
    with ocp.Checkpointer(handler) as writer:
      writer.save(folder, args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)))
  except (OSError, ValueError, RuntimeError) as error:
    _remove_partial(folder)
    needed = sum(x.nbytes for x in jax.tree.leaves(params))
    raise _not_written('parameters', folder.parent, needed, error) from error


def find(path: str | Path) -> Path:
  """The step folder that a path means: itself, or a workdir's newest whole step.

  Raises:
    ValueError: the path means none.
  """
  path = Path(path).absolute()
  if not path.is_dir():
    raise ValueError(f'{path} is no folder; wanted a workdir, or the folder of a checkpoint or of '
                     'a Hugging Face model')
  if 'orbax-checkpoint-tmp' in path.name:
    raise ValueError(f'{path} was never finished; the run stopped while writing it')
  if (path / 'state').is_dir() and (path / 'meta').is_dir():
    return path
  if (path / FOLDER).is_dir():
    if not (steps := whole_steps(path / FOLDER)):
      raise ValueError(f'{path} is a workdir without a whole checkpoint')
    return path / FOLDER / str(steps[-1])
  if hf_files.is_folder(path):
    raise ValueError(f'{path} is a Hugging Face folder, and a checkpoint is wanted; '
                     'launch/convert.py makes one of it')
  raise ValueError(f'{path} is no checkpoint: a workdir has a folder {FOLDER}, a step folder has '
                   'state and meta')


def whole_steps(folder: str | Path) -> list[int]:
  """Numbers of the step folders that were finished, ascending."""
  return sorted(ocp.path.step.checkpoint_steps(folder)) if Path(folder).is_dir() else []


def read_meta(folder: str | Path) -> dict[str, Any]:
  """The meta data of a step folder."""
  with _damaged(folder):
    return json.loads((Path(folder) / 'meta' / 'metadata').read_text())


def provenance() -> dict[str, Any]:
  """What produced a checkpoint: versions, revision of the source, number of processes."""
  versions = {'python': platform.python_version()}
  for name in ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', PACKAGE):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = ''                        # this package, when it runs from a clone
  return {'versions': versions, 'revision': revision(), 'processes': jax.process_count()}


@functools.cache
def revision(folder: Path = ROOT) -> str:
  """The commit of the source, with '+changes' if files differ; '' without git or a clone."""
  def git(*command: str) -> str:
    return subprocess.run(['git', '-C', str(folder), *command], check=True, capture_output=True,
                          text=True, timeout=10).stdout.strip()
  try:
    if Path(git('rev-parse', '--show-toplevel')).resolve() != folder:
      return ''                                  # installed inside somebody else's clone
    changes = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+changes' if changes else '')
  except (OSError, subprocess.SubprocessError):
    return ''


def _leaves(tree: Tree) -> dict[str, list]:
  """{'a/b/c': [shape, dtype]}: what a checkpoint has to agree with."""
  leaves = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if not hasattr(x, 'shape') or not hasattr(x, 'dtype'):
      raise ValueError(f'{name} is a {type(x).__name__}; a state holds arrays')
    leaves[name] = [list(x.shape), str(x.dtype)]
  return leaves


def _compare(folder: Path, found: dict[str, list], wanted: dict[str, list], *, dtypes: bool):
  show = lambda leaf: f'{leaf[1]}{leaf[0]}'
  faults = []
  for name in sorted(found.keys() | wanted.keys()):
    if name not in found:
      faults.append(f'{name} is missing in the checkpoint, wanted {show(wanted[name])}')
    elif name not in wanted:
      faults.append(f'{name} is in the checkpoint, {show(found[name])}, but not wanted')
    elif found[name] != wanted[name] and (dtypes or found[name][0] != wanted[name][0]):
      faults.append(f'{name} is {show(found[name])} in the checkpoint, '
                    f'wanted {show(wanted[name])}')
  if faults:
    more = f'; and {len(faults) - 5} more' if len(faults) > 5 else ''
    raise ValueError(f'checkpoint {folder} does not fit: ' + '; '.join(faults[:5]) + more)


def _placed(tree: Tree) -> Tree:
  """ShapeDtypeStructs with a sharding each; without one a leaf goes to the default device."""
  def one(x):
    sharding = getattr(x, 'sharding', None)
    if sharding is None:
      if jax.process_count() > 1:
        raise ValueError('with several processes every leaf of the template needs a sharding')
      sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(one, tree)


def _json(meta: Mapping[str, Any]) -> dict[str, Any]:
  """A copy, so that nothing changes while it is written in the background."""
  try:
    return json.loads(json.dumps(meta))
  except TypeError as error:
    raise ValueError(f'meta cannot be written as JSON: {error}') from error


@contextlib.contextmanager
def _damaged(folder: str | Path):
  try:
    yield
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(f'checkpoint {folder} cannot be read: {_first_line(error)}') from error


def _remove_partial(folder: Path) -> None:
  """Makes room again. Threads that are still writing may defeat it; the next start tries again."""
  for _ in range(10 if jax.process_index() == 0 else 0):
    for partial in folder.parent.glob(f'{folder.name}.orbax-checkpoint-tmp*'):
      shutil.rmtree(partial, ignore_errors=True)
    time.sleep(0.02)


def _not_written(what: str, folder: Path, needed: int, error: Exception, more: str = '') -> OSError:
  # Python's files report a full disk by number, tensorstore by text.
  if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT) or any(
      text in str(error) for text in ('No space left on device', 'Disk quota exceeded')):
    free = shutil.disk_usage(folder).free
    return OSError(errno.ENOSPC, f'no room for {what} in {folder}: about {needed:,} bytes needed, '
                                 f'{free:,} free{more}')
  return OSError(getattr(error, 'errno', None) or errno.EIO,
                 f'{what} could not be written to {folder}: {_first_line(error)}{more}')


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]


def _quiet() -> None:
  """Keeps orbax from logging, with tracebacks, what it also raises and we explain."""
  logging.getLogger('absl').addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
  return 'orbax' not in Path(record.pathname).parts or record.levelno >= logging.CRITICAL
