"""An expert layer of Qwen3-30B-A3B's shape, compiled for machines that are not here.

    python benchmarks/moe_aot.py v5e:2x4 v5p:4x4x4 h200
    python benchmarks/moe_aot.py v5e:2x4 --buffer 1.25

Needs the extra `aot`. 128 experts of 768, 8 a token, width 2048, rows of 4,096 tokens, bfloat16;
forward and backward pass. Nothing runs: FLOPs are the compiler's count, per device, over those of
the experts that tokens go to; where the experts lie on several devices a device's buffer holds the
worst case, as many times the even load as there are such devices, or --buffer times (rows beyond it
are dropped, see nn/config.py), and the count has them all, though the kernels skip what is empty.
On GPU the products are in a loop, whose body the compiler counts once; there the count is of tiles,
full or not, over full ones.
"""

import argparse
import collections
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EXPERTS, TOP_K, WIDTH, INNER, LENGTH = 128, 8, 2048, 768, 4096
COLLECTIVE = (r'\b(all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all'
              r'|collective-permute)(?:-start)?\(')


def compiled(target, rows_per_device, buffer):
  """(compiled gradient of the layer, devices, devices of the expert axis, tokens of a device)."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

  from launch import aot
  from moe import layer
  from nn import param
  from nn.config import ModelConfig, MoE

  devices = aot.devices(target)
  axes = ('data', 'expert')
  mesh = Mesh(
      np.array(devices).reshape(-1, min(8, len(devices))), axes, axis_types=(AxisType.Auto,) * 2)
  cfg = ModelConfig(
      vocab_size=8, embed_dim=WIDTH, num_heads=2, num_kv_heads=2, head_dim=4, ffw_dim=INNER,
      ffn='moe', dtype='bfloat16',
      moe=MoE(experts=EXPERTS, top_k=TOP_K, ffw_dim=INNER, balance_loss=1e-3, buffer=buffer))
  specs = layer.specs(cfg)

  def loss(params, x, segments):
    y, extras = layer.apply(params, cfg, x, segments)
    return jnp.sum(jnp.square(y.astype(jnp.float32))) + sum(extras['aux_loss'].values())

  with jax.set_mesh(mesh):
    params = param.abstract(specs, param.shardings(specs, mesh, dict(cfg.rules)))
    rows = NamedSharding(mesh, PartitionSpec(axes))
    shape = (rows_per_device * len(devices), LENGTH)
    x = jax.ShapeDtypeStruct((*shape, WIDTH), jnp.bfloat16, sharding=rows)
    segments = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    done = jax.jit(jax.grad(loss, (0, 1))).lower(params, x, segments).compile()
  return done, len(devices), mesh.shape['expert'], rows_per_device * LENGTH, layer.flops(cfg, 0)


def main():
  p = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('targets', nargs='+', help='a TPU slice as v5e:2x4, or h200 for one of these')
  p.add_argument('--rows', type=int, default=1, help='of a device')
  p.add_argument('--buffer', type=float, default=0.0, help='model.moe.buffer; 0: the worst case')
  o = p.parse_args()
  os.environ['JAX_PLATFORMS'] = 'cpu'
  print('| machine | devices | tokens a device | FLOPs / ideal | buffer factor | quotient '
        '| peak GiB | collectives |\n' + '|---' * 8 + '|')
  for target in o.targets:
    done, devices, ways, tokens, flops = compiled(target, o.rows, o.buffer)
    text = done.as_text()
    if target == 'h200':
      from kernels.grouped_matmul import tiles
      rows = tokens * TOP_K
      share = tiles.most_tiles(rows, EXPERTS) * tiles.ROWS / rows
    else:
      share = done.cost_analysis()['flops'] / (3 * flops * tokens)
    factor = o.buffer or ways
    found = collections.Counter(re.findall(COLLECTIVE, text))
    print(f'| {target} | {devices} | {tokens:,} | {share:.2f} | {factor:g} | {share / factor:.2f} '
          f'| {done.memory_analysis().peak_memory_in_bytes / 2**30:.2f} '
          f'| {", ".join(f"{n} {name}" for name, n in sorted(found.items())) or "none"} |',
          flush=True)


if __name__ == '__main__':
  main()
