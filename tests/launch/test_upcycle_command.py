"""launch/upcycle.py: the run it writes goes on from the one it read, with more experts."""

import hashlib
import json
import shutil
import sys

import jax
import numpy as np
import pytest

import train_runs
from data import tokenizer as tokenizer_lib
from launch import checkpoint, cli, growth, grown_run, phases
from launch import config as config_lib
from launch import upcycle as command
from moe import upcycle
from nn import model, param


DENSE = ('phases=sft', 'sft.steps=0', 'model.repeats=1', 'streams=2')
SOURCE = (*DENSE, 'sft.steps=4', 'model.ffn=moe', 'model.moe.experts=4', 'model.moe.scores=sigmoid',
          'model.moe.bias_rate=0.01', 'model.repeats=2')
FFN = "['blocks']['0']['ffn']"
MATRICES = ('gate', 'up', 'down')
# Experts under another optimiser and in RL: as small as they go.
SMALL = ('streams=2', 'model.repeats=1', 'model.ffn=moe', 'model.moe.experts=4')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A run of 4 steps with checkpoints of 2 and 4."""
  workdir = tmp_path_factory.mktemp('source')
  assert train_runs.run(workdir, *SOURCE) == 0
  return workdir


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
  """A dense run that has not begun."""
  workdir = tmp_path_factory.mktemp('dense')
  assert train_runs.run(workdir, *DENSE) == 0
  return workdir


@pytest.fixture(scope='module')
def unbegun(tmp_path_factory):
  """Runs with experts that have not begun, without a selection bias and with a fixed one."""
  folder = tmp_path_factory.mktemp('unbegun')
  for name, bias in (('plain', 'false'), ('fixed', 'true')):
    assert train_runs.run(folder / name, *SMALL, 'phases=sft', 'sft.steps=0',
                          f'model.moe.bias={bias}') == 0
  return folder


def grow(folder, output, *options):
  command.main(['--input', str(folder), '--output', str(output), *options])
  return json.loads((output / growth.DOCUMENT).read_text())


def hashes(folder):
  return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob('*') if p.is_file()}


def leaves(state, part, name):
  """The one array of a state of this name, of params, mu or nu."""
  return next(x for k, x in state.items() if k.endswith(f"['{part}']{FFN}['{name}']"))


def scale_of(part, how):
  return {'copy': 1, 'reset': 0, 'scale': 0.5}[how] if part != 'params' else 1


@pytest.mark.parametrize('how, options', [
    ('copy', ('--selection', 'grad_sq', '--score_batches', '2', '--cap', '2')),
    ('reset', ('--factor', '3')),
    ('scale', ('--selection', 'fisher', '--score_batches', '1', '--allocation', 'weighted')),
])
def test_what_is_grown_and_what_stays(source, tmp_path, how, options):
  folder, before = source / checkpoint.FOLDER / '2', hashes(source)
  found = grow(folder, tmp_path / 'out', '--optimizer', how, *options)
  assert hashes(source) == before
  old, new = (train_runs.state(w, 2) for w in (source, tmp_path / 'out'))
  assert old.keys() == new.keys()
  assert train_runs.memory(source, 2) == train_runs.memory(tmp_path / 'out', 2)
  layer = found['layers']['blocks/0/ffn']
  index = np.array(layer['sources'])
  assert layer['layers'] == [0, 1] and index.shape == (2, 4 * found['how']['factor'])
  np.testing.assert_array_equal(index[:, :4], [range(4)] * 2)
  np.testing.assert_array_equal([np.bincount(row) for row in index], layer['copies'])
  assert (layer['scores'] is None) == (how == 'reset')
  if how == 'copy':
    assert np.max(layer['copies']) == 3               # the original, and at most two more
    best = np.argmax(layer['scores'], axis=1)
    assert [layer['copies'][r][best[r]] for r in range(2)] == [3, 3]
  copied = upcycle.is_copy(index)
  for part in ('params', 'mu', 'nu'):
    for name in MATRICES:
      was, now = leaves(old, part, name), leaves(new, part, name)
      share = np.where(copied, scale_of(part, how), 1)[..., None, None]
      expected = np.stack([one[row] for one, row in zip(was, index)]) * share
      np.testing.assert_allclose(now, expected, rtol=1e-6 if how == 'scale' else 0)
  bias, grown = leaves(old, 'params', 'bias'), leaves(new, 'params', 'bias')
  noise = grown - np.stack([one[row] for one, row in zip(bias, index)])
  assert (noise[copied] != 0).all() and (noise[~copied] == 0).all() and abs(noise).max() < 6e-3
  for name, x in old.items():
    if FFN not in name:
      np.testing.assert_array_equal(new[name], x, err_msg=name)
  assert (tmp_path / 'out' / growth.PLOT).read_text().startswith('<?xml')


def test_copies_part_by_fixed_selection_biases(unbegun, tmp_path):
  grow(unbegun / 'fixed', tmp_path / 'out', '--noise', '0.5')
  new = train_runs.state(tmp_path / 'out', 0)
  originals, copies = np.split(leaves(new, 'params', 'bias'), 2, axis=1)
  np.testing.assert_array_equal(originals, 0)         # as they began
  assert 0.1 < np.sqrt(np.mean(copies**2)) < 1.5 and len(np.unique(copies)) == copies.size
  np.testing.assert_array_equal(*np.split(leaves(new, 'params', 'router'), 2, axis=2))


def test_fresh_experts_have_nothing_of_the_others(source, tmp_path):
  found = grow(source, tmp_path / 'out', '--selection', 'fresh')
  assert found['how']['optimizer'] == 'reset'
  old, new = (train_runs.state(w, 4) for w in (source, tmp_path / 'out'))
  for part in ('params', 'mu', 'nu'):
    for name in (*MATRICES, 'router'):
      was = leaves(old, part, name)
      kept, fresh = np.split(leaves(new, part, name), 2, axis=2 if name == 'router' else 1)
      np.testing.assert_array_equal(kept, was)
      assert was.any() and ((fresh != was).all() if part == 'params' else not fresh.any()), name
  kept, fresh = np.split(leaves(new, 'params', 'bias'), 2, axis=1)
  np.testing.assert_array_equal(kept, leaves(old, 'params', 'bias'))
  assert kept.any() and not fresh.any()


def test_muons_momentum_grows_and_training_goes_on(tmp_path):
  muon = (*SMALL, 'phases=sft', 'sft.optimizer.name=muon')
  assert train_runs.run(tmp_path / 'in', *muon, 'sft.steps=1') == 0
  grow(tmp_path / 'in', tmp_path / 'out')
  old, new = (train_runs.state(tmp_path / name, 1) for name in ('in', 'out'))
  assert not any("['nu']" + FFN in name and name.endswith("['up']") for name in old)
  for name in MATRICES:
    momentum = leaves(old, 'mu', name)
    np.testing.assert_array_equal(leaves(new, 'mu', name), np.tile(momentum, (1, 2, 1, 1)))
    assert momentum.any()
  for part in ('mu', 'nu'):                           # the router is Adam's
    np.testing.assert_array_equal(
        leaves(new, part, 'router'), np.tile(leaves(old, part, 'router'), (1, 1, 2)))
  assert train_runs.run(tmp_path / 'out', *muon, 'sft.steps=2', 'model.moe.experts=8') == 0
  assert list(train_runs.logged(tmp_path / 'out')) == [('sft', 2)]


def test_a_run_grows_in_the_middle_of_rl(tmp_path):
  # Decay moves the policy away from the reference, whatever the rewards.
  both = (*SMALL, 'phases=sft,rl', 'sft.steps=0', 'rl.prompts=2', 'rl.group=2', 'eval.rows=2',
          'rl.optimizer.weight_decay=0.5')
  source, out = tmp_path / 'in', tmp_path / 'out'
  assert train_runs.run(source, *both, 'rl.steps=1') == 0
  found = grow(source, out, '--selection', 'weight')
  assert train_runs.steps(out) == [1] and train_runs.memory(source, 1) == train_runs.memory(out, 1)
  # The reference is that of the first part, grown by the same index.
  index = np.array(found['layers']['blocks/0/ffn']['sources'])
  tables = [model.specs(read(w)[0]) for w in (source, out)]
  old, new = (param.flat(checkpoint.load_params(w / 'reference', param.abstract(specs)))
              for w, specs in zip((source, out), tables))
  for name in MATRICES:
    at = f'blocks/0/ffn/{name}'
    np.testing.assert_array_equal(new[at], np.asarray(old[at])[:, index[0]])
    assert np.any(new[at] != param.flat(read(out)[1])[at])      # the policy has moved on
  assert train_runs.run(out, *both, 'rl.steps=2', 'model.moe.experts=8') == 0
  logged = train_runs.logged(out)
  assert list(logged) == [('rl', 2)] and logged['rl', 2]['nonfinite'] == 0


def test_it_is_the_seed_that_decides(source, tmp_path):
  outs = [tmp_path / name for name in 'abc']
  for out, seed in zip(outs, '112'):
    grow(source, out, '--seed', seed, '--selection', 'weight', '--allocation', 'weighted')
  a, b, c = (train_runs.state(out, 4) for out in outs)
  assert all((a[name] == b[name]).all() for name in a)
  assert (leaves(a, 'params', 'bias') != leaves(c, 'params', 'bias'))[:, 4:].any()


def test_the_grown_run_trains_on(source, tmp_path, capsys):
  out = tmp_path / 'out'
  grow(source / checkpoint.FOLDER / '2', out)
  assert '--config.model.moe.experts=8' in capsys.readouterr().out
  assert train_runs.run(out, *SOURCE, 'model.moe.experts=8') == 0
  before, after = train_runs.logged(source), train_runs.logged(out)
  assert list(after) == [('sft', 3), ('sft', 4)]
  for key, values in after.items():                   # the same rows, at the same rate
    assert values['learning_rate'] == before[key]['learning_rate']
    assert abs(values['loss'] - before[key]['loss']) < 0.1
  capsys.readouterr()
  command.main(['--compare', str(out)])
  table = capsys.readouterr().out.splitlines()
  assert [line.split()[:2] for line in table] == [
      ['step', 'layer'], ['2', '0'], ['2', '1'], ['4', '0'], ['4', '1']]
  assert table[1].split()[2:] == ['1.0000', '1.0000']
  assert 'Mean cosine' in (out / grown_run.COMPARISON).read_text()


def read(workdir, *changes):
  """(cfg, params) of a workdir's newest checkpoint."""
  folder = checkpoint.find(workdir)
  meta = checkpoint.read_meta(folder)
  config = grown_run.changed(config_lib.from_json(json.dumps(meta['config'])), dict(changes))
  cfg = config_lib.model_config(config.model, tokenizer_lib.load('bytes').vocab_size)
  return cfg, checkpoint.load_params(folder, param.abstract(model.specs(cfg)))


