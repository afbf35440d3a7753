"""The delta-rule ops on one CPU core beside transformers' torch rules, and cost against length.

    python benchmarks/fg2_gdn.py --peer PYTHON      (an interpreter with torch and transformers)

Both sides get the same float32 inputs, q and k normalised beforehand, and give the same outputs and
gradients, which is checked in every round: gdn against Qwen3-Next's chunked rule, kda against
Kimi-Linear's. Without a peer: ours alone.
"""

import argparse
import collections
import json
import statistics
import subprocess
import sys

import common

KINDS = ('gdn', 'kda', 'fg2_gdn')
# (ours, what it is compared with, the aim for ours / theirs)
PAIRS = (
  ('ours gdn', 'torch gdn', 0.6),
  ('ours kda', 'torch kda', 0.1),
  ('ours fg2_gdn', 'ours kda', 1.15),
  ('ours fg2_gdn', 'torch gdn', 1.0),
)


def inputs(o, length):
  """q, k, v, g per channel, g per head, beta, gates: float32 [1, T, H, ..], always the same."""
  import numpy as np

  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((1, length, o.heads, o.size)) for _ in range(3))
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  g = -o.decay * rng.random((1, length, o.heads, o.size))
  beta = rng.random((1, length, o.heads))
  gates = rng.random((2, 1, length, o.heads, o.size)) ** 0.5
  return [x.astype(np.float32) for x in (q, k, v, g, g[..., 0], beta, *gates)]


def report(o, side, kind, length, forward, backward, value, gradients):
  """Both passes of one op as cases, with numbers by which the sides are compared."""
  seen = [float(value), *(float(x) for x in gradients)]
  for name, call in (('forward', forward), ('forward + backward', backward)):
    common.measure(f'{side} {kind} {name}', call, o.reps, length, length=length, seen=seen)


def ours(o):
  common.prepare()
  import jax
  import jax.numpy as jnp

  from kernels import fg2_gdn as op

  for length in o.lengths:
    q, k, v, g, g_head, beta, gate_k, gate_v = map(jnp.asarray, inputs(o, length))
    for kind, arrays in zip(
      KINDS, ((q, k, v, g_head, beta), (q, k, v, g, beta), (q, k, v, g, gate_k, gate_v))
    ):
      rule = getattr(op, kind)
      forward = jax.jit(lambda *x: rule(*x, chunk_size=o.chunk or None))
      backward = jax.jit(
        jax.value_and_grad(
          lambda *x: jnp.mean(rule(*x, chunk_size=o.chunk or None)[0] ** 2), range(len(arrays))
        )
      )
      value, gradients = backward(*arrays)
      report(
        o,
        'ours',
        kind,
        length,
        lambda: jax.block_until_ready(forward(*arrays)),
        lambda: jax.block_until_ready(backward(*arrays)),
        value,
        [jnp.linalg.norm(x) for x in gradients],
      )


def theirs(o):
  common.prepare()
  import torch
  from transformers.models.kimi_linear import modeling_kimi_linear
  from transformers.models.qwen3_next import modeling_qwen3_next

  torch.set_num_threads(1)
  for length in o.lengths:
    q, k, v, g, g_head, beta, *_ = map(torch.from_numpy, inputs(o, length))
    for kind, rule, decay in (
      ('gdn', modeling_qwen3_next.torch_chunk_gated_delta_rule, g_head),
      ('kda', modeling_kimi_linear.chunk_kimi_delta_attention, g),
    ):
      arrays = q, k, v, decay, beta

      def run(q, k, v, g, beta):
        return rule(
          q,
          k,
          v,
          g=g,
          beta=beta,
          initial_state=None,
          output_final_state=True,
          use_qk_l2norm_in_kernel=False,
        )

      def forward():
        with torch.no_grad():
          run(*arrays)

      def backward():
        given = [x.detach().requires_grad_(True) for x in arrays]
        loss = run(*given)[0].square().mean()
        loss.backward()
        return loss.detach(), [x.grad for x in given]

      value, gradients = backward()
      report(o, 'torch', kind, length, forward, backward, value, [x.norm() for x in gradients])


