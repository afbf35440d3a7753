"""Checkpoints of small models for the commands that open one, and what the models say by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from data import tokenizer as tokenizer_lib
from launch import checkpoint, config, hf_files
from nn import model

BYTES = tokenizer_lib.load('bytes')
CFG = dict(
    vocab_size=260, embed_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, ffw_dim=16, max_length=96)


def make_config(sizes=CFG, **data):
  c = base.get_config()
  c.phases = ('sft',)
  c.model.update(sizes)
  c.sft.data.update(data)
  return c


def write(workdir, c, steps, num_ids=BYTES.vocab_size):
  """Checkpoints of random parameters, {step: seed}; or of given ones. num_ids: the tokenizer's."""
  cfg = config.model_config(c.model, num_ids)
  with checkpoint.Checkpointer(workdir, keep=5) as checkpoints:
    for step, found in steps.items():
      params = found if isinstance(found, dict) else jax.tree.map(
          lambda x: 4 * x, model.init(jax.random.key(found), cfg))
      meta = {'config': json.loads(config.to_json(c)), 'phase': 'sft', 'phases': ['sft']}
      checkpoints.save(step, {'params': params}, {}, meta, wait=True)
  return cfg, params


def parrot(c, follows):
  """Parameters of a model that sees one character: {character: the next it says, '' for end}."""
  cfg = config.model_config(c.model, BYTES.vocab_size)
  params = model.init(jax.random.key(0), cfg)
  said = np.zeros((cfg.vocab_size, cfg.embed_dim), np.float32)
  for before, after in follows.items():
    said[(BYTES.encode(after) or [BYTES.eos_id])[0], BYTES.encode(before)[0]] = 1
  return params | {
      'blocks': jax.tree.map(jnp.zeros_like, params['blocks']),
      'embed': {'table': jnp.eye(cfg.vocab_size, cfg.embed_dim)},
      'unembed': {'table': jnp.asarray(said)}}


def logp_by_hand(params, cfg, ids):
  """[length - 1]: of all tokens but the first, by a softmax over a forward pass without padding."""
  tokens = jnp.asarray([ids])
  positions = jnp.arange(len(ids))[None]
  with jax.default_matmul_precision('float32'):
    hidden = model.forward(params, cfg, tokens, positions, jnp.ones_like(tokens)).hidden
    logits = np.asarray(model.unembed(params, cfg, hidden)[0], np.float64)
  normaliser = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
  return logits[np.arange(len(ids) - 1), ids[1:]] - normaliser[:-1]


def bits(folder):
  """Every tensor of a Hugging Face folder: {name: (dtype, shape, bytes)}."""
  return {name: (t.kind, t.shape, np.array(hf_files.mapped(t)).tobytes())
          for name, t in hf_files.tensors(folder).items()}