def logits(workdir, *changes):
  cfg, params = read(workdir, *changes)
  tokens = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)
  positions = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)

  @jax.jit
  def run(params):
    out = model.forward(params, cfg, tokens, positions, np.ones_like(tokens))
    return model.unembed(params, cfg, out.hidden)

  return np.asarray(run(params))


def test_two_copies_of_everyone_are_the_source_with_half_the_choice(source, tmp_path):
  """Sigmoid scores of copies are their source's, so a token's best two are one expert's copies."""
  grow(source, tmp_path / 'out', '--noise', '0')
  np.testing.assert_allclose(
      logits(tmp_path / 'out'), logits(source, ('model.moe.top_k', 1), ('model.moe.ffw_dim', 16)),
      atol=1e-5)
  np.testing.assert_allclose(
      logits(tmp_path / 'out', ('model.moe.top_k', 4), ('model.moe.ffw_dim', 16)), logits(source),
      atol=1e-5)


def test_a_dense_run_goes_on_as_a_mixture(dense, tmp_path, capsys):
  out = tmp_path / 'out'
  grow(dense, out, '--dense', '--experts', '4', '--top_k', '2', '--slices', '2',
       '--config.model.moe.balance_loss=0.01')
  np.testing.assert_allclose(logits(out), logits(dense), atol=1e-5)
  moments = [x for name, x in train_runs.state(out, 0).items() if "['mu']" in name]
  assert moments and not any(x.any() for x in moments)
  settings = [text.strip() for text in capsys.readouterr().out.split('--config.')[1:]]
  assert train_runs.run(out, *DENSE, *settings) == 0           # restored: it is what it says it is
  assert train_runs.steps(out) == [0]


