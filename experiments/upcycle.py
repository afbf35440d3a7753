"""Growing 16 experts to 32 in mid-training (arXiv:2604.19835), against having either all along.

    python experiments/upcycle.py

About 50 minutes on 2 cores. Prints the tables of docs/results.md and draws docs/images/upcycle.svg.

The text is a language of 128 words in which the two words before decide which four may follow:
16,384 facts, more than 16 experts hold. Per seed there are two sources of 800 steps at a constant
rate, with 16 and with 32 experts. Every arm goes on from one of them, with its optimiser and on the
same text, for 25 % or 100 % of those steps, the rate falling at the end:

  16, 32              the source as it is; 32 never was anything else
  uniform             the source of 16, every expert copied once
  grad_sq             the same, experts with the largest gradients copied up to three times
  fresh               the source of 16, with 16 experts and router columns as at the start of a run
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import common  # noqa: E402

CONFIG = 'configs/upcycle.py'
WORDS, FOLLOWERS, TOKENS, HELDOUT = 128, 4, 8_000_000, 32_768
SOURCE, SHARES = 800, {'25 %': (200, 100), '100 %': (800, 300)}    # steps; and those of decay
LARGE = ('model.moe.experts=32',)


def language(folder: Path) -> tuple[str, ...]:
  """Writes the text, once, and returns what makes a run read it."""
  files = {name: folder / f'{name}.npy' for name in ('train', 'heldout')}
  if not files['heldout'].exists():
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(0), 512
    popular = 1 / np.arange(1, WORDS + 1) ** 0.7
    followers = rng.choice(WORDS, (WORDS, WORDS, FOLLOWERS), p=popular / popular.sum())
    chance = np.cumsum(2.0 ** -np.arange(1, FOLLOWERS + 1))
    text = rng.integers(WORDS, size=(TOKENS // lines, lines))
    for t in range(2, len(text)):
      which = np.searchsorted(chance / chance[-1], rng.random(lines))
      text[t] = followers[text[t - 2], text[t - 1], which]
    text = text.T.reshape(-1).astype(np.uint16)
    np.save(files['train'], text[:-HELDOUT])
    np.save(files['heldout'], text[-HELDOUT:])
  files = {name: path.resolve() for name, path in files.items()}
  return (f'pretrain.data.files={files["train"]}',
          f'pretrain.data.heldout_files={files["heldout"]}')


def continued(workdir: Path, text: tuple[str, ...]) -> dict[tuple[str, str], common.Arm]:
  """{(share, name): an arm that goes on from its source}."""

  def grown(selection):
    def command(folder, seed):
      return ['launch/upcycle.py', '--input', common.folder(workdir, small, seed).resolve(),
              '--output', folder, '--factor', '2', '--selection', selection]
    return command

  small, large = sources(text)
  same = lambda source: common.copy_of(workdir, source)
  kinds = {'16': ((), same(small)), '32': (LARGE, same(large))}
  kinds |= {name: (LARGE, grown(name)) for name in ('uniform', 'grad_sq', 'fresh')}
  return {(share, name): common.Arm(
      f'{name} {share}'.replace(' %', ''), CONFIG,
      (*changes, *text, f'pretrain.steps={SOURCE + more}', f'pretrain.optimizer.decay={decay}'),
      start=begin, flags=('--allow_config_change',))
      for share, (more, decay) in SHARES.items() for name, (changes, begin) in kinds.items()}


def sources(text: tuple[str, ...]) -> list[common.Arm]:
  run = (*text, f'pretrain.steps={SOURCE}')
  return [common.Arm('source 16', CONFIG, run), common.Arm('source 32', CONFIG, (*LARGE, *run))]


def main() -> None:
  options = common.parser(__doc__, 'runs/upcycle').parse_args()
  text = language(options.workdir)
  arms = continued(options.workdir, text)
  if not options.only_table:
    common.run_all(sources(text), options)
    common.run_all(list(arms.values()), options)
  final = {key: np.array([common.last(options.workdir, arm, s, 'eval/loss') for s in options.seeds])
           for key, arm in arms.items()}
  rows = []
  for (share, name), losses in final.items():
    small, large = final[share, '16'], final[share, '32']
    closed = (small - losses) / (small - large)
    shown = '' if name in ('16', '32') else common.mean_and_spread(closed, 2)
    better = '' if name == '16' else common.mean_and_spread(small - losses)
    rows.append((share, name, common.mean_and_spread(losses), better, shown))
  print(common.table(
      ('continued', 'arm', 'nats per word, held out', 'better than 16, same seed', 'gap closed'),
      rows))
  for share in SHARES:
    small, large = final[share, '16'], final[share, '32']
    spread = max(small.std(ddof=1), large.std(ddof=1)) if len(small) > 1 else np.nan
    print(f'{share}: 32 experts are better than 16 by {np.mean(small - large):.3f}, '
          f'{np.mean(small - large) / spread:.1f} times the larger spread of the seeds')

  def curve(arm):
    runs = [[(x['step'], x['eval/loss']) for x in common.lines(options.workdir, arm, s)
             if 'eval/loss' in x] for s in options.seeds]
    steps = sorted(set.intersection(*(set(step for step, _ in run) for run in runs)))
    return steps, [np.mean([dict(run)[step] for run in runs]) for step in steps]

  def draw(axes):
    color = {name: f'C{i}' for i, name in enumerate(dict.fromkeys(name for _, name in arms))}
    for (share, name), arm in arms.items():
      long = share == '100 %'
      axes.plot(*curve(arm), color=color[name], label=name if long else None,
                linestyle='-' if long else ':')
    for arm, name in zip(sources(text), ('16', '32')):
      axes.plot(*curve(arm), color=color[name], alpha=0.5)
    axes.set(xlabel='steps of 4,096 tokens', ylabel='nats per word, held out', xlim=(400, None),
             ylim=(1.5, 2.8))
    axes.legend()

  common.figure(common.ROOT / 'docs/images/upcycle.svg', draw)


if __name__ == '__main__':
  main()
