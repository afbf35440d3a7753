"""Heads of multi-token prediction: what they cost the model, and four regimes of them in RL.

    python experiments/mtp.py --text input.txt

About 40 minutes on 2 cores. Prints the tables of docs/results.md and draws docs/images/mtp.svg.

Pretraining on Tiny Shakespeare and on demonstrations of worked sums, without heads, with one and
with two; one seed. Then RL on worked sums (arXiv:2605.28184): per seed one SFT run with one head,
from which all arms go on to a held-out accuracy of 0.9, or for 80 rollout batches at most, each of
four updates, at a constant rate:

  detach              the head learns what is sampled, the model learns nothing from it
  ce                  the model learns from that, too, with coefficient 0.1
  policy 0.1, 1       the policy loss is taken of the head, too, with this coefficient
  occ                 the same, with the coefficient estimated every update
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import common  # noqa: E402

SUMS, TEXT = 'configs/rl_arithmetic_mtp.py', 'configs/lm_shakespeare.py'
CAP, AIM = 80, 0.9
SHARED = ('rl.optimizer.schedule=constant', 'rl.optimizer.decay=0')
SOURCE = common.Arm('source', SUMS, (*SHARED, 'rl.steps=0'))
REGIMES = {
    'detach': ('rl.methods=grpo,mtp_detach',),
    'ce': ('rl.methods=grpo,mtp_ce',),
    'policy 0.1': ('rl.methods=grpo,mtp_policy', 'rl.mtp_policy.coef=0.1'),
    'policy 1': ('rl.methods=grpo,mtp_policy', 'rl.mtp_policy.coef=1.0'),
    'occ': (),
}


def pretraining(text: Path) -> dict[tuple[str, int], common.Arm]:
  """{(data, heads): an arm}."""
  arms = {}
  for depth in (0, 1, 2):
    heads = (f'model.mtp.depth={depth}', f'sft.mtp.coef={0.3 if depth else 0.0}')
    arms['worked sums', depth] = common.Arm(
        f'sums {depth}', SUMS, ('phases=sft', 'sft.steps=200', 'sft.until=', *heads))
  for depth in (0, 1, 2):
    heads = (f'model.mtp.depth={depth}', 'pretrain.mtp.coef=0.3', 'pretrain.mtp.switch=170')
    arms['Shakespeare', depth] = common.Arm(f'text {depth}', TEXT, (
        f'pretrain.data.files={text.resolve()}', 'pretrain.steps=250',
        'pretrain.optimizer.decay=100', *(heads if depth else ())))
  return arms


def main() -> None:
  p = common.parser(__doc__, 'runs/mtp')
  p.add_argument('--text', type=Path, required=True, help='the text file')
  options = p.parse_args()
  before = pretraining(options.text)
  run = (*SHARED, f'rl.steps={CAP}', f'rl.until=eval/accuracy>={AIM}', 'eval.every=5')
  arms = {name: common.Arm(
      name, SUMS, (*run, *changes), flags=('--allow_config_change',),
      start=common.copy_of(options.workdir, SOURCE)) for name, changes in REGIMES.items()}
  one = argparse.Namespace(**vars(options) | {'seeds': options.seeds[:1]})
  before, arms = common.chosen(before, options), common.chosen(arms, options)
  if not options.only_table:
    common.run_all([SOURCE], options)
    common.run_all(list(arms.values()), options)
    common.run_all(list(before.values()), one)

  rows = []
  for (data, depth), arm in before.items():
    final = lambda name: common.mean_and_spread(
        [common.last(options.workdir, arm, s, name) for s in one.seeds])
    drafts = [final(f'eval/mtp{k}/agrees') if k <= depth else '' for k in (1, 2)]
    rows.append((data, str(depth), final('eval/loss'), *drafts))
  print(common.table(('pretrained on', 'heads', 'loss of the model, held out',
                      'draft 1 is what the model says', 'draft 2'), rows))

  runs = {name: [common.of_phase(options.workdir, arm, s, 'rl') for s in options.seeds]
          for name, arm in arms.items()}
  series = lambda run, name: [x[name] for x in run if name in x]
  rows = []
  for name, found in runs.items():
    took = [common.first(run, 'eval/accuracy', AIM) for run in found]
    active = [np.mean(series(run, 'mtp_occ/active1')) for run in found if name == 'occ']
    rows.append((
        name, ', '.join('–' if t is None else str(t) for t in took),
        ', '.join(f'{max(series(run, "eval/accuracy")):.2f}' for run in found),
        common.mean_and_spread([np.mean(series(run, 'reward')[:50]) for run in found]),
        common.mean_and_spread([np.mean(series(run, 'mtp/agrees1')[-10:]) for run in found]),
        common.mean_and_spread(active, 2) if active else ''))
  print(common.table(
      ('regime', f'rollout batches to {AIM}, by seed', 'best accuracy', 'reward, first 50',
       'draft is what the model says, last 10', '\\|λ\\| > 0.01'), rows))

  def draw(panels):
    for i, (name, found) in enumerate(runs.items()):
      for j, one in enumerate(found):
        for axes, metric in zip(panels[0], ('eval/accuracy', 'mtp/agrees1', 'mtp_occ/lambda1')):
          points = [(x['step'], x[metric]) for x in one if metric in x]
          if points:
            axes.plot(*zip(*points), color=f'C{i}', lw=1, label=None if j else name)
    for axes, label in zip(panels[0], ('accuracy, held out', 'draft is what the model says', 'λ')):
      axes.set(xlabel='rollout batches', title=label)
    panels[0][0].legend(fontsize=8)

  common.figure(common.ROOT / 'docs/images/mtp.svg', draw, 10.0, 3.4, (1, 3))


if __name__ == '__main__':
  main()
