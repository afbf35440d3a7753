"""The GPU kernels of kernels/fg2_gdn: what the compiler says of them, and what a GPU does.

    python benchmarks/fg2_gdn_gpu.py compile
    python benchmarks/fg2_gdn_gpu.py measure --fla PYTHON --implementation pallas_gpu

compile needs no GPU, but the extras aot and test: for an H200, registers and bytes of spilling
stores per thread, and bytes of shared memory per block, of every kernel of a forward and backward
pass.

measure needs a GPU. It times fg2_gdn, kda and gdn in bfloat16, forward, and forward and backward,
in rounds in turn with flash-linear-attention's Triton kernels if --fla names an interpreter that
has it. Both get the same inputs, q and k normalised beforehand, and give the same outputs and
gradients, which is checked in every round. The shares are of a chip's memory bandwidth if every
input and output passed once, and of its dense bfloat16 speed for the products of the chunk form in
chunks of 64 (a backward pass counted as two forward passes), whatever the kernels do beside these.
"""

import argparse
import collections
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OPS = ('fg2_gdn', 'kda', 'gdn')
PASSES = ('forward', 'forward + backward')
KERNELS = ('chunk_kernel', 'state_kernel', 'reverse_kernel', 'gradient_kernel')
# A chip's bytes and dense bfloat16 operations a second, by the name it gives itself.
CHIPS = {'H200': (4.8e12, 989e12), 'H100': (3.35e12, 989e12)}
CHUNK = 64


def main():
  p = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  p.add_argument('what', choices=('compile', 'measure'))
  p.add_argument('--heads', type=int, default=16)
  p.add_argument('--size', type=int, default=128, help='key and value channels of a head')
  p.add_argument('--lengths', type=int, nargs='+', default=[2048, 8192, 32768], help='of rows')
  p.add_argument('--tokens', type=int, default=32768, help='of all rows together')
  p.add_argument('--implementation', default='pallas_gpu', choices=('pallas_gpu', 'chunked'))
  p.add_argument('--fla', default='', help='interpreter with torch and flash-linear-attention')
  p.add_argument('--rounds', type=int, default=5, help='times each side is run, in turn')
  p.add_argument(
    '--reps', type=int, default=10, help='timed calls of a round, after two that are not'
  )
  p.add_argument('--json', action='store_true', help='a JSON line per kernel instead of a table')
  p.add_argument(
    '--child', choices=('compile', 'ours', 'theirs'), help='what the others run in processes'
  )
  o = p.parse_args()
  if o.child:
    {'compile': compile_child, 'ours': ours, 'theirs': theirs}[o.child](o)
  elif o.what == 'compile':
    compiled(o)
  else:
    measured(o)


def compiled(o):
  """Prints what the compiler says of every kernel, the worst of those of one name."""
  found = kernels(run(o, sys.executable, 'compile'))
  if not o.json:
    print(
      '| kernel | registers | spilling stores, bytes | shared memory, bytes |\n' + '|---' * 4 + '|'
    )
  for name in KERNELS:
    case = found[name]
    if o.json:
      print(json.dumps({'kernel': name} | case))
    else:
      print(f'| {name} | {case["registers"]} | {case["spills"]} | {case["shared_bytes"]} |')


def kernels(log):
  """{kernel: registers, spills and shared_bytes} in what the compiler printed."""
  found = collections.defaultdict(lambda: dict(registers=0, spills=0, shared_bytes=0))
  kernel = '(' + '|'.join(KERNELS) + ')_mosaic_gpu'
  properties = f'properties for {kernel}_kernel\n.* frame, '
  said = (
    ('registers', properties + r'.*\n.*Used (\d+) registers'),
    ('spills', properties + r'(\d+) bytes spill stores'),
    # The program that launches it: threads of a block, then what we look for.
    (
      'shared_bytes',
      rf'define .*@{kernel}\([^!]*?launch_kernel\([^)]*i32 128, i32 1, i32 1, i32 (\d+)',
    ),
  )
  for name, pattern in said:
    for of, number in re.findall(pattern, log):
      found[of][name] = max(found[of][name], int(number))
  if set(found) != set(KERNELS):
    raise SystemExit(f'the compiler spoke of {sorted(found)}, not of {KERNELS}:\n{log[-2000:]}')
  return found


