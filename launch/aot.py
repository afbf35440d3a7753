"""Compiles a run for a machine that is not here, and says what its programs need of a device:

    python launch/aot.py --machine v5e:2x4 --config configs/rl_gsm8k_qwen3.py \
        --config.model_from=Qwen3-1.7B

--machine is a TPU slice, as v5e:2x4, v5p:2x2x1 or v6e:2x4, or h200 for one of these. The config's
mesh is of its devices. The compilers come as packages, the extra `aot`; nothing is executed, no
parameters are read, and a program that does not fit ends with the compiler's own message. While a
model samples and scores, the optimiser's moments stay on the device: the last column counts them.
"""

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import cli  # noqa: E402

for name, value in {
    'TPU_SKIP_MDS_QUERY': '1',           # never ask a metadata server
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',   # else a second process fails on a lock
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8', 'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0'}.items():       # only silences warnings
  os.environ.setdefault(name, value)

H200 = """gpu_device_info {
 threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 \
shared_memory_per_core: 233472
 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 \
block_dim_limit_y: 65535
 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 \
clock_rate_ghz: 1.98
 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448 \
cuda_compute_capability { major: 9 }
 registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def main(arguments: list[str]) -> int:
  os.environ['JAX_PLATFORMS'] = 'cpu'  # before jax is imported; else a plugin wants its devices
  from launch import config as config_lib
  rest, overrides = config_lib.split(arguments)
  parser = cli.parser(__doc__)
  parser.add_argument('--config', required=True, help='Python file with get_config(), see configs/')
  parser.add_argument('--machine', required=True, help='a TPU slice as v5e:2x4, or h200')
  options = parser.parse_args(rest)

  from data import tokenizer as tokenizer_lib
  from launch import mesh as mesh_lib
  from launch import models, rl_phase, text_phase
  from rl import methods

  config = config_lib.load(options.config, overrides)
  models.adopt(config, config.model_from, [key for key, _ in overrides])
  vocab_size = config.model.vocab_size or tokenizer_lib.load(config.tokenizer).vocab_size
  cfg = config_lib.model_config(config.model, vocab_size)
  mesh = mesh_lib.make_mesh(config.mesh.to_dict(), devices(options.machine))
  print('| program | arguments, GiB a device | peak, GiB a device | peak with all that is held |\n'
        '|---|---|---|---|')
  for name in config.phases:
    c = config[name]
    if name == 'rl':
      method = methods.build(c.methods, config_lib.method_options(c), max_tokens=c.max_tokens,
                             mtp_depth=cfg.mtp.depth)
      terms = rl_phase.watched(method, c.watch).terms
      rows, length = c.prompts * c.group // c.parts, c.max_prompt + c.max_tokens
    else:
      method = text_phase.make_method(f'{name}.mtp', c.mtp, cfg.mtp.depth, 0)
      terms, rows, length = method.terms, c.rows, c.length
    held = tell(f'{name}, train step', train_step(cfg, mesh, c, terms, rows, length))
    if name == 'rl':
      tell('scoring', scoring(cfg, mesh, rows // c.microbatches, length), held)
      tell('sampling', sampling(cfg, mesh, c), held)
  return 0


def tell(program: str, compiled: Any, held: int = 0) -> int:
  """Prints a line of the table; returns the bytes of the program's arguments on a device.

  Args:
    held: bytes of the train step's arguments, which are there all the time.
  """
  memory = compiled.memory_analysis()
  given, peak = memory.argument_size_in_bytes, memory.peak_memory_in_bytes
  gib = [f'{x / 2**30:.2f}' for x in (given, peak, peak + max(0, held - given))]
  print(f'| {program} | {" | ".join(gib)} |', flush=True)
  return given


@functools.cache
def devices(machine: str) -> list:
  """The devices of a machine to compile for.

  Raises:
    ValueError: the compiler is not installed, or knows no such machine.
  """
  from jax.experimental import topologies
  try:
    if machine == 'h200':
      importlib.import_module('jax_plugins.xla_cuda12')
      return topologies.get_topology_desc(
          platform='cuda', topology='1x1x1', target_config=H200).devices
    importlib.import_module('libtpu')
    return topologies.get_topology_desc(machine, platform='tpu').devices
  except ImportError as error:
    raise ValueError(f"compiling for {machine} needs the extra 'aot': {error}") from error
  except Exception as error:           # of the compiler, whatever its type
    raise ValueError(f'{machine!r} is no machine to compile for; try v5e:2x4, v5p:2x2x1, v6e:2x4 '
                     f'or h200: {str(error).splitlines()[0]}') from error


def compiler_options(mesh: Any) -> dict[str, Any]:
  """Without the device XLA cannot try out tilings of its own Triton matmuls, and the one it assumes
  does not fit all shapes.
  """
  return {} if mesh.devices.flat[0].platform == 'tpu' else {'xla_gpu_enable_triton_gemm': False}


def train_step(cfg: Any, mesh: Any, c: Any, terms: tuple, rows: int, length: int) -> Any:
  """The compiled train step of a phase.

  Args:
    c: the phase's block of a config.
    rows, length: of an optimiser step.
  """
  import jax
  import jax.numpy as jnp

  from launch import engine, optimizer
  from launch import step as step_lib
  from nn import model, param

  specs = model.specs(cfg)
  shardings = param.shardings(specs, mesh, dict(cfg.rules))
  tx, _ = optimizer.from_config(specs, c.optimizer, c.steps)
  places = optimizer.state_shardings(tx, specs, shardings, mesh)
  params = param.abstract(specs, shardings)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  opt_state = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      jax.eval_shape(tx.init, param.split(params, specs)[0]), places)
  state = step_lib.TrainState(
      jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), params, opt_state)
  step = step_lib.make_train_step(
      step_lib.make_loss(engine.make_forward(cfg), terms), tx, specs, c.microbatches)
  rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
  # Not above: what runs there would run on devices that are not here.
  with jax.set_mesh(mesh):
    return jax.jit(step, donate_argnums=0).lower(
        state, abstract_batch(mesh, terms, rows, length), rate).compile(compiler_options(mesh))


def abstract_batch(mesh: Any, terms: tuple, rows: int, length: int) -> Any:
  """A batch of one optimiser step without its numbers."""
  import jax
  import jax.numpy as jnp

  from launch import mesh as mesh_lib
  from nn.types import Batch, Want
  from rl.types import label

  def leaf(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_lib.sharding_of(shape, mesh))

  ints, floats = (lambda: leaf(jnp.int32, rows, length)), (lambda: leaf(jnp.float32, rows, length))
  scores = {label(n) for t in terms for n in t.needs if not isinstance(n, Want)}
  return Batch(
      tokens=ints(), positions=ints(), segments=ints(), masks={'train': floats()},
      weights={t.name: floats() for t in terms}, coef={t.name: leaf(jnp.float32) for t in terms},
      data={s: floats() for s in sorted(scores)}, temperature=leaf(jnp.float32),
      use=leaf(jnp.int32), advantage=floats())


def scoring(cfg: Any, mesh: Any, rows: int, length: int) -> Any:
  """The compiled pass without gradient that a method may ask for. rows, length: of one pass."""
  import jax

  from launch import engine
  from nn import model, param
  from nn.types import LOGP

  specs, forward = model.specs(cfg), engine.make_forward(cfg)
  params = param.abstract(specs, param.shardings(specs, mesh, dict(cfg.rules)))
  with jax.set_mesh(mesh):
    return jax.jit(lambda params, batch: forward(params, batch, (LOGP,))[0]).lower(
        params, abstract_batch(mesh, (), rows, length)).compile(compiler_options(mesh))


def sampling(cfg: Any, mesh: Any, c: Any) -> Any:
  """The compiled sampling program of an RL phase. c: its block of a config."""
  import jax
  import jax.numpy as jnp

  from launch import engine
  from launch import mesh as mesh_lib
  from nn import model, param
  from rl import sample

  specs = model.specs(cfg)
  params = param.abstract(specs, param.shardings(specs, mesh, dict(cfg.rules)))
  decoder, rows = engine.make_decoder(cfg), mesh_lib.batch_sharding(mesh)

  def draw(params, tokens, start, keys):
    return sample.sample(
        decoder, model.prepare(params, cfg), tokens, start, jax.random.wrap_key_data(keys),
        group=c.group,
        sampling=sample.Sampling(max_tokens=c.max_tokens, temperature=c.temperature, eos=(1,)))

  leaf = lambda dtype, *shape: jax.ShapeDtypeStruct((c.prompts, *shape), dtype, sharding=rows)
  with jax.set_mesh(mesh):
    return jax.jit(draw).lower(
        params, leaf(jnp.int32, c.max_prompt), leaf(jnp.int32),
        leaf(jnp.uint32, 2)).compile(compiler_options(mesh))


if __name__ == '__main__':
  cli.run(main)
