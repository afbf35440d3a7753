"""One expert layer, forward and backward, at equal active width: what more experts cost.

    python benchmarks/moe_layer.py --tokens 8192
"""

import sys

import common

EXPERTS = (8, 16, 32, 64)


def child(o):
  common.prepare()
  import jax
  import jax.numpy as jnp

  from moe import layer
  from nn import param
  from nn.config import MoE

  for experts in EXPERTS:
    cfg = common.model_config(o.preset, ffn='moe', moe=MoE(experts=experts, top_k=o.topk))
    params = param.init(jax.random.key(0), layer.specs(cfg))
    x = jax.random.normal(jax.random.key(1), (1, o.tokens, cfg.embed_dim))
    segments = jnp.ones((1, o.tokens), jnp.int32)
    grads = jax.jit(jax.grad(
        lambda p, x: jnp.sum(jnp.square(layer.apply(p, cfg, x, segments)[0])), (0, 1)))
    common.measure(
        'ours_moe_layer', lambda: jax.block_until_ready(grads(params, x)), o.reps, o.tokens,
        experts=experts)


if __name__ == '__main__':
  options = common.options(__doc__, tokens=1024, topk=2)
  child(options) if options.child else common.rounds(options, sys.argv[1:])
