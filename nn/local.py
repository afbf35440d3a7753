"""The attention mixer over the last `model.window` tokens, with rotary angles of its own base.

Parameters and cache are those of `nn/attention.py`.
"""

import functools

from nn import attention
from nn.config import ModelConfig, Rope


def reach(cfg: ModelConfig) -> attention.Reach:
  return attention.Reach(cfg.window, cfg.local_theta, Rope())


specs, init_cache = attention.specs, attention.init_cache
apply = functools.partial(attention.apply, reach=reach)
prefill = functools.partial(attention.prefill, reach=reach)
step = functools.partial(attention.step, reach=reach)
flops = functools.partial(attention.flops, reach=reach)
