"""Our models beside those of transformers: writes docs/interop.md.

    python experiments/interop.py

Needs the extra 'parity'. Five minutes on 2 cores. For every case of tests/nn/hf_parity.py, a small
random model whose every number was replaced is imported, compared, exported and loaded again.
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests' / 'nn')]
os.environ['JAX_PLATFORMS'] = 'cpu'

import hf_parity as parity  # noqa: E402

HEAD = '''# Public models

Written by `python experiments/interop.py`: random small models of every family, made by \
`transformers` {version}, every tensor
replaced by random numbers, saved, imported here (`launch/convert.py`, `nn/hf/`), and compared in \
float32 on CPU. Numbers are
the largest absolute differences of logits.

- *logits*: {length} random tokens in each of two rows; *padding*: the same with one row padded on \
the left, one on the right.
- *greedy*: {new} tokens after a prompt of 20; 0: the same tokens; otherwise how far apart the \
best two logits lie at the first
  difference.
- *round trip*: exported again, every tensor and config.json are the same, bit for bit (0) or \
not (inf).
- *reloaded*: logits of the exported folder in `transformers`, which misses no key and \
finds none too many.

| family | logits | padding | greedy | round trip | reloaded |
|---|---|---|---|---|---|
'''


def main():
  import transformers
  rows = []
  for case in parity.CASES:
    with tempfile.TemporaryDirectory() as scratch:
      found = parity.measure(case, scratch)
    rows.append(
        f'| {case} | ' + ' | '.join(f'{d:.0e}' if d else '0' for d in found.values()) + ' |')
    print(rows[-1], flush=True)
  head = HEAD.format(version=transformers.__version__, length=parity.LENGTH, new=parity.NEW)
  page = ROOT / 'docs' / 'interop.md'
  below = page.read_text().rpartition(' |\n')[2]          # the table, written by hand
  page.write_text(head + '\n'.join(rows) + '\n' + below)


if __name__ == '__main__':
  main()
