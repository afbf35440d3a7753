"""Our models beside those of transformers: writes the last section of docs/interop.md.

    python experiments/interop.py

Needs the extra 'parity'. Six minutes on a core. For every case of tests/nn/hf_parity.py, a small
random model whose every number was replaced is imported, compared, exported and loaded again.
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests' / 'nn')]
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = 'true'      # most of the time is compiling

import hf_parity as parity  # noqa: E402

DOC = ROOT / 'docs' / 'interop.md'
TITLE = '## Beside transformers\n'
HEAD = '''
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

What linear attention has in difference is rounding on both sides, which its layers magnify: of a
Qwen3.5 of five layers, whose logits reach 5, ours were 1.4e-4 and those of `transformers` \
1.6e-4 from the same model in float64.

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
  before, _, _ = DOC.read_text().partition(TITLE)
  DOC.write_text(before + TITLE + head + '\n'.join(rows) + '\n')


if __name__ == '__main__':
  main()
