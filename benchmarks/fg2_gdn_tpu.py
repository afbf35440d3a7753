"""Static schedules of the TPU kernels of kernels/fg2_gdn, by the TPU compiler, which needs no TPU.

    python benchmarks/fg2_gdn_tpu.py --chips v5e v5p v6e --chunks 32 64 128 --heads 1 2 4

Needs the extra `aot`. Bundles are the length of the final code of one grid step: instructions
issued if nothing waits, so fewer per token is better, but they are not cycles measured. MXU is the
share of the matrix units' slots in use. A kernel whose blocks do not fit into VMEM is refused by
the compiler, and listed so.
"""

import argparse
import glob
import itertools
import json
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TOPOLOGIES = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}
KERNEL = r'(forward|backward)_kernel'
COLUMNS = ('bundles', 'bundles_per_token', 'spills', 'mxu')


def prepare(folder):
  """Before jax is imported: have libtpu write its schedules into a folder."""
  os.environ.update(
    JAX_PLATFORMS='cpu',
    TPU_SKIP_MDS_QUERY='1',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    TPU_WORKER_ID='0',
    TPU_ACCELERATOR_TYPE='v5litepod-8',
    TPU_WORKER_HOSTNAMES='localhost',
    LIBTPU_INIT_ARGS=f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true',
  )


def compile_for(chip, o, chunk, heads):
  """Compiles forward and backward pass; what fails raises."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies

  from kernels.fg2_gdn import pallas_tpu

  device = topologies.get_topology_desc(TOPOLOGIES[chip], platform='tpu').devices[0]
  at = jax.sharding.SingleDeviceSharding(device)
  array = lambda *shape, dtype=o.dtype: jax.ShapeDtypeStruct(
    (1, *shape), jnp.dtype(dtype), sharding=at
  )
  key, value = array(o.length, o.key_heads, o.size), array(o.length, o.value_heads, o.size)
  wide = array(o.length, o.value_heads, o.size)
  state = array(o.value_heads, o.size, o.size, dtype='float32')

  def loss(*arrays):
    o, state = pallas_tpu.scan(
      *arrays, None, None, symmetric=True, scale=0.1, chunk=chunk, heads=heads
    )
    return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)

  gradient = jax.value_and_grad(
    loss, range(7)
  )  # without the value, XLA drops the forward kernel proper
  jax.jit(gradient).lower(
    key, key, value, array(*wide.shape[1:], dtype='float32'), wide, value, state
  ).compile()


def schedules(folder, tokens, heads):
  """{kernel: {bundles, bundles_per_token, spills, mxu}} of what was just compiled."""
  found = {}
  for path in glob.glob(f'{folder}/*final_hlo-static-per-bundle-utilization.txt'):
    name = re.search(KERNEL, path)
    if name:
      lines = Path(path).read_text().splitlines()
      columns, slots = [x.strip() for x in lines[1].split(',')], lines[2].split()
      use = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
      total = dict(zip(columns, map(sum, zip(*use))))
      spills = sum(n for column, n in total.items() if 'STORE:SPILL' in column.upper())
      found.setdefault(name[1], []).append(
        dict(
          bundles=len(use),
          bundles_per_token=len(use) / tokens / heads,
          spills=spills,
          mxu=use and total[columns[0]] / len(use) / int(slots[0]),
        )
      )
  return {name: max(cases, key=lambda case: case['bundles']) for name, cases in found.items()}


def main():
  p = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  p.add_argument('--chips', nargs='+', default=list(TOPOLOGIES), choices=TOPOLOGIES)
  p.add_argument('--chunks', nargs='+', type=int, default=[64], help='tokens of a chunk')
  p.add_argument('--heads', nargs='+', type=int, default=[1], help='value heads of a grid step')
  p.add_argument('--length', type=int, default=8192, help='tokens')
  p.add_argument('--key-heads', type=int, default=16)
  p.add_argument('--value-heads', type=int, default=16)
  p.add_argument('--size', type=int, default=128, help='key and value channels of a head')
  p.add_argument('--dtype', default='bfloat16', choices=('bfloat16', 'float32'))
  p.add_argument('--json', action='store_true', help='a JSON line per kernel instead of a table')
  o = p.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    prepare(folder)
    if not o.json:
      print(
        '| chip | chunk | heads | pass | bundles | per token and head | spilling stores | MXU |\n'
        + '|---' * 8
        + '|'
      )
    for chip, chunk, heads in itertools.product(o.chips, o.chunks, o.heads):
      for path in glob.glob(f'{folder}/*'):
        os.remove(path)
      try:
        compile_for(chip, o, chunk, heads)
        found = schedules(folder, chunk, heads)
      except Exception as error:  # the compiler's refusal is a result, whatever its type
        if 'vmem' not in str(error).lower():
          raise
        found = {'both': None}
      for name, case in sorted(found.items(), reverse=True):
        if o.json:
          print(
            json.dumps(dict(chip=chip, chunk=chunk, heads=heads, kernel=name, **(case or {}))),
            flush=True,
          )
        elif case:
          print(
            f'| {chip} | {chunk} | {heads} | {name} | {case["bundles"]} '
            f'| {case["bundles_per_token"]:.1f} | {case["spills"]} | {case["mxu"]:.2f} |',
            flush=True,
          )
        else:
          print(f'| {chip} | {chunk} | {heads} | both | does not fit into VMEM | | | |', flush=True)


if __name__ == '__main__':
  main()
