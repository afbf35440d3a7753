"""Rollout batches used once, four times, and up to four times behind the gate (arXiv:2605.19425).

    python experiments/reuse.py

About 45 minutes on 2 cores. Prints the tables of docs/results.md and draws docs/images/reuse.svg.

The main job. Per seed one SFT run, from which all arms go on to a held-out accuracy of 0.9, or for
150 rollout batches at most, at a constant rate:

  single              every batch is used once
  naive               four times, whatever happens
  gate 0.1, 0.5, 1    up to four times, with the gate's threshold

naive and gate 0.5 run at three times the learning rate, too, for 80 batches at most.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import common  # noqa: E402

CONFIG = 'configs/rl_arithmetic_reuse.py'
SOON, AIM, RATE, HIGH = 0.8, 0.9, 1e-3, 3e-3
CAP = {RATE: 150, HIGH: 80}            # rollout batches
SHARED = ('rl.optimizer.schedule=constant', 'rl.optimizer.decay=0')
SOURCE = common.Arm('source', CONFIG, (*SHARED, 'rl.steps=0'))
TIMES = 4
SINGLE, NAIVE = ('rl.uses=1', 'rl.gate.window=0'), ('rl.gate.window=0',)
KINDS = {('single', RATE): SINGLE, ('naive', RATE): NAIVE}
KINDS |= {(f'gate {t:g}', RATE): (f'rl.gate.threshold={t}',) for t in (0.1, 0.5, 1.0)}
KINDS |= {('naive', HIGH): NAIVE, ('gate 0.5', HIGH): ('rl.gate.threshold=0.5',)}


def main() -> None:
  options = common.parser(__doc__, 'runs/reuse').parse_args()
  run = (*SHARED, f'rl.until=eval/accuracy>={AIM}', 'eval.every=5')
  arms = {(name, rate): common.Arm(
      f'{name} {rate}', CONFIG,
      (*run, f'rl.steps={CAP[rate]}', f'rl.optimizer.learning_rate={rate}', *changes),
      flags=('--allow_config_change',), start=common.copy_of(options.workdir, SOURCE))
      for (name, rate), changes in KINDS.items()}
  arms = common.chosen(arms, options)
  if not options.only_table:
    common.run_all([SOURCE], options)
    common.run_all(list(arms.values()), options)

  rows = []
  for (name, rate), arm in arms.items():
    runs = [common.of_phase(options.workdir, arm, s, 'rl') for s in options.seeds]
    uses = [sum(x.get('gate/updates', 1 if name == 'single' else TIMES)
                for x in run if 'reward' in x) for run in runs]
    took = [common.first(run, 'eval/accuracy', AIM) for run in runs]
    ends = [[x['eval/accuracy'] for x in run if 'eval/accuracy' in x] for run in runs]
    rollouts = [len([x for x in run if 'reward' in x]) for run in runs]
    soon = [common.first(run, 'eval/accuracy', SOON) for run in runs]
    told = lambda steps: ', '.join('–' if t is None else str(t) for t in steps)
    rows.append((
        name, f'{rate:g}', told(soon), told(took),
        ', '.join('–' if t is None else f'{u:.0f}' for t, u in zip(took, uses)),
        common.mean_and_spread([u / n for u, n in zip(uses, rollouts)], 2),
        ', '.join(f'{max(e):.2f}' for e in ends), ', '.join(f'{e[-1]:.2f}' for e in ends),
        f'{np.mean([max(x["shift/chi2"] for x in run if "shift/chi2" in x) for run in runs]):.2g}'))
  print(common.table(
      ('arm', 'rate', f'rollout batches to {SOON}, by seed', f'to {AIM}', f'updates to {AIM}',
       'uses of a batch', 'best accuracy', 'last accuracy', 'largest χ² of an update'), rows))

  def draw(panels):
    for column, rate in enumerate((RATE, HIGH)):
      for (name, r), arm in arms.items():
        for seed in options.seeds if r == rate else ():
          found = common.of_phase(options.workdir, arm, seed, 'rl')
          color = f'C{[n for n, _ in KINDS].index(name)}'
          label = name if seed == options.seeds[0] else None
          for row, metric in enumerate(('eval/accuracy', 'grad_norm/head')):
            points = [(x['step'], x[metric]) for x in found if metric in x]
            panels[row][column].plot(*zip(*points), color=color, label=label, lw=1)
      panels[0][column].set(title=f'learning rate {rate:g}', ylim=(0, 1))
      panels[1][column].set(yscale='log', xlabel='rollout batches')
    panels[0][0].set_ylabel('accuracy, held out')
    panels[1][0].set_ylabel("norm of the head's gradient")
    panels[0][0].legend(fontsize=8)

  common.figure(common.ROOT / 'docs/images/reuse.svg', draw, 8.0, 5.6, (2, 2))


if __name__ == '__main__':
  main()
