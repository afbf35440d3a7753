"""What was saved comes back, on any mesh; what is not whole does not exist; faults have names."""

import errno
import resource
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from launch import checkpoint
from launch.checkpoint import Checkpointer

CHILD = Path(__file__).with_name('checkpoint_child.py')
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


@struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: object
  key: jax.Array


def mesh(**axes):
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def example(on, seed=0):
  """All that occurs: split and replicated arrays, three dtypes, NamedTuples, a typed key."""
  rng = np.random.default_rng(seed)
  place = lambda x, *axes: jax.device_put(x, NamedSharding(on, PartitionSpec(*axes)))
  params = {'embed': {'table': place(rng.standard_normal((16, 8)).astype(np.float32), 'fsdp')},
            'blocks': {'0': {'scale': place(rng.standard_normal((2, 4)).astype(jnp.bfloat16))}}}
  return State(place(np.int32(7)), params, OPTIMIZER.init(params), place(jax.random.key(seed)))


def abstract(state, on):
  def one(x):
    spec = PartitionSpec('fsdp') if x.shape == (16, 8) else PartitionSpec()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(on, spec))
  return jax.tree.map(one, state)


def bits(tree):
  raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return [(x.dtype, x.shape, np.asarray(raw(x)).tobytes()) for x in jax.tree.leaves(tree)]


def tiny(value=0.0):
  return {'params': {'w': jnp.full(4, value)}}


@pytest.fixture
def checkpoints(tmp_path):
  with Checkpointer(tmp_path) as c:
    yield c


@pytest.mark.parametrize('axes', [{'data': 2, 'fsdp': 4}, {'fsdp': 2, 'data': 4}, {'fsdp': 8}])
def test_what_was_saved_comes_back_on_any_mesh(checkpoints, axes):
  state = example(mesh(data=2, fsdp=4))
  memory = {'method': {'seen': np.arange(5), 'none': np.zeros(0)}, 'reader': {'0': {'next': 3}}}
  checkpoints.save(7, state, memory, {'config': {'a': [1, None]}}, wait=True)

  wanted = abstract(state, mesh(**axes))
  restored = checkpoints.restore(7, wanted)

  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert bits(restored) == bits(state)
  assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, wanted)
  again = checkpoints.memory(7)
  assert again['method']['seen'].tolist() == [0, 1, 2, 3, 4]
  assert again['method']['none'].shape == (0,)
  assert again['reader'] == memory['reader']
  assert checkpoints.meta(7)['config'] == {'a': [1, None]}


def test_memory_without_arrays(checkpoints):
  checkpoints.save(1, tiny(), {'reader': {'0': {'next': 3}}}, {}, wait=True)
  assert checkpoints.memory(1) == {'reader': {'0': {'next': 3}}}


@pytest.mark.parametrize('spec', [PartitionSpec('fsdp'), PartitionSpec()])
def test_arguments_may_be_donated_or_changed_once_save_returns(checkpoints, spec):
  values = np.arange(1 << 20, dtype=np.float32)
  x = jax.device_put(values.copy(), NamedSharding(mesh(fsdp=8), spec))
  host, memory, meta = values.copy(), {'seen': np.arange(3), 'deep': {'n': 1}}, {'config': {'a': 1}}
  wanted = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

  checkpoints.save(1, {'x': x, 'host': host}, memory, meta)
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  jax.block_until_ready(overwrite(overwrite(x)))
  host[:], memory['seen'][:], memory['deep']['n'], meta['config']['a'] = -1, -1, -1, -1
  checkpoints.wait()

  restored = checkpoints.restore(1, {'x': wanted, 'host': wanted})
  np.testing.assert_array_equal(restored['x'], values)
  np.testing.assert_array_equal(restored['host'], values)
  assert checkpoints.memory(1)['seen'].tolist() == [0, 1, 2]
  assert checkpoints.memory(1)['deep'] == {'n': 1}
  assert checkpoints.meta(1)['config'] == {'a': 1}