def compare(o, arguments):
  """Runs the sides in turn and prints times, ratios beside their aims, and growth with length."""
  commands = [[sys.executable, sys.argv[0], '--child', 'ours', *arguments]]
  if o.peer:
    commands.append([o.peer, sys.argv[0], '--child', 'theirs', *arguments])
  times, seen = collections.defaultdict(list), {}
  for _ in range(o.rounds):
    for command in commands:
      out = subprocess.run(command, capture_output=True, text=True, check=False)
      cases = [json.loads(line) for line in out.stdout.splitlines() if line.startswith('{"bench"')]
      if out.returncode or not cases:
        raise SystemExit(f'{" ".join(command)} failed:\n{out.stderr[-2000:]}')
      for case in cases:
        side, kind, what = case['bench'].split(' ', 2)
        times[f'{side} {kind}', case['length'], what].append(case['cpu_ms']['median'])
        other = seen.setdefault((kind, case['length']), case['seen'])
        if any(abs(x - y) > 1e-3 * abs(y) for x, y in zip(case['seen'], other)):
          raise SystemExit(
            f'{kind} of {case["length"]} tokens: the sides disagree: {case["seen"]} and {other}'
          )

  print(
    f'{o.rounds} rounds in turn, process CPU time on one core, B1, {o.heads} heads of {o.size}, '
    'float32, '
    f'log-decays from -{o.decay} to 0\n'
  )
  print('| case | tokens | pass | CPU ms, median (lowest to highest round) |\n|---|---|---|---|')
  for (name, length, what), values in times.items():
    print(
      f'| {name} | {length} | {what} '
      f'| {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) |'
    )
  print(
    '\n| ours | compared with | aim | tokens | forward | forward + backward |\n'
    '|---|---|---|---|---|---|'
  )
  for mine, other, aim in PAIRS:
    for length in o.lengths:
      ratios = [
        statistics.median(times[mine, length, what]) / statistics.median(times[other, length, what])
        for what in ('forward', 'forward + backward')
        if times.get((other, length, what))
      ]
      if ratios:
        print(
          f'| {mine} | {other} | {aim} | {length} | '
          + ' | '.join(f'{x:.3f}' for x in ratios)
          + ' |'
        )
  pairs = [(a, b) for a in o.lengths for b in o.lengths if b == 4 * a]
  if pairs:
    print('\n| ours | tokens | forward, times as long | forward + backward |\n|---|---|---|---|')
  for kind in KINDS:
    for short, long in pairs:
      ratios = [
        statistics.median(times[f'ours {kind}', long, what])
        / statistics.median(times[f'ours {kind}', short, what])
        for what in ('forward', 'forward + backward')
      ]
      print(f'| {kind} | {short} to {long} | ' + ' | '.join(f'{x:.2f}' for x in ratios) + ' |')


def main():
  p = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  p.add_argument('--peer', default='', help='interpreter with torch and transformers')
  p.add_argument('--lengths', type=int, nargs='+', default=[256, 512, 1024, 4096], help='tokens')
  p.add_argument('--heads', type=int, default=8)
  p.add_argument('--size', type=int, default=32, help='key and value channels of a head')
  p.add_argument('--decay', type=float, default=0.1, help='strongest log-decay of a token, nats')
  p.add_argument('--chunk', type=int, default=0, help='chunk_size of ours; 0: the default')
  p.add_argument('--rounds', type=int, default=5, help='times each side is run, in turn')
  p.add_argument(
    '--reps', type=int, default=7, help='timed calls of a round, after two that are not'
  )
  p.add_argument(
    '--child',
    choices=('ours', 'theirs'),
    help='run one side once and print cases; what the rounds call',
  )
  o = p.parse_args()
  {'ours': ours, 'theirs': theirs}[o.child](o) if o.child else compare(o, sys.argv[1:])


if __name__ == '__main__':
  main()
