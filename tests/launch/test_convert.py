"""Public folders become checkpoints and come out again; what is damaged is named, and nothing
half-written is left.
"""

import json
import sys

import ml_dtypes
import numpy as np
import pytest
import train_runs
from saved_models import bits

from launch import checkpoint, cli, conversion, convert, hf_files, mesh, models
from nn import hf, model, param
from nn.config import ModelConfig


CONFIG = {
    'model_type': 'qwen3_moe', 'architectures': ['Qwen3MoeForCausalLM'], 'vocab_size': 264,
    'hidden_size': 16, 'intermediate_size': 12, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'head_dim': 4, 'hidden_act': 'silu', 'rms_norm_eps': 1e-5,
    'max_position_embeddings': 64, 'rope_theta': 500.0, 'tie_word_embeddings': False,
    'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 8, 'norm_topk_prob': True,
    'dtype': 'bfloat16', 'eos_token_id': 5}
WORDS = {'version': '1.0', 'added_tokens': [], 'model': {
    'type': 'WordLevel', 'vocab': {'</s>': 0, 'a': 1}, 'unk_token': 'a'}}


def write_public(folder, kinds=None):
  """A small model of random bfloat16, its norms float32, in two shards; returns its tensors."""
  cfg, rng = hf.model_config(CONFIG), np.random.default_rng(0)
  specs = param.flat(model.specs(cfg))
  names = {p.tensor for p in hf.pieces(hf.FAMILIES['qwen3_moe'], cfg)}
  kinds = {n: 'F32' for n in names if 'norm' in n} if kinds is None else kinds
  origin = hf_files.Origin(CONFIG, {'temperature': 0.6}, 'BF16', kinds)
  draw = lambda path: rng.standard_normal(specs[path].shape).astype(np.float32)
  hf_files.save(folder, cfg, draw, origin=origin, shard_bytes=20_000)
  (folder / 'tokenizer.json').write_text(json.dumps(WORDS))
  return bits(folder)


def status(monkeypatch, capsys, *arguments):
  """Exit status and standard error of the command."""
  monkeypatch.setattr(sys, 'argv', ['convert.py', *map(str, arguments)])
  with pytest.raises(SystemExit) as ended:
    cli.run(convert.main)
  return ended.value.code, capsys.readouterr().err


def test_a_folder_comes_out_as_it_went_in(tmp_path, monkeypatch, capsys):
  first, middle, again = (tmp_path / name for name in ('public', 'checkpoint', 'again'))
  tensors = write_public(first)
  assert len(list(first.glob('model-*.safetensors'))) > 1
  assert status(monkeypatch, capsys, '--from-hf', first, '--to', middle)[0] == 0
  assert status(monkeypatch, capsys, '--to-hf', again, '--from', middle)[0] == 0
  assert bits(again) == tensors
  for name in ('config.json', 'generation_config.json', 'tokenizer.json'):
    assert json.loads((again / name).read_text()) == json.loads((first / name).read_text()), name
  assert sorted(p.name for p in tmp_path.iterdir()) == ['again', 'checkpoint', 'public']
  known = models.describe(middle)
  assert known.cfg == models.describe(first).cfg == hf.model_config(CONFIG)
  assert known.tokenizer == str(middle / 'tokenizer')


def test_another_dtype_on_request(tmp_path):
  write_public(tmp_path / 'public')
  conversion.to_checkpoint(str(tmp_path / 'public'), str(tmp_path / 'checkpoint'))
  conversion.to_public(str(tmp_path / 'checkpoint'), str(tmp_path / 'wide'), 'float32')
  narrow, wide = (hf_files.tensors(tmp_path / name) for name in ('public', 'wide'))
  for name, t in narrow.items():
    assert wide[name].kind == 'F32'
    np.testing.assert_array_equal(
        np.asarray(hf_files.mapped(t), np.float32), hf_files.mapped(wide[name]))
  assert json.loads((tmp_path / 'wide' / 'config.json').read_text())['dtype'] == 'float32'


def test_any_mesh_reads_the_same_numbers(tmp_path):
  write_public(tmp_path / 'public')
  cfg = hf.model_config(CONFIG)
  specs = model.specs(cfg)
  plain = hf_files.load(tmp_path / 'public', cfg, param.abstract(specs))
  on = mesh.make_mesh({'data': 1, 'fsdp': 2, 'expert': 2, 'model': 2})
  conversion.to_checkpoint(str(tmp_path / 'public'), str(tmp_path / 'checkpoint'), 'fsdp=2,model=2')
  abstract = param.abstract(specs, param.shardings(specs, on, dict(cfg.rules)))
  for path in ('public', 'checkpoint'):
    split = checkpoint.load_params(tmp_path / path, abstract, cfg)
    for name, a in param.flat(split).items():
      assert a.dtype == np.float32 and a.sharding == param.flat(abstract)[name].sharding
      np.testing.assert_array_equal(a, param.flat(plain)[name])