@pytest.mark.parametrize('options, scores, kept, best', [
    (dict(keep=2), [1, 2, 5, 4, 3], [4, 5], None),
    (dict(keep=2, best_metric='score'), [1, 2, 5, 4, 3], [3, 4, 5], 3),
    (dict(keep=1, best_metric='score'), [1, 2, 5, 4, 3], [3, 5], 3),        # 5 stays, though worse
    (dict(keep=1, best_metric='score', best_mode='min'), [3, 1, 2, 5, 4], [2, 5], 2),
    (dict(keep=1, best_metric='score'), [1, 5, 5, 2], [3, 4], 3),           # the newest of equals
    (dict(keep=1, best_metric='score'), [1, float('nan'), None, 0], [1, 4], 1),
    (dict(keep=1, best_metric='score', best_mode='min'), [1, float('nan'), None, 2], [1, 4], 1),
    (dict(keep=1, best_metric='score'), [None, None, None], [3], None)])
def test_the_newest_and_the_best_are_kept(tmp_path, options, scores, kept, best):
  checkpoints = Checkpointer(tmp_path, **options)
  for step, score in enumerate(scores, 1):
    if step % 2 == 0:                # half of the steps are saved after a restart
      checkpoints.close()
      checkpoints = Checkpointer(tmp_path, **options)
    metrics = {'other': -step} if score is None else {'other': -step, 'score': score}
    checkpoints.save(step, tiny(), {}, {}, metrics)
  checkpoints.wait()
  assert checkpoints.steps() == kept
  assert checkpoints.best() == best
  assert checkpoints.latest() == len(scores)
  checkpoints.close()


def test_steps_are_removed_by_a_rename(tmp_path, monkeypatch):
  with Checkpointer(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, tiny(), {}, {}, wait=True)
    files = sorted(p.name for p in checkpoints.folder(1).rglob('*'))
    checkpoints.save(2, tiny(), {}, {}, wait=True)
    trash = tmp_path / 'checkpoints' / checkpoint.TRASH
    assert sorted(p.name for p in (trash / '1').rglob('*')) == files
  assert not trash.exists()


def test_a_step_is_saved_once_and_never_before_an_older_one(checkpoints):
  assert checkpoints.latest() is None
  assert checkpoints.save(5, tiny(1.0), {}, {})
  assert not checkpoints.save(5, tiny(2.0), {}, {}, wait=True)
  np.testing.assert_array_equal(checkpoints.restore(5, tiny())['params']['w'], 1.0)
  with pytest.raises(ValueError, match='step 4 is older than the newest checkpoint, 5'):
    checkpoints.save(4, tiny(), {}, {})
  with pytest.raises(ValueError, match=r'no checkpoint of step 4; there are \[5\]'):
    checkpoints.restore(4, tiny())


def test_misfits_are_named_with_both_shapes(checkpoints):
  on = mesh(fsdp=8)
  state = example(on)
  checkpoints.save(1, state, {}, {}, wait=True)
  wanted = abstract(state, on)
  table = wanted.params['embed']['table']
  other = lambda table: wanted.replace(params={**wanted.params, 'embed': table})

  def refuses(template, *texts):
    with pytest.raises(ValueError) as error:
      checkpoints.restore(1, template)
    for text in texts:
      assert text in str(error.value)

  refuses(other({'table': jax.ShapeDtypeStruct((24, 8), table.dtype, sharding=table.sharding)}),
          'params/embed/table is float32[16, 8] in the checkpoint, wanted float32[24, 8]')
  refuses(other({'table': jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=table.sharding)}),
          'params/embed/table is float32[16, 8] in the checkpoint, wanted bfloat16[16, 8]')
  refuses(other({'table': table, 'bias': table}),
          'params/embed/bias is missing in the checkpoint, wanted float32[16, 8]')
  refuses(other({}), 'params/embed/table is in the checkpoint, float32[16, 8], but not wanted')
  refuses(wanted.replace(opt_state=(), params={}), 'and 2 more',
          'opt_state/1/0/count is in the checkpoint, int32[], but not wanted')


