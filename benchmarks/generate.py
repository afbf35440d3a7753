"""Prefill and decoding of a batch of prompts, every row to its full length.

    python benchmarks/generate.py --preset s --batch 16 \
        --peer 'PYTHON tunix_grpo_step.py --preset s --mode generate --batch 16'
"""

import sys

import common


def child(o):
  common.prepare()
  import jax
  import numpy as np

  from launch import engine
  from nn import model
  from rl import sample

  cfg = common.model_config(o.preset)
  decoder = engine.make_decoder(cfg)
  params = model.init(jax.random.key(0), cfg)
  prepare = jax.jit(lambda p: model.prepare(p, cfg))
  tokens = np.random.default_rng(0).integers(4, 90, (o.batch, o.prompt)).astype(np.int32)
  sampling = sample.Sampling(max_tokens=o.new)     # no eos: rows run to their full length
  count = [0]

  def call():
    count[0] += 1
    keys = jax.random.split(jax.random.key(count[0]), o.batch)
    out = sample.sample(
        decoder, prepare(params), tokens, np.zeros(o.batch, np.int32), keys, group=1,
        sampling=sampling)
    assert int(out.length.sum()) == o.batch * o.new

  common.measure('ours_generate', call, o.reps, o.batch * o.new, batch=o.batch, new=o.new)


if __name__ == '__main__':
  options = common.options(__doc__, batch=16, prompt=32, new=96)
  child(options) if options.child else common.rounds(options, sys.argv[1:])
