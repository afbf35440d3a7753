"""One optimiser step: forward, loss, backward, AdamW.

    python benchmarks/train_step.py --preset s --peer 'PYTHON hf_lm_step.py --preset s --what dense'
    python benchmarks/train_step.py --experts 8 \
        --peer 'PYTHON hf_lm_step.py --what moe --backends grouped_mm --experts 8'

With --experts the FFNs are mixtures of equal active width. With --apart 1 layers stand alone and
not under one stacked array of each kind, whose parts a CPU copies in every step.
"""

import dataclasses
import sys

import common


def child(o):
  common.prepare()
  import jax
  import numpy as np

  from launch import engine, optimizer
  from launch import step as step_lib
  from nn import model, param
  from nn.config import MoE
  from nn.types import Batch
  from rl import methods

  cfg = common.model_config(o.preset)
  if o.experts:
    cfg = dataclasses.replace(cfg, ffn='moe', moe=MoE(experts=o.experts, top_k=o.topk))
  if o.apart:
    cfg = dataclasses.replace(cfg, head=cfg.pattern * cfg.repeats, repeats=0)
  specs = model.specs(cfg)
  tx = optimizer.make(specs, name='adamw', weight_decay=0.01, clip=0.0, b1=0.9, b2=0.999, eps=1e-8)
  method = methods.build(('sft',), {})
  train_step = jax.jit(step_lib.make_train_step(
      step_lib.make_loss(engine.make_forward(cfg), method.terms), tx, specs), donate_argnums=0)
  params = model.init(jax.random.key(0), cfg)
  state = [step_lib.TrainState(np.int32(0), params, tx.init(param.split(params, specs)[0]))]
  tokens = np.random.default_rng(0).integers(4, 90, (o.batch, o.length)).astype(np.int32)
  mask = np.ones_like(tokens, np.float32)
  mask[:, 0] = 0
  positions = np.broadcast_to(np.arange(o.length, dtype=np.int32), tokens.shape)
  batch = jax.device_put(Batch(
      tokens=tokens, positions=positions, segments=np.ones_like(tokens), masks={'train': mask},
      weights={'nll': mask / mask.sum()}, coef={'nll': np.float32(1)}, data={},
      temperature=np.float32(1), use=np.int32(0)))
  losses = []

  def call():
    state[0], metrics = train_step(state[0], batch, np.float32(1e-4))
    losses.append(float(metrics['loss']))

  common.measure(
      'ours_train_step', call, o.reps, o.batch * o.length, batch=o.batch, length=o.length,
      experts=o.experts, parameters=param.count(specs))
  assert losses[-1] < losses[0], losses


if __name__ == '__main__':
  options = common.options(__doc__, batch=8, length=128, experts=0, topk=2, apart=0)
  child(options) if options.child else common.rounds(options, sys.argv[1:])
