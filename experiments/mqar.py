"""Which mixer holds how many pairs: configs/mqar.py with five mixers of equal parameter count.

    python experiments/mqar.py

Under an hour on 2 cores. Prints the table of docs/results.md and draws docs/images/mqar.svg. The
FFN's width makes up for what the mixers' projections cost. Attention has no short convolution, so
it has to learn to look one token back before it can recall anything, and is shown with three times
the steps too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import common  # noqa: E402
from launch import config as config_lib  # noqa: E402

CONFIG = 'configs/mqar.py'
MIXERS = {
    'attention': ('model.pattern=attention',),
    'attention, 3x steps': (
        'model.pattern=attention', 'sft.steps=4800', 'sft.optimizer.decay=1800'),
    **{name: (f'model.gdn.variant={name}',) for name in ('gdn', 'kda', 'fg2', 'fg2_plus')},
}


def main() -> None:
  options = common.parser(__doc__, 'runs/mqar').parse_args()
  chosen = common.equal(CONFIG, MIXERS, range(128, 512, 2))
  if not options.only_table:
    common.run_all(chosen, options)
  pairs = config_lib.load(common.ROOT / CONFIG).recall.pairs
  found = {arm.name: {n: [common.last(options.workdir, arm, s, f'eval/{n} pairs/token_accuracy')
                          for s in options.seeds] for n in pairs} for arm in chosen}
  rows = [(arm.name, f'{common.count(CONFIG, arm.overrides):,}',
           *(common.mean_and_spread(found[arm.name][n]) for n in pairs)) for arm in chosen]
  print(common.table(('mixer', 'parameters', *(f'{n} pairs' for n in pairs)), rows))

  def draw(axes):
    for name, by_pairs in found.items():
      means = [sum(by_pairs[n]) / len(by_pairs[n]) for n in pairs]
      line, = axes.plot(pairs, means, marker='o', label=name)
      axes.fill_between(pairs, [min(by_pairs[n]) for n in pairs], [max(by_pairs[n]) for n in pairs],
                        color=line.get_color(), alpha=0.15)
    axes.set(xscale='log', xlabel='pairs in a row', ylabel='accuracy of the answers, held out',
             xticks=pairs, xticklabels=pairs, ylim=(0, 1.02))
    axes.minorticks_off()
    axes.legend(loc='center left', bbox_to_anchor=(0, 0.72))

  common.figure(common.ROOT / 'docs/images/mqar.svg', draw)


if __name__ == '__main__':
  main()
