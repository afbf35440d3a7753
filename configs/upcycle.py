"""A mixture of 16 experts for growing, of which a token takes 2, balanced by selection biases.

    python launch/train.py --config configs/upcycle.py --workdir runs/mixture \
        --config.pretrain.data.files=tokens.npy --config.pretrain.data.heldout=0.01
    python launch/upcycle.py --input runs/mixture --output runs/grown --factor 2

experiments/upcycle.py makes a text whose loss falls with the number of experts, and compares ways
of growing with training all experts from the start; docs/results.md has the table.
"""

from configs.base import get_config as base


def get_config():
  c = base()
  c.phases = ('pretrain',)

  c.model.embed_dim = 64
  c.model.num_heads = 2
  c.model.num_kv_heads = 2
  c.model.head_dim = 32
  c.model.repeats = 2
  c.model.unroll = True
  c.model.max_length = 128
  c.model.ffn = 'moe'
  c.model.moe.experts = 16
  c.model.moe.top_k = 2
  c.model.moe.ffw_dim = 32
  c.model.moe.scores = 'sigmoid'
  c.model.moe.bias_rate = 1e-3

  c.pretrain.steps = 800
  c.pretrain.rows = 32
  c.pretrain.length = 128
  c.pretrain.data.format = 'tokens'
  c.pretrain.optimizer.learning_rate = 3e-3
  c.pretrain.optimizer.schedule = 'wsd'
  c.pretrain.optimizer.warmup = 50

  c.eval.every = 50
  c.checkpoint.every = 400
  c.checkpoint.keep = 1
  c.log.every = 20
  c.log.tensorboard = False
  return c
