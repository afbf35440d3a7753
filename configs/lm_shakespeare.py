"""A language model of plain text, byte by byte.

    python launch/train.py --config configs/lm_shakespeare.py --workdir runs/shakespeare \
        --config.pretrain.data.files=input.txt

Any text file will do; the numbers are for Tiny Shakespeare. The last tenth of the file is kept for
evaluation and read whole, in order. docs/results.md has time and loss.
"""

from configs.base import get_config as base


def get_config():
  c = base()
  c.phases = ('pretrain',)

  c.model.embed_dim = 192
  c.model.num_heads = 3
  c.model.num_kv_heads = 3
  c.model.head_dim = 64
  c.model.ffw_dim = 512
  c.model.repeats = 4
  c.model.qk_norm = True
  c.model.unroll = True
  c.model.max_length = 256

  c.pretrain.steps = 3200
  c.pretrain.rows = 8
  c.pretrain.length = 256
  c.pretrain.data.format = 'text'
  c.pretrain.data.heldout = 0.1
  c.pretrain.optimizer.name = 'muon'
  c.pretrain.optimizer.learning_rate = 5e-3
  c.pretrain.optimizer.weight_decay = 0.1
  c.pretrain.optimizer.schedule = 'wsd'
  c.pretrain.optimizer.warmup = 50
  c.pretrain.optimizer.decay = 1400

  c.eval.every = 800
  c.checkpoint.every = 800
  c.log.every = 20
  return c
