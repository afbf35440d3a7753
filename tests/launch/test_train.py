"""Whole runs: the same on every mesh, compiled once, and what they write down."""

import contextlib
import dataclasses
import io
import json
import logging

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import train_runs
from launch import loop, metrics

# Sizes that all meshes below divide.
SIZES = ('model.num_kv_heads=2', 'model.vocab_size=264')
MESHES = {
    'one': ('mesh.data=1',),
    'data': ('mesh.data=8',),
    'all': ('mesh.data=2', 'mesh.fsdp=2', 'mesh.model=2'),
}


@dataclasses.dataclass
class Seen:
  """A run, as seen from inside."""
  workdir: object
  layout: dict           # {phase: TrainState of (sharding, shape)} at its end
  compiled: list         # (phase, turn of its loop, what was compiled)


@contextlib.contextmanager
def watched(seen):
  """Notes what runs compile, when, and how their arrays lie."""
  now, train = ['', 0], loop.train

  class Handler(logging.Handler):
    def emit(self, record):
      if record.getMessage().startswith('Compiling '):
        seen.compiled.append((*now, record.getMessage()[:80]))

  def spy(phase, state, *rest, **options):
    feed = phase.feed

    def collect(params, memory, step):
      now[1] = step - phase.first
      return feed.collect(params, memory, step)

    now[:] = phase.name, 0
    phase = dataclasses.replace(phase, feed=feed._replace(collect=collect))
    state = train(phase, state, *rest, **options)
    now[:] = 'between phases', 0
    seen.layout[phase.name] = jax.tree.map(lambda x: (x.sharding, x.shape), state)
    return state

  handler, logger = Handler(), logging.getLogger('jax')
  loop.train = spy
  logger.addHandler(handler)
  try:
    with jax.log_compiles():
      yield
  finally:
    loop.train = train
    logger.removeHandler(handler)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """{mesh: Seen} of the same SFT and RL on every mesh."""
  found = {}
  for name, mesh in MESHES.items():
    found[name] = Seen(tmp_path_factory.mktemp(name), {}, [])
    with watched(found[name]):
      assert train_runs.run(found[name].workdir, *SIZES, *mesh) == 0
  return found