def test_what_cannot_be_saved_is_refused_at_once(checkpoints):
  with pytest.raises(ValueError, match='params/rate is a float'):
    checkpoints.save(1, {'params': {'rate': 0.1}}, {}, {})
  with pytest.raises(ValueError, match='memory/grpo is a set'):
    checkpoints.save(1, tiny(), {'grpo': {1}}, {})
  with pytest.raises(ValueError, match='meta cannot be written as JSON.*set'):
    checkpoints.save(1, tiny(), {}, {'config': {1}})
  assert checkpoints.steps() == []


def test_a_process_killed_while_saving_leaves_the_older_checkpoint(tmp_path):
  child = subprocess.run([sys.executable, str(CHILD), 'killed', str(tmp_path)], timeout=120,
                         capture_output=True)
  assert child.returncode == -9, child.stderr.decode()[-2000:]
  left = sorted((tmp_path / 'checkpoints').iterdir())
  assert len(left) == 2 and left[1].name.startswith('2.'), f'not killed while writing: {left}'
  with pytest.raises(ValueError, match='never finished'):
    checkpoint.find(left[1])
  shutil.copytree(left[1], left[1].with_name('7.orbax-checkpoint-tmp'))

  with Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1] and checkpoints.latest() == 1
    assert checkpoints.memory(1) == {'cursor': 1}
    template = {'params': {'w': jax.ShapeDtypeStruct((1 << 22,), np.float32)}}
    before = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32)
    np.testing.assert_array_equal(checkpoints.restore(1, template)['params']['w'], before)
    assert checkpoints.save(2, tiny(2.0), {}, {}, wait=True)
    np.testing.assert_array_equal(checkpoints.restore(2, tiny())['params']['w'], 2.0)
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['1', '2']


class Write:
  """The future of a write in the background that ends as it is told."""

  def __init__(self, end):
    self.result = end

  async def async_save(self, *args, **kwargs):
    return [self]


@pytest.mark.parametrize('cause', [
    OSError(errno.ENOSPC, 'as Python says it'),
    ValueError('RESOURCE_EXHAUSTED: as tensorstore says it: No space left on device')])
def test_a_full_disk_is_explained_and_harms_no_older_checkpoint(tmp_path, monkeypatch, cause):
  def full(timeout=None):
    raise cause

  checkpoints = Checkpointer(tmp_path, keep=1)
  checkpoints.save(1, tiny(1.0), {}, {}, wait=True)
  with monkeypatch.context() as patch:
    patch.setattr(ocp.JsonCheckpointHandler, 'async_save', Write(full).async_save)
    checkpoints.save(2, tiny(2.0), {'seen': np.zeros(100, np.uint8)}, {})   # goes wrong later
    with pytest.raises(OSError) as error:
      checkpoints.save(3, tiny(3.0), {}, {})
  assert error.value.errno == errno.ENOSPC
  folder = tmp_path / 'checkpoints'
  for text in (f'no room for the checkpoint of step 2 in {folder}: about 116 bytes needed, ',
               ' free', 'checkpoints of steps [1] are whole'):
    assert text in str(error.value)

  with pytest.raises(OSError, match='no more checkpoints .* step 2 in'):
    checkpoints.save(3, tiny(3.0), {}, {})
  checkpoints.close()

  with Checkpointer(tmp_path, keep=1) as checkpoints:
    np.testing.assert_array_equal(checkpoints.restore(1, tiny())['params']['w'], 1.0)
    assert checkpoints.save(2, tiny(4.0), {}, {}, wait=True)
  assert [p.name for p in folder.iterdir()] == ['2']


