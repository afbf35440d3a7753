"""Our own format: it holds every model that no public class computes, and gives it back."""

import dataclasses
import json

import nn_tiny as tiny
import numpy as np
import pytest

from nn import hf, model, param
from nn.config import GDN, MLA, MTP, MoE

# Every mixer and FFN, some of them twice, alone and under the scan.
CFG = tiny.config(
    head=('attention', 'mla'), pattern=(('gdn', 'moe'), ('local', 'mlp'), ('mla', 'moe')),
    repeats=2, tail=('gdn',), window=3, gdn=GDN(variant='fg2_plus', beta_rank=3, lower_bound=-5.0),
    mla=MLA(q_rank=5, rope_dim=2), moe=MoE(experts=4, scores='sigmoid', bias=True, shared_dim=6),
    attention_gate=True, attention_bias=('q', 'gate'), dtype='bfloat16', remat='full',
    mtp=MTP(depth=2, order=('embedding', 'hidden')))


def draw(cfg):
  """{path: parameter}, every number another."""
  rng = np.random.default_rng(0)
  return {path: rng.standard_normal(s.shape).astype(np.float32)
          for path, s in param.flat(model.specs(cfg)).items()}


def test_a_model_without_public_class_comes_back_bit_by_bit():
  family = hf.choose(CFG)
  config = json.loads(json.dumps(hf.public_config(family, CFG)))
  assert config['model_type'] == 'nacre' and 'remat' not in config['model']
  again = hf.model_config(config | {'dtype': 'float32', 'eos_token_id': 1})
  assert again == dataclasses.replace(CFG, dtype='float32', remat='none')
  params, tensors = draw(CFG), {}
  for piece in hf.pieces(family, CFG):
    tensor = tensors.setdefault(piece.tensor, np.full(piece.layout.theirs, np.nan, np.float32))
    hf.write(piece, params[piece.path][piece.lead], tensor)
  np.testing.assert_array_equal(tensors['layers.1.mixer.k_up'], params['head/1/mixer/k_up'])
  np.testing.assert_array_equal(tensors['mtp.1.project'], params['mtp/1/project'])
  np.testing.assert_array_equal(tensors['layers.5.ffn.gate'], params['blocks/0/ffn/gate'][1])
  plan = hf.plan(hf.family_of(config), again, {name: t.shape for name, t in tensors.items()})
  for path, expected in params.items():
    whole = tuple(slice(0, n) for n in expected.shape)
    found = hf.read(plan[path], expected.shape, whole, tensors.__getitem__, np.float32)
    np.testing.assert_array_equal(found, expected, err_msg=path)


def test_a_model_that_has_grown_is_written_by_the_table_of_the_smaller_one():
  grown = dataclasses.replace(CFG, moe=dataclasses.replace(CFG.moe, experts=8))
  family = hf.choose(CFG)
  config = hf.public_config(family, grown, hf.public_config(family, CFG))
  assert hf.model_config(config).moe.experts == 8
  shapes = {p.tensor: p.layout.theirs for p in hf.pieces(family, grown)}
  assert shapes['layers.2.ffn.router'] == (16, 8)


def test_another_version_s_fields_are_named():
  config = hf.public_config(hf.choose(CFG), CFG)
  with pytest.raises(ValueError, match="model is not what this version knows.*'width'"):
    hf.model_config(config | {'model': config['model'] | {'width': 3}})