@pytest.mark.parametrize('mesh', ['data', 'all'])
def test_a_mesh_of_eight_trains_like_one_device(runs, mesh):
  one, many = runs['one'].workdir, runs[mesh].workdir
  for evaluations in (False, True):
    left, right = (train_runs.logged(x, evaluations) for x in (one, many))
    assert left.keys() == right.keys()
    for key, values in left.items():
      for name, value in values.items():
        # Rounding of float32 sums in another order; of gradients as large as 2.
        np.testing.assert_allclose(
            right[key][name], value, rtol=1e-4, atol=2e-6, err_msg=f'{key} {name}')
  left, right = (train_runs.state(x, 8) for x in (one, many))
  for name, x in left.items():
    np.testing.assert_allclose(right[name], x, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('phase', ['sft', 'rl'])
def test_parameters_and_moments_are_split_as_the_rules_say(runs, phase):
  state = runs['all'].layout[phase]
  moments = state.opt_state[1]                  # behind the clip: Adam's count, mu, nu
  expected = {
      ('embed', 'table'): PartitionSpec('model', 'fsdp'),
      ('blocks', '0', 'mixer', 'q'): PartitionSpec(None, 'fsdp', 'model', None),
      ('blocks', '0', 'mixer', 'o'): PartitionSpec(None, 'model', None, 'fsdp'),
      ('blocks', '0', 'ffn', 'down'): PartitionSpec(None, 'model', 'fsdp'),
      ('norm', 'scale'): PartitionSpec('fsdp'),
  }
  for tree in (state.params, moments.mu, moments.nu):
    for path, spec in expected.items():
      leaf = tree
      for name in path:
        leaf = leaf[name]
      sharding, shape = leaf
      assert sharding.is_equivalent_to(jax.NamedSharding(sharding.mesh, spec), len(shape)), path
  assert state.updates[0].is_fully_replicated and moments.count[0].is_fully_replicated


@pytest.mark.parametrize('mesh', MESHES)
def test_nothing_is_compiled_after_the_second_step(runs, mesh):
  compiled = runs[mesh].compiled
  for phase in ('sft', 'rl'):
    assert [turn for p, turn, what in compiled if p == phase and 'train_step' in what] == [0]
  assert [entry for entry in compiled if entry[1] >= 2] == []


# A reward that throws on some rows, hangs on others, and is right by chance.
REWARD = '''
import time, zlib

def score(prompt, response, row):
  assert prompt == row['q'] and row['answer'] == row['a'], row
  if row['fault'] == 'throws':
    raise KeyError('no such thing')
  if row['fault'] == 'hangs':
    time.sleep(1000)
  return float(zlib.crc32(response.encode()) % 3 == 0)
'''
FAULTS = ('', 'throws', '', 'hangs', 'throws', '')


@dataclasses.dataclass
class Told:
  """A run, and what it printed."""
  workdir: object
  text: str


@pytest.fixture(scope='module')
def told(tmp_path_factory):
  """Two steps of RL on a file, under truncated sampling, with a reward from a file."""
  folder = tmp_path_factory.mktemp('told')
  (folder / 'reward.py').write_text(REWARD)
  rows = [{'q': f'{i}+1=', 'a': str(i + 1), 'fault': fault} for i, fault in enumerate(FAULTS)]
  lines = [json.dumps(row) + '\n' for row in rows]
  (folder / 'train.jsonl').write_text(''.join(lines))
  (folder / 'held.jsonl').write_text(''.join(lines[::2][:2]))
  said = io.StringIO()
  with contextlib.redirect_stdout(said):
    assert train_runs.run(
        folder / 'run', 'phases=rl', 'rl.steps=2', 'rl.uses=2', 'report=true',
        'rl.temperature=0.7', 'rl.top_k=20', 'rl.top_p=0.9', 'rl.support=16',
        'rl.data.prompt=q', 'rl.data.answer=a', 'rl.data.shuffle=false',
        f'rl.data.files={folder / "train.jsonl"}', f'rl.data.heldout_files={folder / "held.jsonl"}',
        f'rl.rewards.mine={folder / "reward.py"}:score', 'rl.reward_weights.mine=0.5',
        'rl.deadline=0.5', 'eval.reward=mine', 'eval.pass_k=8', 'eval.every=1',
        'checkpoint.every=5', 'checkpoint.keep=1', 'checkpoint.best_metric=eval/mean@8',
        config=train_runs.config_file(folder)) == 0
  return Told(folder / 'run', said.getvalue())


def test_sampler_and_trainer_agree_on_the_recorded_support(told):
  for values in train_runs.logged(told.workdir).values():
    # Rounding of float32, at log-probabilities down to log(1/16) after the division by 0.7.
    assert 0 <= values['parity'] < 2e-6 and 0 < values['parity/max'] < 2e-5
    assert 0 < values['entropy'] < np.log(16)        # of at most 16 candidates


def test_rewards_that_throw_or_hang_count_0_and_are_counted(told):
  """Four prompts a step, in order, four samples each: rows 0 to 3, then 4, 5, 0 and 1."""
  steps = train_runs.logged(told.workdir)
  counts = [(v['verifier_errors'], v['verifier_timeouts']) for v in steps.values()]
  assert counts == [(4, 4), (8, 0)]
  texts = [line['text'] for line in metrics.read_lines(told.workdir / 'warnings.jsonl')]
  assert any("8 rewards could not be computed and count 0: reward 'mine', row 1: KeyError" in text
             for text in texts), texts
  assert 'warning, step 1' in told.text


def test_rewards_are_weighed_and_added(told):
  for values in train_runs.logged(told.workdir).values():
    parts = [values[f'reward/{name}'] for name in ('mine', 'exact', 'digits')]
    np.testing.assert_allclose(values['reward'], sum(parts), rtol=1e-6)
    assert 0 < values['reward/mine'] <= 0.25     # at most 8 of 16 rows are graded, by 0.5 each


def test_accuracy_and_pass_at_k_are_logged(told):
  evaluations = train_runs.logged(told.workdir, evaluations=True)
  assert list(evaluations) == [('rl', 0), ('rl', 1), ('rl', 2)]
  for values in evaluations.values():
    assert values['eval/accuracy'] in (0, 0.5, 1)
    assert values['eval/mean@8'] <= values['eval/pass@8'] <= 8 * values['eval/mean@8']
  assert 0 < max(v['eval/mean@8'] for v in evaluations.values()) < 1


def test_the_best_checkpoint_stays(told):
  means = {step: v['eval/mean@8']
           for (_, step), v in train_runs.logged(told.workdir, evaluations=True).items() if step}
  best = max(means, key=lambda step: (means[step], step))
  assert train_runs.steps(told.workdir) == sorted({best, 2})


def test_what_a_run_leaves_for_people(told):
  for said in ('devices', 'mesh', 'parameters', 'bytes per device', 'attention', 'tokens a step',
               'eval accuracy', 'tokens/s', 'report.html'):
    assert said in told.text, said
  assert (told.workdir / 'report.html').stat().st_size > 10_000
  config = json.loads((told.workdir / 'config.json').read_text())
  assert config['rl']['top_k'] == 20 and config['seed'] == 0
  samples = metrics.read_lines(told.workdir / 'samples.jsonl')
  assert {s['step'] for s in samples} == {1, 2}
  assert {s['prompt'] for s in samples} <= {f'{i}+1=' for i in range(6)}
  rewards = [s['reward'] for s in samples if s['step'] == 1]
  assert rewards == sorted(rewards) and len(rewards) == 8