def compile_child(o):
  """Compiles a forward and backward pass; jaxlib then prints what `kernels` reads."""
  os.environ |= {
    'JAX_PLATFORMS': 'cpu',
    'MOSAIC_GPU_DUMP_PTXAS': '1',
    'MOSAIC_GPU_DUMP_HOST_LLVM': '1',
  }
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

  from kernels import fg2_gdn as op
  from launch import aot

  mesh = Mesh(np.array(aot.devices('h200')), ('row',), axis_types=(AxisType.Auto,))

  def array(*shape, dtype=jnp.bfloat16):
    shape = (1, 1024, o.heads, *shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

  def loss(*arrays):
    y, state = op.fg2_gdn(*arrays, implementation='pallas_gpu')
    return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

  wide = array(o.size)
  arrays = wide, wide, wide, array(o.size, dtype=jnp.float32), wide, wide
  with jax.set_mesh(mesh):
    jax.jit(jax.value_and_grad(loss, range(6))).lower(*arrays).compile()


def run(o, python, child):
  """What a side prints, run in a process of its own."""
  command = [python, __file__, *sys.argv[1:], '--child', child]
  out = subprocess.run(command, capture_output=True, text=True, errors='replace', check=False)
  if out.returncode:
    raise SystemExit(out.stderr.strip().splitlines()[-1] if out.stderr else f'{command} failed')
  return out.stdout + out.stderr


def inputs(o, length):
  """{op: its arguments} float32 [B, T, H, ..], always the same."""
  import numpy as np

  rng = np.random.default_rng(0)
  shape = (o.tokens // length, length, o.heads, o.size)
  normal = lambda: rng.standard_normal(shape, np.float32)
  uniform = lambda: rng.random(shape, np.float32)
  q, k, v = normal(), normal(), normal()
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  g, gate_k, gate_v = -0.1 * uniform(), uniform() ** 0.5, uniform() ** 0.5
  beta = rng.random(shape[:3], np.float32)
  return {
    'fg2_gdn': (q, k, v, g, gate_k, gate_v),
    'kda': (q, k, v, g, beta),
    'gdn': (q, k, v, np.ascontiguousarray(g[..., 0]), beta),
  }


def report(o, kind, length, calls, wait, seen, **extra):
  """Prints a case per pass: the median milliseconds of a call, and numbers to compare sides by."""
  for name, call in zip(PASSES, calls):
    times = []
    for i in range(o.reps + 2):
      begin = time.perf_counter()
      wait(call())
      if i >= 2:
        times.append(1e3 * (time.perf_counter() - begin))
    case = dict(op=kind, length=length, what=name, ms=statistics.median(times), seen=seen, **extra)
    print(json.dumps(case), flush=True)


def ours(o):
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  import jax
  import jax.numpy as jnp

  from kernels import fg2_gdn as op

  if jax.default_backend() != 'gpu':
    raise SystemExit(f'measure needs a GPU, and jax has {jax.default_backend()} alone')
  for length in o.lengths:
    for kind, arrays in inputs(o, length).items():
      arrays = [
        jnp.asarray(x, jnp.float32 if i == 3 else jnp.bfloat16) for i, x in enumerate(arrays)
      ]
      rule = lambda *x, kind=kind: getattr(op, kind)(*x, implementation=o.implementation)[0]
      loss = lambda *x, rule=rule: jnp.mean(rule(*x).astype(jnp.float32) ** 2)
      forward = jax.jit(rule)
      backward = jax.jit(jax.value_and_grad(loss, range(len(arrays))))
      value, gradients = backward(*arrays)
      norms = [float(jnp.linalg.norm(x.astype(jnp.float32))) for x in gradients]
      calls = (lambda: forward(*arrays), lambda: backward(*arrays))
      chip = jax.devices()[0].device_kind
      report(o, kind, length, calls, jax.block_until_ready, [float(value), *norms], chip=chip)


def theirs(o):
  import torch
  from fla.ops.gated_delta_rule import chunk_gated_delta_rule
  from fla.ops.kda import chunk_kda

  for length in o.lengths:
    for kind, rule in (('kda', chunk_kda), ('gdn', chunk_gated_delta_rule)):
      arrays = [
        torch.from_numpy(x).to('cuda', torch.float32 if i == 3 else torch.bfloat16)
        for i, x in enumerate(inputs(o, length)[kind])
      ]

      def forward():
        with torch.no_grad():
          return rule(*arrays, output_final_state=True)[0]

      def backward():
        given = [x.detach().requires_grad_(True) for x in arrays]
        loss = rule(*given, output_final_state=True)[0].float().square().mean()
        loss.backward()
        return loss.detach(), [x.grad for x in given]

      value, gradients = backward()
      seen = [float(value), *(float(x.float().norm()) for x in gradients)]
      report(o, kind, length, (forward, backward), lambda _: torch.cuda.synchronize(), seen)


def ceilings(o, kind, what):
  """Bytes and operations that a call cannot do without, for all tokens."""
  per_head = o.tokens * o.heads
  decay, gates = {'fg2_gdn': (o.size, 2 * o.size), 'kda': (o.size, 1), 'gdn': (1, 1)}[kind]
  given = 3 * o.size * 2 + decay * 4 + gates * 2
  moved = given + 2 * o.size
  products = 2 * (3 * o.size**2 + 1.5 * CHUNK * o.size + CHUNK**2 / 2)
  if what == PASSES[0]:
    return moved * per_head, products * per_head
  return (2 * moved + given) * per_head, 3 * products * per_head


def measured(o):
  """Runs the sides in turn and prints times, ratios and shares of the ceilings."""
  if any(o.tokens % length for length in o.lengths):
    raise SystemExit(f'--tokens {o.tokens} is not a multiple of every length of {o.lengths}')
  sides = {'ours': sys.executable} | ({'theirs': o.fla} if o.fla else {})
  times, seen, chip = collections.defaultdict(list), {}, ''
  for _ in range(o.rounds):
    for side, python in sides.items():
      for line in run(o, python, side).splitlines():
        if not line.startswith('{"op"'):
          continue
        case = json.loads(line)
        chip = case.get('chip', chip)
        times[side, case['op'], case['length'], case['what']].append(case['ms'])
        other = seen.setdefault((case['op'], case['length']), case['seen'])
        if any(abs(x - y) > 0.03 * abs(y) for x, y in zip(case['seen'], other)):
          raise SystemExit(f'{case["op"]}: the sides disagree: {case["seen"]} and {other}')
  median = {at: statistics.median(values) for at, values in times.items()}
  limits = next((limits for name, limits in CHIPS.items() if name in chip), None)
  print(
    f'{chip}, {o.implementation}, {o.tokens} tokens, {o.heads} heads of {o.size}, '
    f'{o.rounds} rounds in turn\n\n'
    '| op | tokens of a row | pass | ours, ms | fla, ms | ours / fla | of bytes | of products |\n'
    + '|---' * 8
    + '|'
  )
  for (side, kind, length, what), ms in median.items():
    if side == 'ours':
      peer = median.get(('theirs', kind, length, what))
      theirs_ms = f'{peer:.3f} | {ms / peer:.2f}' if peer else '- | -'
      least = ceilings(o, kind, what)
      shares = [f'{1e3 * x / y / ms:.2f}' for x, y in zip(least, limits)] if limits else '--'
      print(f'| {kind} | {length} | {what} | {ms:.3f} | {theirs_ms} | {" | ".join(shares)} |')
  print('\n| tokens of a row | pass | fg2_gdn / kda, both ours |\n|---|---|---|')
  for length in o.lengths:
    for what in PASSES:
      ratio = median['ours', 'fg2_gdn', length, what] / median['ours', 'kda', length, what]
      print(f'| {length} | {what} | {ratio:.2f} |')


if __name__ == '__main__':
  main()
