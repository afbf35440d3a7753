"""Linear layers made finer on the way in, layers after the last, our own format on the way out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import checkpoint, conversion, hf_files, models
from nn import model, param
from nn.config import GDN, MLA, ModelConfig, MoE

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


def test_layers_after_the_last_are_refused_or_dropped_on_request(folder, tmp_path):
  name = 'model.layers.3.eh_proj.weight'
  hf_files.allocate(folder / 'model-mtp.safetensors', {name: ('F32', (12, 24))})
  with pytest.raises(ValueError, match='model.layers.3.eh_proj.weight has no place in the model'):
    conversion.to_checkpoint(folder, tmp_path / 'all')
  assert not (tmp_path / 'all').exists()
  conversion.to_checkpoint(folder, tmp_path / 'some', drop=['model.layers.3.*'])
  assert checkpoint.find(tmp_path / 'some')
