"""A byte language model of three FG2-GDN+ layers to one of attention, shown on Tiny Shakespeare.

    python launch/train.py --config configs/lm_hybrid.py --workdir runs/hybrid_lm \
        --config.pretrain.data.files=input.txt

As lm_shakespeare.py, but for the mixers, and shorter. experiments/lm_hybrid.py compares it with
pure stacks of either kind at equal parameters; docs/results.md has the table.
"""

from configs.lm_shakespeare import get_config as shakespeare


def get_config():
  c = shakespeare()
  c.model.pattern = ('gdn', 'gdn', 'gdn', 'attention')
  c.model.repeats = 1
  c.model.rope_theta = 0.0             # the recurrence knows the order
  c.model.ffw_dim = 384
  c.pretrain.steps = 700
  c.pretrain.optimizer.decay = 300
  c.eval.every = 350
  c.checkpoint.every = 350
  return c
