"""Multi-query associative recall, a yardstick of what a mixer's state can hold; see data/recall.py.

    python launch/train.py --config configs/mqar.py --workdir runs/mqar \
        --config.model.gdn.variant=kda

Two layers, one model for all numbers of pairs. experiments/mqar.py compares mixers; docs/results.md
has the table.
"""

from configs.base import get_config as base


def get_config():
  c = base()
  c.phases = ('sft',)
  c.model.embed_dim = 64
  c.model.num_heads = 2
  c.model.num_kv_heads = 2
  c.model.head_dim = 16
  c.model.ffw_dim = 128
  c.model.pattern = ('gdn',)
  c.model.repeats = 2
  c.model.unroll = True
  c.model.max_length = 128

  c.sft.steps = 1600
  c.sft.rows = 32
  c.sft.length = 128
  c.sft.data.format = 'recall'
  c.sft.optimizer.name = 'muon'
  c.sft.optimizer.learning_rate = 1e-2
  c.sft.optimizer.weight_decay = 0.1
  c.sft.optimizer.schedule = 'wsd'
  c.sft.optimizer.warmup = 100
  c.sft.optimizer.decay = 600

  c.eval.every = 400
  c.checkpoint.every = 400
  c.checkpoint.keep = 1
  c.log.every = 20
  c.log.tensorboard = False
  return c
