"""Time and memory of turning a Hugging Face folder of random numbers into a checkpoint and back.

    python benchmarks/convert.py [--gigabytes 1] [--dtype F32]

Memory is the highest resident set during the conversion less that before the folder is opened, as a
share of the tensors' bytes.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from launch import conversion, hf_files  # noqa: E402
from nn import hf  # noqa: E402

CONFIG = {
    'model_type': 'llama', 'vocab_size': 32000, 'hidden_size': 1024, 'intermediate_size': 2816,
    'num_attention_heads': 16, 'num_key_value_heads': 4, 'head_dim': 64, 'hidden_act': 'silu',
    'rms_norm_eps': 1e-6, 'max_position_embeddings': 2048, 'rope_theta': 500000.0,
    'tie_word_embeddings': False}
LAYER_SCALARS = 2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 2816 + 2 * 1024
END_SCALARS = 2 * 32000 * 1024 + 1024


def resident() -> int:
  """Bytes of this process that are in memory."""
  lines = Path('/proc/self/status').read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith('VmRSS')) * 1024


def measured(work) -> tuple[float, int]:
  """Seconds that work() takes, and how much memory it needs at most beside what is held before."""
  before, highest, done = resident(), [0], threading.Event()

  def watch():
    while not done.wait(0.005):
      highest[0] = max(highest[0], resident())

  watcher = threading.Thread(target=watch)
  watcher.start()
  begin = time.perf_counter()
  try:
    work()
  finally:
    done.set()
    watcher.join()
  return time.perf_counter() - begin, highest[0] - before


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--gigabytes', type=float, default=1.0)
  parser.add_argument('--dtype', default='F32', choices=hf_files.DTYPES)
  options = parser.parse_args()
  width = hf_files.DTYPES[options.dtype].itemsize
  layers = round((options.gigabytes * 1e9 / width - END_SCALARS) / LAYER_SCALARS)
  cfg = hf.model_config(CONFIG | {'num_hidden_layers': max(1, layers)})
  rng = np.random.default_rng(0)

  with tempfile.TemporaryDirectory() as scratch:
    first, checkpoint, again = (Path(scratch) / name for name in ('hf', 'checkpoint', 'again'))
    shapes = {}
    for piece in hf.pieces(hf.FAMILIES['llama'], cfg):
      count = len(piece.lead) and cfg.repeats
      shapes[piece.path] = ((count,) if count else ()) + piece.layout.ours
    hf_files.save(first, cfg, lambda path: rng.standard_normal(shapes[path], np.float32),
                  kind=options.dtype, shard_bytes=300_000_000)
    size = sum(f.stat().st_size for f in first.glob('*.safetensors'))
    jax.block_until_ready(jax.jit(lambda x: x + 1)(0))
    for name, work in {
        'import': lambda: conversion.to_checkpoint(str(first), str(checkpoint)),
        'export': lambda: conversion.to_public(str(checkpoint), str(again))}.items():
      seconds, memory = measured(work)
      print(json.dumps({
          'what': name, 'bytes': size, 'dtype': options.dtype, 'seconds': round(seconds, 2),
          'peak_bytes': memory, 'peak_share': round(memory / size, 3)}))
    tensors = [{n: hf_files.mapped(t) for n, t in hf_files.tensors(f).items()} for f in (first, again)]
    same = tensors[0].keys() == tensors[1].keys() and all((tensors[0][n] == tensors[1][n]).all() for n in tensors[0])
    print(json.dumps({'round_trip_identical': bool(same)}))


if __name__ == '__main__':
  main()
