"""What multi-token prediction costs an update of RL: no head, a detached one, OCC without and with
the detached head's own loss.

    python benchmarks/mtp.py --preset s --reps 9

The updates are called in turn in one process, on the same rows (4 prompts x 8 samples x 72 tokens),
with one microbatch and with two.
"""

import statistics
import tempfile
import time
from pathlib import Path

import common

# {name: (heads, methods, coefficient with which OCC trains its head besides)}
KINDS = {'none': (0, ('grpo',), 0.1), 'detach': (1, ('grpo', 'mtp_detach'), 0.1),
         'occ, train 0': (1, ('grpo', 'mtp_occ'), 0.0), 'occ': (1, ('grpo', 'mtp_occ'), 0.1)}


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

  tokenizer = tokenizer_lib.load('bytes')

  def build(depth, methods, train, microbatches, folder):
    c = base.get_config()
    c.phases = ('rl',)
    for name, value in common.SIZES[o.preset].items():
      c.model[name] = value
    c.model.update(
        vocab_size=common.VOCAB, qk_norm=True, rope_theta=1e6, max_length=256, unroll=True)
    c.model.mtp.depth = depth
    c.rl.update(prompts=4, group=8, max_prompt=8, max_tokens=64, methods=methods,
                microbatches=microbatches)
    c.rl.grpo.beta = 0.0
    if 'mtp_occ' in methods:
      c.rl.mtp_occ.train = train
    c.rl.data.format = 'arithmetic'
    c.rl.rewards.digits = 'digits'
    config = config_lib.Tracked(c)
    cfg = config_lib.model_config(config.model, tokenizer.vocab_size)
    mesh = mesh_lib.make_mesh(config.mesh.to_dict())
    with jax.set_mesh(mesh):
      run = phases.Run(config, cfg, model.specs(cfg), mesh, tokenizer, folder, jax.random.key(0))
      built = phases.build(run, 'rl', 0, 1000)
      params = jax.jit(lambda k: model.init(k, cfg))(jax.random.key(0))
      state = start.fresh_state(built, params, 0)
      batch, = built.phase.feed.batches(built.phase.feed.collect(state.params, built.memory, 0))
    now = [state]

    def call():
      with jax.set_mesh(mesh):
        now[0], metrics = built.phase.train_step(now[0], batch, np.float32(1e-4))
        jax.block_until_ready(metrics)

    share = model.flops(cfg, 72, depth) / model.flops(cfg, 72) - 1
    return call, share, run.close

  with tempfile.TemporaryDirectory() as folder:
    calls = {(name, n): build(*kind, n, Path(folder))
             for n in (1, 2) for name, kind in KINDS.items()}
    laps = {key: [] for key in calls}
    for i in range(o.reps + 2):
      for key, (call, _, _) in calls.items():
        began = time.process_time()
        call()
        if i >= 2:
          laps[key].append(time.process_time() - began)
    print(f'preset {o.preset}, {o.reps} updates of each in turn, process CPU time on one core\n')
    print('| head | microbatches | CPU ms, median | to no head | to detach | FLOPs to no head |')
    print('|---|---|---|---|---|---|')
    for (name, n), times in laps.items():
      to = lambda other: statistics.median(x / y for x, y in zip(times, laps[other, n]))
      print(f'| {name} | {n} | {1e3 * statistics.median(times):.1f} | {to("none"):.3f} '
            f'| {to("detach"):.3f} | {1 + calls[name, n][1]:.3f} |')
    for _, _, close in calls.values():
      close()


if __name__ == '__main__':
  child(common.options(__doc__))
