"""Imported models say what transformers says of them, to the last tensor; exported ones are theirs
again.
"""

import functools

import hf_parity as parity
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nn import hf, model, param

pytestmark = pytest.mark.extras
pytest.importorskip('transformers')

KINDS = sorted({kind for kind, _ in parity.CASES.values()})


@pytest.mark.parametrize('case', parity.CASES)
def test_model_is_the_public_one_and_back(case, tmp_path):
  found = parity.measure(case, tmp_path)
  assert {name: d for name, d in found.items() if d > parity.TOLERANCE} == {}


@pytest.mark.parametrize('kind', KINDS)
def test_every_tensor_counts(kind, tmp_path):
  """Without one the plan names it; two of a shape exchanged make other parameters; and every number
  of the imported model has an effect on what it says, so other parameters are another model.
  """
  case = next(name for name, (k, _) in parity.CASES.items() if k == kind)
  both = parity.make(case, tmp_path)
  parity.assert_every_tensor_counts(hf.FAMILIES[both.theirs.config.model_type], both)


@pytest.mark.parametrize('kind', KINDS)
def test_every_parameter_has_an_effect(kind, tmp_path):
  case = next(name for name, (k, _) in parity.CASES.items() if k == kind)
  both = parity.make(case, tmp_path)
  ids = jnp.asarray(parity.tokens(2, 100), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(100), ids.shape)

  def total(params):
    hidden = model.forward(params, both.cfg, ids, positions, jnp.ones_like(ids)).hidden
    return jnp.sum(model.unembed(params, both.cfg, hidden)[:, 5:] ** 3)

  value, grads = jax.jit(jax.value_and_grad(total))(both.params)
  specs = param.flat(model.specs(both.cfg))
  for path, grad in param.flat(grads).items():
    if not specs[path].trainable:      # a bias that chooses experts: other values choose others
      other = param.unflat({p: -a if p == path else a for p, a in param.flat(both.params).items()})
      assert jax.jit(total)(other) != value, path
      continue
    moved = np.abs(np.asarray(grad)) > 0
    alone = grad.ndim < 2 or 'expert' in specs[path].axes      # no token may have chosen an expert
    assert moved.any() if alone else moved.reshape(len(moved), -1).any(axis=1).all(), path


def test_fused_experts_are_read_too(tmp_path):
  """As transformers holds them in memory, under its modules' names."""
  for case in ('qwen3_moe', 'mixtral'):
    both = parity.make(case, tmp_path / case)
    state = {name: t.numpy() for name, t in both.theirs.state_dict().items()}
    assert any('gate_up_proj' in name for name in state)
    family = hf.FAMILIES[case]
    plan = hf.plan(family, both.cfg, {name: x.shape for name, x in state.items()})
    for path, s in param.flat(model.specs(both.cfg)).items():
      whole = tuple(slice(None) for _ in s.shape)
      np.testing.assert_array_equal(
          hf.read(plan[path], s.shape, whole, state.__getitem__, np.float32),
          param.flat(both.params)[path])


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_comes_in_exactly_and_goes_out_as_it_was(dtype, tmp_path):
  import torch
  theirs = parity.public_model(*parity.CASES['qwen3']).to(getattr(torch, dtype))
  parity.save(theirs, tmp_path / 'public')
  cfg = parity.hf_files.model_config(tmp_path / 'public')
  params = parity.hf_files.load(tmp_path / 'public', cfg, param.abstract(model.specs(cfg)))
  both = parity.Both(theirs, tmp_path / 'public', cfg, params)
  table = theirs.get_input_embeddings().weight.detach().float().numpy()
  np.testing.assert_array_equal(params['embed']['table'], table)
  assert params['embed']['table'].dtype == jnp.float32
  assert parity.same_bits(both.folder, parity.export(both, tmp_path / 'again'))


def test_files_are_the_very_same(tmp_path):
  both = parity.make('llama', tmp_path)
  again = parity.export(both, tmp_path / 'again')
  bits = functools.partial(lambda name, folder: (folder / name).read_bytes(), 'model.safetensors')
  assert bits(both.folder) == bits(again)


def test_several_shards_load_in_transformers(tmp_path):
  both = parity.make('qwen3_moe', tmp_path)
  again = parity.export(both, tmp_path / 'again', shard_bytes=20_000)
  assert len(list(again.glob('model-*-of-*.safetensors'))) > 2
  assert parity.difference_of_exported(both, again) <= parity.TOLERANCE
  assert parity.same_bits(both.folder, again)