def test_parameters_that_cannot_be_written_leave_nothing(tmp_path, monkeypatch):
  def full(timeout=None):
    raise OSError(errno.ENOSPC, 'full')

  monkeypatch.setattr(ocp.JsonCheckpointHandler, 'async_save', Write(full).async_save)
  with pytest.raises(OSError, match=f'no room for parameters in {tmp_path}: about 16 bytes needed'):
    checkpoint.save_params(tmp_path / 'reference', tiny()['params'], {})
  assert list(tmp_path.iterdir()) == []


def test_a_check_does_not_wait(checkpoints, monkeypatch):
  go_on = threading.Event()
  slow = Write(lambda timeout=None: go_on.wait(60))
  monkeypatch.setattr(ocp.JsonCheckpointHandler, 'async_save', slow.async_save)
  checkpoints.save(1, tiny(), {}, {})
  for _ in range(3):
    checkpoints.check()
  assert checkpoints.steps() == []
  go_on.set()
  checkpoints.wait()
  assert checkpoints.steps() == [1]


def test_what_is_written_in_the_background_is_a_copy(checkpoints, monkeypatch):
  given, written = {'config': {'a': [1]}}, []
  save = ocp.args.JsonSave
  monkeypatch.setattr(ocp.args, 'JsonSave', lambda item: written.append(item) or save(item))
  checkpoints.save(1, tiny(), given, given)
  copies = [item['config'] for item in written if 'config' in item]
  assert copies == [given['config']] * 2                     # memory and meta
  for copy in copies:
    assert copy is not given['config'] and copy['a'] is not given['config']['a']


@pytest.mark.parametrize('way', ['check', 'close'])
def test_a_refused_write_is_explained(tmp_path, way):
  """The system refuses files above 64 kB, so tensorstore itself fails, in its own threads."""
  checkpoints = Checkpointer(tmp_path)
  checkpoints.save(1, tiny(1.0), {}, {}, wait=True)
  noise = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
  try:
    with pytest.raises(OSError, match=r'of step 2 could not .*File too large.*\[1\] are whole'):
      checkpoints.save(2, {'params': {'w': noise}}, {}, {})
      while way == 'check':
        checkpoints.check()
      checkpoints.close()
    checkpoints.close()                                      # says it once
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  with Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1]
    np.testing.assert_array_equal(checkpoints.restore(1, tiny())['params']['w'], 1.0)


def test_a_damaged_checkpoint_is_named(checkpoints):
  checkpoints.save(1, tiny(), {}, {}, wait=True)
  shutil.rmtree(checkpoints.folder(1) / 'state' / 'd')
  with pytest.raises(ValueError, match=f'checkpoint {checkpoints.folder(1)} cannot be read'):
    checkpoints.restore(1, tiny())


def test_parameters_alone(tmp_path):
  state = example(mesh(data=2, fsdp=4))
  with Checkpointer(tmp_path / 'run') as checkpoints:
    checkpoints.save(1, state, {}, {})
    checkpoints.save(2, state.replace(params=jax.tree.map(lambda x: x + 1, state.params)), {}, {})
  wanted = abstract(state, mesh(fsdp=8)).params

  newest = checkpoint.load_params(tmp_path / 'run', wanted)
  older = checkpoint.load_params(tmp_path / 'run' / 'checkpoints' / '1', wanted)

  assert bits(older) == bits(state.params)
  assert bits(newest) == bits(jax.tree.map(lambda x: x + 1, state.params))
  assert jax.tree.map(lambda x: x.sharding, older) == jax.tree.map(lambda x: x.sharding, wanted)
  half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), wanted)
  assert bits(checkpoint.load_params(tmp_path / 'run', half)) == bits(
      jax.tree.map(lambda x: x.astype(jnp.bfloat16), newest))

  checkpoint.save_params(tmp_path / 'reference', older, {'config': {'a': 1}})
  assert bits(checkpoint.load_params(tmp_path / 'reference', wanted)) == bits(older)
  assert checkpoint.read_meta(checkpoint.find(tmp_path / 'reference'))['config'] == {'a': 1}
  with pytest.raises(ValueError, match='exists'):
    checkpoint.save_params(tmp_path / 'reference', older, {})
  short = {**wanted, 'embed': {'table': jax.ShapeDtypeStruct((3,), np.float32)}}
  with pytest.raises(ValueError, match=r'embed/table is float32\[16, 8\] .* wanted float32\[3\]'):
    checkpoint.load_params(tmp_path / 'run', short)
  with pytest.raises(ValueError, match='params/blocks/0/scale is in the checkpoint, .* not wanted'):
    checkpoint.load_params(tmp_path / 'run', {'embed': wanted['embed']})