def test_on_eight_devices_it_is_the_same_and_nobody_holds_more(source, tmp_path):
  mesh = ('--config.mesh.data=2', '--config.mesh.expert=4')
  options = ('--selection', 'weight')
  one, many = (grow(source, tmp_path / name, *options, *where)
               for name, where in (('one', ()), ('many', mesh)))
  layer = lambda found: found['layers']['blocks/0/ffn']
  assert layer(one)['sources'] == layer(many)['sources']
  left, right = (train_runs.state(tmp_path / name, 4) for name in ('one', 'many'))
  for name, x in left.items():
    np.testing.assert_array_equal(x, right[name], err_msg=name)

  s = grown_run.open_source(str(source), str(tmp_path / 'never'), '', [
      tuple(m.removeprefix('--config.').split('=')) for m in mesh])
  after = grown_run.with_model(s.run, growth.grown(s.run.cfg, 2))
  with jax.set_mesh(s.run.mesh):
    tx, _, before = grown_run.optimizer_of(s, s.run)
    _, shardings, wanted = grown_run.optimizer_of(s, after)
    o = growth.Options(factor=2, selection='weight', optimizer='copy', seed=0, cap=3,
                       noise=1e-3)
    index = growth.index_of(many)
    compiled = growth.make_grow(o, tx, s.run.specs, after.specs, shardings, index).lower(
        before).compile()
  text = compiled.as_text()
  assert 'all-to-all' in text
  assert 'all-gather' not in text or 'f32[2,4,16,16]' not in text.split('all-gather', 1)[1]
  assert 'f32[2,8,16,16]' not in text                 # nowhere are all experts together


