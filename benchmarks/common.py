"""What the benchmarks share: sizes, timing, rounds in turn with a peer, a table.

Timing is by process CPU time on one pinned core. A case is one JSON line: {"bench": name,
"cpu_ms": {"median": …}, "ms": {"median": …}, "tokens": per call, …}. A peer is any command
that prints such lines; it runs in turn with ours, so that a busy minute of the machine hits both.
"""

import argparse
import collections
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCAB = 512
SIZES = {
    's': dict(embed_dim=256, repeats=4, num_heads=8, num_kv_heads=4, head_dim=32, ffw_dim=768),
    'm': dict(embed_dim=512, repeats=8, num_heads=8, num_kv_heads=4, head_dim=64, ffw_dim=1536),
}


def options(doc: str, **defaults) -> argparse.Namespace:
  """The options of a benchmark: those here, and one per default given."""
  p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--preset', default='s', choices=SIZES)
  p.add_argument('--rounds', type=int, default=5, help='times each side is run, in turn')
  p.add_argument(
      '--reps', type=int, default=7, help='timed calls of a round, after two that are not')
  p.add_argument(
      '--peer', default=[], action='append',
      help='command that prints cases; may be given several times')
  p.add_argument(
      '--child', action='store_true', help='run once and print cases; what the rounds call')
  for name, value in defaults.items():
    p.add_argument(f'--{name}', type=type(value), default=value)
  return p.parse_args()


def prepare() -> None:
  """One core, one thread, CPU. Before jax is imported."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = '--xla_cpu_multi_thread_eigen=false ' + os.environ.get('XLA_FLAGS', '')
  os.environ.pop('NPROC', None)      # several threads on one core cost up to 1.7 times
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def model_config(preset: str, **changes):
  """The peers' Qwen3 shape: grouped queries, q and k norm, SwiGLU, tied embedding, float32."""
  from nn.config import ModelConfig
  return ModelConfig(vocab_size=VOCAB, qk_norm=True, tied=True, rope_theta=1e6, max_length=4096,
                     unroll=True, **(SIZES[preset] | changes))


def measure(name: str, call: Callable, reps: int, tokens: int, **extra) -> None:
  """Prints a case: median wall and process CPU milliseconds of call().

  call must wait for its result.
  """
  laps = []
  for i in range(reps + 2):
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if i >= 2:
      laps.append((time.perf_counter() - wall, time.process_time() - cpu))
  wall, cpu = (1e3 * statistics.median(lap[i] for lap in laps) for i in (0, 1))
  print(json.dumps({
      'bench': name, 'ms': {'median': wall}, 'cpu_ms': {'median': cpu}, 'tokens': tokens, **extra,
  }), flush=True)


def rounds(o: argparse.Namespace, arguments: list[str]) -> None:
  """Runs this script as a child and the peers, in turn.

  Prints a Markdown table with the ratio of medians.
  """
  mine = [sys.executable, sys.argv[0], '--child', *arguments]
  found = collections.defaultdict(list)
  for _ in range(o.rounds):
    for command in (mine, *map(shlex.split, o.peer)):
      out = subprocess.run(command, capture_output=True, text=True, check=False)
      lines = [json.loads(line) for line in out.stdout.splitlines() if line.startswith('{"bench"')]
      if not lines:
        raise SystemExit(f'{shlex.join(command)} printed no case:\n{out.stderr[-2000:]}')
      for case in lines:
        extra = ' '.join(
            f'{k}={case[k]}' for k in ('batch', 'rows', 'length', 'experts', 'new', 'cache')
            if k in case)
        found[f'{case["bench"]} {extra}'.strip()].append(case['cpu_ms']['median'])
  print(f'preset {o.preset}, {o.rounds} rounds in turn, process CPU time on one core; '
        f'{platform.machine()}, {os.cpu_count()} cores\n')
  print('| case | CPU ms, median (lowest to highest round) |\n|---|---|')
  for name, values in found.items():
    print(f'| {name} | {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f}) |')
  names = list(found)
  pairs = [(a, b) for a in names if a.startswith('ours')
           for b in names if not b.startswith('ours') and comparable(a, b)]
  if pairs:
    print('\n| ours | peer | ratio of medians | median ratio of rounds |\n|---|---|---|---|')
  for a, b in pairs:
    by_round = statistics.median(x / y for x, y in zip(found[a], found[b]))
    print(f'| {a} | {b} | {statistics.median(found[a]) / statistics.median(found[b]):.2f} '
          f'| {by_round:.2f} |')


def comparable(a: str, b: str) -> bool:
  """Cases are compared where their common sizes agree; where ours samples, theirs does."""
  mine, theirs = (dict(part.split('=') for part in name.split()[1:]) for name in (a, b))
  same = [k for k in mine if k in theirs]
  return bool(same) and ('new' in mine) == ('new' in theirs) and all(
      mine[k] == theirs[k] for k in same)