def test_what_is_no_checkpoint(tmp_path):
  with pytest.raises(ValueError, match='is no folder'):
    checkpoint.find(tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='is no checkpoint'):
    checkpoint.find(tmp_path)
  (tmp_path / 'model.safetensors').touch()
  with pytest.raises(ValueError, match='Hugging Face'):
    checkpoint.find(tmp_path)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(ValueError, match='without a whole checkpoint'):
    checkpoint.find(tmp_path)


@pytest.mark.parametrize('options', [dict(keep=0), dict(best_mode='top')])
def test_options_that_make_no_sense(tmp_path, options):
  with pytest.raises(ValueError, match='checkpoint.'):
    Checkpointer(tmp_path, **options)


def test_meta_says_what_produced_the_checkpoint(checkpoints):
  metrics = {'accuracy': np.float32(0.5)}
  checkpoints.save(3, tiny(), {}, {'contract': {'seed': 1}}, metrics, wait=True)
  meta = checkpoints.meta(3)
  assert meta['contract'] == {'seed': 1} and meta['step'] == 3
  assert meta['metrics'] == {'accuracy': 0.5}
  assert meta['versions']['jax'] == jax.__version__ and meta['versions']['python'].startswith('3.')
  assert meta['processes'] == 1 and meta['revision'] == checkpoint.revision()
  assert meta['leaves'] == {'params/w': [[4], 'float32']}


def test_revision(tmp_path):
  def git(*command):
    who = ['-c', 'user.name=n', '-c', 'user.email=e']
    subprocess.run(['git', '-C', str(tmp_path), *who, *command], check=True, capture_output=True)

  assert checkpoint.revision(tmp_path) == ''               # no clone
  checkpoint.revision.cache_clear()
  git('init')
  (tmp_path / 'file').write_text('a')
  git('add', 'file')
  git('commit', '-m', 'first')
  commit = checkpoint.revision(tmp_path)
  assert len(commit) == 40
  (tmp_path / 'inside').mkdir()
  assert checkpoint.revision(tmp_path / 'inside') == ''    # somebody else's clone
  (tmp_path / 'file').write_text('b')
  checkpoint.revision.cache_clear()
  assert checkpoint.revision(tmp_path) == commit + '+changes'
  checkpoint.revision.cache_clear()


def test_revision_without_git(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  checkpoint.revision.cache_clear()
  assert checkpoint.revision() == ''
  checkpoint.revision.cache_clear()


def test_two_processes_save_and_restore(tmp_path):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  children = [subprocess.Popen(
      [sys.executable, str(CHILD), 'together', str(tmp_path), str(i), str(port)],
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in range(2)]
  try:
    outputs = [child.communicate(timeout=120)[0] for child in children]
  finally:
    for child in children:
      child.kill()
  for i, (child, output) in enumerate(zip(children, outputs)):
    assert child.returncode == 0 and f'process {i} is done' in output, output[-3000:]

  with Checkpointer(tmp_path) as checkpoints:            # one process reads what two wrote
    assert checkpoints.memory(2)['reader'] == {'0': {'next': 10}, '1': {'next': 11}}
    template = {'params': {'w': jax.ShapeDtypeStruct((8, 8), np.float32)}, 'key': jax.random.key(0)}
    restored = checkpoints.restore(2, template)
  np.testing.assert_array_equal(restored['params']['w'], np.arange(64).reshape(8, 8))
  assert bits(restored['key']) == bits(jax.random.key(3))
