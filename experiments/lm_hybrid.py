"""Attention, FG2-GDN+ and three of one to one of the other, as language models of Tiny Shakespeare.

    python experiments/lm_hybrid.py --text input.txt

About 30 minutes on 2 cores. Prints the table of docs/results.md and draws
docs/images/lm_hybrid.svg. All three have four layers and as many parameters: the FFN's width makes
up for what the mixers' projections cost.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import common  # noqa: E402

CONFIG = 'configs/lm_hybrid.py'
KINDS = {
    'attention': ('model.pattern=attention', 'model.repeats=4', 'model.rope_theta=10000'),
    'fg2_plus': ('model.pattern=gdn', 'model.repeats=4'),
    'hybrid': (),
}


def main() -> None:
  p = common.parser(__doc__, 'runs/lm_hybrid')
  p.add_argument('--text', type=Path, required=True, help='the text file')
  options = p.parse_args()
  text = f'pretrain.data.files={options.text.resolve()}'
  arms = [common.Arm(arm.name, arm.config, (*arm.overrides, text))
          for arm in common.equal(CONFIG, KINDS, range(384, 1024, 8))]
  if not options.only_table:
    common.run_all(arms, options)
  rows = []
  for arm in arms:
    found = [common.last(options.workdir, arm, s, 'eval/loss') for s in options.seeds]
    rows.append((arm.name, f'{common.count(CONFIG, arm.overrides[:-1]):,}',
                 common.mean_and_spread(found)))
  print(common.table(('stack', 'parameters', 'nats per byte, held out'), rows))

  def draw(axes):
    for arm in arms:
      curves = [
          [(x['step'], x['loss']) for x in common.lines(options.workdir, arm, s) if 'loss' in x]
          for s in options.seeds]
      steps = [step for step, _ in curves[0]]
      mean = np.mean([[loss for _, loss in curve] for curve in curves], axis=0)
      axes.plot(
          steps, np.convolve(np.pad(mean, 2, 'edge'), np.ones(5) / 5, 'valid'), label=arm.name)
    axes.set(xlabel='steps of 2,048 tokens', ylabel='training loss, nats per byte', ylim=(1.2, 2.6))
    axes.legend()

  common.figure(common.ROOT / 'docs/images/lm_hybrid.svg', draw)


if __name__ == '__main__':
  main()
