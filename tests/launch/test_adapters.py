"""A run with adapters: on a checkpoint without, in two phases, interrupted, with a reference."""

import json
import re

import numpy as np
import pytest

import train_runs
from launch import adapters, checkpoint, conversion, models, talk
from nn import lora, model, param


LORA = ('model.lora.rank=2', 'model.lora.targets=*/mixer/q,*/ffn/*', 'rl.steps=2',
        'checkpoint.every=1', 'eval.every=2')
A = "['lora']['blocks']['0']['mixer']['q']['a']"


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Workdirs of a model, and of adapters trained on it: two steps of SFT, two of RL."""
  folder = tmp_path_factory.mktemp('adapters')
  base, adapted = folder / 'base', folder / 'adapted'
  assert train_runs.run(base, 'phases=sft', 'sft.steps=2') == 0
  assert train_runs.run(adapted, *LORA, f'init={base}', 'sft.steps=2') == 0
  return base, adapted


def parameters(workdir, step):
  return {name: x for name, x in train_runs.state(workdir, step).items() if "'params'" in name}


def merged_parameters(workdir):
  """{name in the table: array} of the newest checkpoint, by checkpoint.reader."""
  cfg = models.describe(workdir).cfg
  specs = model.specs(cfg)
  with checkpoint.reader(workdir) as array:
    merged = lora.merging(array, specs, cfg.lora)
    return {name: np.asarray(merged(name)) for name in param.flat(lora.base(specs))}


def test_the_model_stays_and_adapters_are_trained(runs):
  base, adapted = runs
  model, after = parameters(base, 2), parameters(adapted, 4)
  for name, x in model.items():
    np.testing.assert_array_equal(after.pop(name), x, err_msg=name)
  before = parameters(adapted, 1)
  assert len(after) == 8 and all("'lora'" in name for name in after)
  assert all((x != before[name]).any() for name, x in after.items())
  size = lambda arrays: sum(x.size for x in arrays)
  moments = size(x for name, x in train_runs.state(adapted, 4).items() if name not in
                 parameters(adapted, 4))
  assert moments < 2 * size(after.values()) + 5       # Adam's two, and a few counts


def test_the_reference_is_the_policy_as_rl_began(runs):
  """It shares the model's arrays, so that only adapters are written."""
  _, adapted = runs
  kept = checkpoint.read_meta(adapted / 'reference')['leaves']
  assert len(kept) == 8 and all(name.startswith('params/lora/') for name in kept)
  kl = [x['kl'] for (phase, _), x in train_runs.logged(adapted).items() if phase == 'rl']
  assert abs(kl[0]) < 1e-9 < kl[1]


def test_an_interrupted_run_goes_on_bit_for_bit(runs, tmp_path):
  base, adapted = runs
  again = train_runs.rewound(adapted, 3, tmp_path / 'again')
  assert train_runs.run(again, *LORA, f'init={base}', 'sft.steps=2') == 0
  train_runs.assert_same_checkpoint(adapted, again, 4)


def test_a_public_folder_may_be_what_adapters_are_trained_on(runs, tmp_path):
  """Exported merged, and the model of another run, whose reference has no adapters."""
  base, adapted = runs
  conversion.to_public(str(adapted), str(tmp_path / 'public'))
  run = tmp_path / 'run'
  assert train_runs.run(run, *LORA, f'init={tmp_path / "public"}', 'phases=rl',
                        f'rl.reference={base}') == 0
  merged = merged_parameters(adapted)
  for name, x in parameters(run, 2).items():
    path = '/'.join(re.findall(r"\['(\w+)'\]", name)[1:])        # without params
    if path in merged:
      np.testing.assert_allclose(x, merged.pop(path), atol=1e-6, err_msg=path)
  assert not merged
  kept = checkpoint.read_meta(run / 'reference')['leaves']
  assert kept and not any('lora' in name for name in kept)
  assert train_runs.logged(run)['rl', 1]['kl'] > 1e-9


def test_adapters_leave_a_run_merged_or_for_peft(runs, tmp_path):
  _, adapted = runs
  at = ['--workdir', str(adapted), '--step', '4']
  assert adapters.main([*at, '--merged', str(tmp_path / 'merged')]) == 0
  speaker = talk.open_model(str(tmp_path / 'merged'), {'data': 1})
  assert speaker.cfg.lora.rank == 0 and speaker.step == 4
  found, merged = param.flat(speaker.params), merged_parameters(adapted)
  assert found.keys() == merged.keys()
  for name, x in merged.items():
    np.testing.assert_allclose(found[name], x, atol=1e-6, err_msg=name)

  assert adapters.main([*at, '--peft', str(tmp_path / 'peft'), '--base', 'me/tiny']) == 0
  config = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
  assert config['r'] == 2 and config['base_model_name_or_path'] == 'me/tiny'
  modules = ('self_attn.q_proj', 'mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj')
  assert sorted(config['target_modules']) == sorted(
      f'model.layers.{i}.{name}' for i in range(2) for name in modules)
  raw = (tmp_path / 'peft' / 'adapter_model.safetensors').read_bytes()
  size = int.from_bytes(raw[:8], 'little')
  header = json.loads(raw[8:8 + size])
  a = header['base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight']
  begin, end = (8 + size + n for n in a['data_offsets'])
  np.testing.assert_array_equal(
      np.frombuffer(raw[begin:end], '<f4').reshape(a['shape']),
      next(x for name, x in parameters(adapted, 4).items() if name.endswith(A))[1].T)


def test_what_cannot_leave_is_refused(runs, tmp_path):
  base, adapted = runs
  with pytest.raises(ValueError, match='has no adapters'):
    adapters.main(['--workdir', str(base), '--merged', str(tmp_path / 'merged')])
  with pytest.raises(ValueError, match='never written over'):
    adapters.main(['--workdir', str(adapted), '--peft', str(tmp_path)])


def test_other_adapters_are_refused(runs, tmp_path, monkeypatch, capsys):
  _, adapted = runs
  line = train_runs.refused(
      monkeypatch, capsys, tmp_path / 'run', *LORA, f'init={adapted}', 'model.lora.rank=3')
  assert 'params/lora/blocks/0/ffn/down/a is float32[2, 32, 2] in the checkpoint' in line
  line = train_runs.refused(monkeypatch, capsys, tmp_path / 'run', *LORA, 'model.lora.rank=17')
  assert 'model.lora.rank is 17, more than' in line
