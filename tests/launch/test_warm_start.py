"""Linear layers made finer on the way in, our own format on the way out; heads of multi-token
prediction of published models, and layers after the last where there are none.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_models import bits

from configs import base
from launch import checkpoint, cli, conversion, convert, hf_files, models, start
from nn import hf, model, param
from nn.config import GDN, MLA, MTP, ModelConfig, MoE

# A small Kimi-Linear.
CFG = ModelConfig(
    vocab_size=20, embed_dim=12, num_heads=2, num_kv_heads=2, head_dim=2, ffw_dim=16,
    pattern=('gdn', ('gdn', 'moe'), ('mla', 'moe')), tied=False, rope_theta=0.0, norm_eps=1e-3,
    gdn=GDN(variant='kda', num_heads=2, key_dim=4, value_dim=4, norm_eps=1e-3),
    mla=MLA(kv_rank=5, nope_dim=4, rope_dim=2, value_dim=3),
    moe=MoE(experts=3, ffw_dim=6, scores='sigmoid', bias=True, shared_dim=6))


def draw(path, shape):
  rng = np.random.default_rng(len(path))
  return (rng.standard_normal(shape) * 0.4 + (len(shape) < 2)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
  leaves = {path: draw(path, s.shape) for path, s in param.flat(model.specs(CFG)).items()}
  hf_files.save(tmp_path / 'public', CFG, leaves.__getitem__)
  return tmp_path / 'public'


def hidden(path):
  """Of random tokens, and the parameters."""
  cfg = models.describe(path).cfg
  params = checkpoint.load_params(path, param.abstract(model.specs(cfg)), cfg)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 40)), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(40), tokens.shape)
  run = jax.jit(lambda p: model.forward(p, cfg, tokens, positions, jnp.ones_like(tokens)).hidden)
  return run(params), param.flat(params)


def test_a_warm_start_computes_what_the_public_model_does_and_survives_an_export(folder, tmp_path):
  assert json.loads((folder / 'config.json').read_text())['model_type'] == 'kimi_linear'
  conversion.to_checkpoint(folder, tmp_path / 'finer', warm_start='fg2_plus')
  before, _ = hidden(folder)
  after, params = hidden(tmp_path / 'finer')
  assert 'blocks/0/mixer/beta_v' in params
  np.testing.assert_allclose(after, before, atol=2e-5)

  conversion.to_public(tmp_path / 'finer', tmp_path / 'ours')
  config = json.loads((tmp_path / 'ours' / 'config.json').read_text())
  assert config['model_type'] == 'nacre' and config['model']['gdn']['variant'] == 'fg2_plus'
  again, same = hidden(tmp_path / 'ours')
  np.testing.assert_array_equal(again, after)
  assert params.keys() == same.keys()
  for path, a in params.items():
    np.testing.assert_array_equal(same[path], a, err_msg=path)


def test_layers_after_the_last_of_a_family_without_heads_are_refused_or_dropped(folder, tmp_path):
  name = 'model.layers.3.eh_proj.weight'
  hf_files.allocate(folder / 'model-mtp.safetensors', {name: ('F32', (12, 24))})
  with pytest.raises(ValueError, match='model.layers.3.eh_proj.weight has no place in the model'):
    conversion.to_checkpoint(folder, tmp_path / 'all')
  assert not (tmp_path / 'all').exists()
  conversion.to_checkpoint(folder, tmp_path / 'some', drop=['model.layers.3.*'])
  assert checkpoint.find(tmp_path / 'some')


# A small GLM-4.5 with a head.
GLM = dict(
    model_type='glm4_moe', vocab_size=20, hidden_size=12, intermediate_size=16,
    num_attention_heads=2, num_key_value_heads=1, head_dim=4, hidden_act='silu', rms_norm_eps=1e-5,
    max_position_embeddings=64, moe_intermediate_size=6, num_experts_per_tok=2, n_routed_experts=3,
    num_hidden_layers=2, num_nextn_predict_layers=1, dtype='bfloat16')


@pytest.fixture
def glm(tmp_path):
  cfg = hf.model_config(GLM, heads=True)
  leaves = {path: draw(path, s.shape) for path, s in param.flat(model.specs(cfg)).items()}
  kinds = {'model.norm.weight': 'F32'}
  hf_files.save(tmp_path / 'glm', cfg, leaves.__getitem__,
                origin=hf_files.Origin(GLM, {}, 'BF16', kinds))
  return tmp_path / 'glm'


def convert_it(monkeypatch, capsys, *arguments):
  """What the command prints."""
  monkeypatch.setattr(sys, 'argv', ['convert.py', *map(str, arguments)])
  with pytest.raises(SystemExit) as ended:
    cli.run(convert.main)
  assert not ended.value.code
  return capsys.readouterr().out


def test_published_heads_survive_and_may_be_left_out(glm, tmp_path, monkeypatch, capsys):
  whole, some, back = (tmp_path / name for name in ('whole', 'some', 'back'))
  told = convert_it(monkeypatch, capsys, '--from-hf', glm, '--to', whole)
  assert '1 head(s) of multi-token prediction: ' in told.splitlines()[0]
  assert models.describe(whole).cfg.mtp.depth == 1
  convert_it(monkeypatch, capsys, '--to-hf', back, '--from', whole)
  assert bits(back) == bits(glm)
  assert json.loads((back / 'config.json').read_text()) == GLM
  told = convert_it(
      monkeypatch, capsys, '--from-hf', glm, '--to', some, '--drop', 'model.layers.2.*')
  assert 'heads of multi-token prediction are left out: ' in told.splitlines()[0]
  assert models.describe(some).cfg.mtp.depth == 0


def test_a_run_takes_published_heads_leaves_them_out_or_begins_them(glm, tmp_path):
  cfg = models.describe(glm).cfg
  bare = dataclasses.replace(cfg, mtp=MTP())
  abstract = lambda cfg: param.abstract(model.specs(cfg))
  conversion.to_checkpoint(str(glm), str(tmp_path / 'step'))
  conversion.to_checkpoint(str(glm), str(tmp_path / 'none'), drop=['model.layers.2.*'])
  for path in (glm, tmp_path / 'step'):
    assert start.heads(str(path), cfg) == f'1 for multi-token prediction, of {path}'
    assert start.heads(str(path), bare) == f'those of {path} are left out, as model.mtp.depth is 0'
    both = [checkpoint.load_params(path, checkpoint.as_saved(path, abstract(c)), c)
            for c in (cfg, bare)]
    assert both[0].keys() - both[1].keys() == {'mtp'}
    checkpoint.check_params(path, abstract(bare), bare)
  none = tmp_path / 'none'
  assert start.heads(str(none), cfg) == f'1 for multi-token prediction, fresh: {none} has none'
  assert not start.heads(str(none), bare) and not start.heads('', bare)
  assert 'mtp' not in checkpoint.as_saved(none, abstract(cfg))


def test_a_config_adopts_published_heads_unless_told_not_to(glm):
  config = base.get_config()
  models.adopt(config, str(glm), [])
  assert config.model.mtp.depth == 1 and config.model.mtp.order == ('embedding', 'hidden')
  config = base.get_config()
  models.adopt(config, str(glm), ['model.mtp.depth'])
  assert config.model.mtp.depth == 0 and config.model.mtp.order == ('hidden', 'embedding')
  config = base.get_config()
  config.model.mtp.depth = 2
  with pytest.raises(ValueError, match='model.mtp.depth is 2, and in model_from'):
    models.adopt(config, str(glm), ['model.mtp.depth'])