def cut_off(folder):
  path = sorted(folder.glob('*.safetensors'))[-1]
  path.write_bytes(path.read_bytes()[:-10])


def lose_shard(folder):
  sorted(folder.glob('*.safetensors'))[0].unlink()


def pickled(folder):
  for path in [*folder.glob('*.safetensors'), folder / hf_files.INDEX]:
    path.unlink()
  (folder / 'pytorch_model.bin').write_bytes(b'')


def rewrite(change):
  """The folder's tensors in one file, after change({name: array})."""
  def damage(folder):
    arrays = {n: np.array(hf_files.mapped(t)) for n, t in hf_files.tensors(folder).items()}
    change(arrays)
    for path in [*folder.glob('*.safetensors'), folder / hf_files.INDEX]:
      path.unlink()
    header, data = {}, b''
    for name, a in arrays.items():
      kind = {np.dtype(np.float32): 'F32', np.dtype(ml_dtypes.bfloat16): 'BF16'}.get(a.dtype, 'I8')
      header[name] = {
          'dtype': kind, 'shape': a.shape, 'data_offsets': [len(data), len(data) + a.nbytes]}
      data += a.tobytes()
    text = json.dumps(header).encode()
    (folder / 'model.safetensors').write_bytes(len(text).to_bytes(8, 'little') + text + data)
  return damage


def configured(**changes):
  return lambda folder: (folder / 'config.json').write_text(json.dumps(CONFIG | changes))


GATE = 'model.layers.1.mlp.gate.weight'


@pytest.mark.parametrize('damage, fault', [
    (cut_off, 'it is cut off'),
    (lose_shard, 'model-00001-of-0000'),
    (pickled, 'pytorch_model.bin and no safetensors. Files of that kind are pickles'),
    (rewrite(lambda a: a.pop(GATE)), f'{GATE} is missing'),
    (rewrite(lambda a: a.update(surplus=a[GATE])), 'surplus has no place'),
    (rewrite(lambda a: a.update({GATE: a[GATE].T})), f'{GATE} has shape (16, 4), wanted (4, 16)'),
    (rewrite(lambda a: a.update({GATE: a[GATE].view(np.int8)})), f'{GATE} in'),
    (configured(model_type='mamba'), "model_type is 'mamba'"),
    (configured(rope_scaling={'rope_type': 'longrope'}), "rope_type is 'longrope'"),
    (lambda folder: (folder / 'config.json').write_text('{'), 'is no JSON'),
    (lambda folder: (folder / 'config.json').unlink(), 'has no config.json'),
    (lambda folder: (folder / 'tokenizer.json').write_text('{'), 'is not a tokenizer.json'),
    (lambda folder: sorted(folder.glob('*.safetensors'))[0].write_bytes(b'\x00' * 40),
     'is no safetensors file'),
])
def test_a_damaged_folder_is_named_and_nothing_is_left(
    tmp_path, monkeypatch, capsys, damage, fault):
  write_public(tmp_path / 'public')
  damage(tmp_path / 'public')
  code, error = status(
      monkeypatch, capsys, '--from-hf', tmp_path / 'public', '--to', tmp_path / 'checkpoint')
  assert code == 2 and fault in error and error.count('\n') == 1
  assert [p.name for p in tmp_path.iterdir()] == ['public']


def test_surplus_tensors_can_be_dropped(tmp_path, monkeypatch, capsys):
  tensors = write_public(tmp_path / 'public')
  rewrite(lambda a: a.update({'mtp.a': a[GATE], 'mtp.b': a[GATE]}))(tmp_path / 'public')
  convert_to = ('--from-hf', tmp_path / 'public', '--to', tmp_path / 'checkpoint')
  assert 'mtp.a has no place' in status(monkeypatch, capsys, *convert_to)[1]
  code, error = status(monkeypatch, capsys, *convert_to, '--drop', 'mtp.*', '--drop', 'mpt.*')
  assert code == 2 and '--drop mpt.*' in error and 'has no such tensor' in error
  assert status(monkeypatch, capsys, *convert_to, '--drop', 'mtp.*')[0] == 0
  conversion.to_public(str(tmp_path / 'checkpoint'), str(tmp_path / 'again'))
  assert bits(tmp_path / 'again') == tensors


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
  write_public(tmp_path / 'public')
  conversion.to_checkpoint(str(tmp_path / 'public'), str(tmp_path / 'checkpoint'))
  def full(*args):
    raise OSError(28, 'No space left on device')
  with monkeypatch.context() as m:
    m.setattr(hf, 'write', full)
    with pytest.raises(OSError):
      conversion.to_public(str(tmp_path / 'checkpoint'), str(tmp_path / 'again'))
  with monkeypatch.context() as m:
    m.setattr(conversion.shutil, 'copy', full)
    with pytest.raises(OSError):
      conversion.to_checkpoint(str(tmp_path / 'public'), str(tmp_path / 'second'))
  assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint', 'public']
  with pytest.raises(ValueError, match='never written over'):
    conversion.to_checkpoint(str(tmp_path / 'public'), str(tmp_path / 'checkpoint'))
  with pytest.raises(ValueError, match='never written over'):
    conversion.to_public(str(tmp_path / 'checkpoint'), str(tmp_path / 'public'))