@pytest.fixture(scope='module')
def others(source, dense, unbegun, tmp_path_factory):
  """Checkpoints by name; rl says of itself that it is of an RL phase."""
  rl = tmp_path_factory.mktemp('rl') / '4'
  shutil.copytree(source / checkpoint.FOLDER / '4', rl)
  path = rl / 'meta' / 'metadata'
  meta = json.loads(path.read_text())
  path.write_text(json.dumps(meta | {'phase': 'rl', 'phases': ['rl']}))
  return {'source': source, 'dense': dense, 'rl': rl, 'plain': unbegun / 'plain',
          'fixed': unbegun / 'fixed'}


@pytest.mark.parametrize('name, options, match', [
    ('source', ('--factor', '0'), 'upcycle.factor is 0, wanted at least 1'),
    ('source', ('--selection', 'best'), "unknown one 'best'"),
    ('source', ('--cap', '2'), "without effect: upcycle.cap = 2"),
    ('source', ('--router_noise', '1'), 'without effect: upcycle.router_noise'),
    ('fixed', ('--router_noise', '1'), 'without effect: upcycle.router_noise'),
    ('plain', ('--noise', '1'), 'without effect: upcycle.noise'),
    ('source', ('--selection', 'fresh', '--optimizer', 'reset'),
     'without effect: upcycle.optimizer'),
    ('source', ('--selection', 'fresh', '--noise', '0'), 'without effect: upcycle.noise'),
    ('source', ('--selection', 'fresh', '--cap', '1'), 'without effect: upcycle.cap'),
    ('source', ('--config.sft.length=8',), 'without effect: sft.length = 8'),
    ('source', ('--selection', 'weight', '--cap', '0'), 'upcycle.cap is 0'),
    ('source', ('--config.mesh.expert=8',), "axis 'expert' of size 4 cannot be split 8 ways"),
    ('source', ('--dense', '--experts', '4', '--top_k', '2'), 'has experts already'),
    ('source', ('--experts', '8'), 'experts grow by --factor'),
    ('source', ('--config', str(train_runs.TINY)), 'does not fit'),
    ('dense', (), '--dense makes it a mixture'),
    ('dense', ('--dense', '--experts', '4', '--top_k', '5'), 'top_k 5 is more than the 4 experts'),
    ('dense', ('--dense', '--experts', '4', '--top_k', '2', '--slices', '3'), '3 slices'),
    ('dense', ('--dense', '--experts', '4', '--top_k', '2', '--cap', '2'), '--cap: without effect'),
    ('rl', ('--selection', 'grad_sq'), 'give --config with a phase pretrain or sft'),
])
def test_what_cannot_be_grown_is_refused(others, tmp_path, monkeypatch, capsys, name, options,
                                         match):
  monkeypatch.setattr(sys, 'argv', [
      'upcycle.py', '--input', str(others[name]), '--output', str(tmp_path / 'out'), *options])
  monkeypatch.setattr(checkpoint, 'load_state', None)
  with pytest.raises(SystemExit):
    cli.run(command.main)
  line = capsys.readouterr().err
  assert line.startswith('error: ') and match in line, line
  assert not (tmp_path / 'out').exists()


def test_a_folder_with_checkpoints_is_left_alone(source, dense):
  with pytest.raises(ValueError, match=r'has checkpoints already, of steps \[0\]'):
    grow(source, dense)


def test_muon_has_no_mean_squares_of_experts():
  run = lambda name: config_lib.load(train_runs.TINY, [
      *(o.split('=') for o in SOURCE), ('sft.optimizer.name', name)])
  o = growth.Options(factor=2, selection='fisher', optimizer='copy', seed=0)
  for name in ('adamw', 'muon'):
    config = run(name)
    cfg = config_lib.model_config(config.model, 259)
    specs = model.specs(cfg)
    tx = phases.optimizer.from_config(specs, config.sft.optimizer, 1)[0]
    state = jax.eval_shape(tx.init, param.split(param.abstract(specs), specs)[0])
    if name == 'adamw':
      growth.check(o, specs, state)
      continue
    with pytest.raises(ValueError, match="Muon trains them; take 'grad_sq'"):
      growth.check(o, specs, state)
