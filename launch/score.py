"""Scores texts by a model.

    python launch/score.py --model runs/x --input x.jsonl --output y.jsonl

A row of the input (.jsonl, also .gz or .zst) has 'text', 'tokens' (ids), 'prompt' and 'response',
of which the response is scored, or 'messages', of which the assistant's are. Nothing is appended to
a text but the tokenizer's own start before it; an 'id' is handed on.

Of every row comes one row, in the same order: 'tokens', all ids; 'logp', for each its
log-probability in nats, null where it was not scored; their 'sum' and 'perplexity'.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import cli  # noqa: E402

PASSES = 64            # whose rows are held at once, to be sorted by length


def main(arguments: list[str]) -> int:
  options = parse(arguments)
  cli.prepare(arguments)

  import json
  import tempfile

  import jax
  from data import fields, files, sources
  from evals import metrics
  from launch import progress, scoring, talk

  if Path(options.output).is_dir():
    raise ValueError(f'--output {options.output} is a folder; wanted a file')
  sizes = talk.mesh_sizes(options.mesh)
  with tempfile.TemporaryDirectory() as cache:
    rows = sources.load(options.input, cache)
    speaker = talk.open_model(options.model, sizes, options.step)
    logp = scoring.make_logp(speaker, options.rows)
    line = progress.Progress('score', len(rows), 'rows')
    total = tokens = 0
    with jax.set_mesh(speaker.mesh), files.whole(Path(options.output)) as out:
      for first in range(0, len(rows), PASSES * options.rows):
        some = range(first, min(first + PASSES * options.rows, len(rows)))
        found = [fields.at(rows, i, lambda row: scoring.read(row, speaker)) for i in some]
        for row, values in zip(found, logp([row['tokens'] for row in found], line.add)):
          row = scoring.scored(row, values)
          total, tokens = total + row['sum'], tokens + row.pop('scored')
          out.write((json.dumps(row, ensure_ascii=False, allow_nan=False) + '\n').encode())
  print(f'{len(rows)} rows, {tokens} tokens scored, perplexity '
        f'{metrics.perplexity(total, tokens):.6g}: {options.output}')
  return 0


def parse(arguments: list[str]):
  p = cli.parser(__doc__)
  p.add_argument('--model', required=True, help='a run, one of its steps, or a Hugging Face folder')
  p.add_argument('--step', type=int, help='of the checkpoint; the newest if not given')
  p.add_argument('--input', required=True, help='file of rows, or a glob')
  p.add_argument('--output', required=True, help='file to write; it appears when it is complete')
  p.add_argument('--rows', type=int, default=8, help='scored at once')
  p.add_argument('--mesh', default='data=1', help='devices along mesh axes, for instance model=4')
  return p.parse_args(arguments)


if __name__ == '__main__':
  cli.run(main)