@pytest.mark.parametrize('arguments, fault', [
    (['--from-hf', 'a'], 'wanted either'), (['--to', 'a', '--from', 'b'], 'wanted either'),
    (['--from-hf', 'a', '--to', 'b', '--dtype', 'float32'], '--dtype has no effect'),
    (['--to-hf', 'a', '--from', 'b', '--drop', 'x'], '--drop has no effect'),
])
def test_a_command_line_that_cannot_be_meant_is_refused(monkeypatch, capsys, arguments, fault):
  code, error = status(monkeypatch, capsys, *arguments)
  assert code == 2 and fault in error


TINY = ('phases=sft', 'sft.steps=1', 'eval.every=1')
SIZES = ('model.embed_dim', 'model.num_heads', 'model.num_kv_heads', 'model.head_dim',
         'model.ffw_dim', 'model.repeats')


def from_folder(tmp_path):
  """A config like tiny that leaves the model to a folder."""
  path = tmp_path / 'config.py'
  path.write_text('''
from configs import base, tiny

def get_config():
  c = tiny.get_config()
  c.model = base.get_config().model
  c.model.max_length = 32
  return c
''')
  return path


def test_a_run_starts_from_a_folder_and_ends_in_one(tmp_path, monkeypatch, capsys):
  public, out = tmp_path / 'public', tmp_path / 'out'
  before = write_public(public)
  config = from_folder(tmp_path)
  start = (*TINY, f'model_from={public}', f'init={public}')
  refused = lambda *more: train_runs.refused(
      monkeypatch, capsys, tmp_path / 'run', *start, *more, config=config)
  assert "model.embed_dim is 128, and in model_from" in refused('model.embed_dim=128')
  assert "model.moe.top_k is 3, and in model_from" in refused('model.moe.top_k=3')
  assert 'never written over' in refused(f'export={public}')
  monkeypatch.undo()

  options = dict(config=config)
  assert train_runs.run(tmp_path / 'run', *start, f'export={out}',
                        'sft.optimizer.learning_rate=0.01', **options) == 0
  after = bits(out)
  assert {n: t[:2] for n, t in after.items()} == {n: t[:2] for n, t in before.items()}
  assert after[GATE] != before[GATE]
  assert json.loads((out / 'config.json').read_text()) == CONFIG
  # A step of that run knows what it came from, too.
  conversion.to_public(str(tmp_path / 'run'), str(tmp_path / 'later'))
  assert bits(tmp_path / 'later') == after
  saved = json.loads((tmp_path / 'run' / 'config.json').read_text())['model']
  assert (saved['embed_dim'], saved['moe']['experts'], saved['max_length']) == (16, 4, 32)


def test_a_folder_of_another_model_is_refused_by_the_keys_that_differ(
    tmp_path, monkeypatch, capsys):
  write_public(tmp_path / 'public')
  line = train_runs.refused(
      monkeypatch, capsys, tmp_path / 'run', *TINY, f'init={tmp_path / "public"}')
  assert 'holds another model' in line and "model.head_dim is 8, there it is 4" in line


def test_a_model_of_ours_is_exported_in_the_family_that_fits(tmp_path):
  cfg = ModelConfig(
      vocab_size=259, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, ffw_dim=12)
  rng, specs = np.random.default_rng(0), model.specs(cfg)
  params = {path: rng.standard_normal(s.shape).astype(np.float32)
            for path, s in param.flat(specs).items()}
  hf_files.save(tmp_path / 'out', cfg, params.__getitem__, ids=models.special_ids('bytes'))
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert (config['model_type'], config['eos_token_id'], config['dtype']) == ('llama', 1, 'float32')
  assert hf_files.model_config(tmp_path / 'out') == cfg
  again = hf_files.load(tmp_path / 'out', cfg, param.abstract(specs))
  for path, a in param.flat(again).items():
    np.testing.assert_array_equal(a, params[path])
