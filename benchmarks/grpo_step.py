"""A GRPO step through the run's own feed: prompts, sampling, rewards, advantages, batch, update.

    python benchmarks/grpo_step.py --preset s \
        --peer 'PYTHON tunix_grpo_step.py --preset s --mode grpo' \
        --peer 'PYTHON trl_grpo_step.py --preset s'

As the peers': 4 prompts x 8 samples of exactly 64 tokens, clip 0.2, no KL, AdamW, rows used once.
"""

import sys
import tempfile
from pathlib import Path

import common


def child(o):
  common.prepare()
  import jax
  import numpy as np

  from configs import base
  from data import tokenizer as tokenizer_lib
  from launch import config as config_lib
  from launch import mesh as mesh_lib
  from launch import phases, start
  from nn import model

  c = base.get_config()
  c.phases = ('rl',)
  for name, value in common.SIZES[o.preset].items():
    c.model[name] = value
  c.model.update(vocab_size=common.VOCAB, qk_norm=True, rope_theta=1e6, max_length=256, unroll=True)
  c.rl.update(steps=1000, prompts=4, group=8, max_prompt=8, max_tokens=o.new)
  c.rl.data.format = 'arithmetic'
  c.rl.rewards.digits = 'digits'
  c.rl.grpo.beta = 0.0
  c.log.samples_every = 10**6
  config = config_lib.Tracked(c)
  tokenizer = tokenizer_lib.load('bytes')
  cfg = config_lib.model_config(config.model, tokenizer.vocab_size)
  mesh = mesh_lib.make_mesh(config.mesh.to_dict())
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    run = phases.Run(
        config, cfg, model.specs(cfg), mesh, tokenizer, Path(folder), jax.random.key(0))
    built = phases.build(run, 'rl', 0, 1000)
    params = jax.jit(lambda k: model.init(k, cfg))(jax.random.key(0))
    now = [start.fresh_state(built, params, 0), built.memory, 0]

    def call():
      state, memory, step = now
      work = built.phase.feed.collect(state.params, memory, step)
      for batch in built.phase.feed.batches(work):
        state, metrics = built.phase.train_step(state, batch, np.float32(1e-4))
      now[:] = state, built.phase.feed.finish(work), step + 1
      jax.block_until_ready(metrics)
      # Rows may end early by the end token; the work is that of full rows either way.
      assert work.rows.tokens.shape == (32, 8 + o.new)

    common.measure('ours_grpo_step', call, o.reps, 32 * o.new, rows=32, new=o.new)
    run.close()


if __name__ == '__main__':
  options = common.options(__doc__, new=64)
  child(options) if options.child else common.rounds(options, sys.argv[1:])
