"""Train step and decode loop of every shipped config, compiled for TPU v5e and H200.

They are not here: the compilers come as packages (the extra `aot`); nothing can be executed.
"""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from machines import devices

from kernels import attention
from launch import config as config_lib
from launch import engine, optimizer, rl_phase, text_phase
from launch import mesh as mesh_lib
from launch import step as step_lib
from nn import model, param
from nn.types import Batch, Want
from rl import methods, sample
from rl.types import label

CONFIGS = sorted(
    p for p in Path('configs').glob('*.py') if p.name not in ('__init__.py', 'base.py'))

# Without the device XLA cannot try out tilings of its own Triton matmuls, and the one it assumes
# does not fit all shapes.
OPTIONS = {'h200': {'xla_gpu_enable_triton_gemm': False}, 'v5e': {}}


def read(path):
  config = runpy.run_path(str(path))['get_config']()
  return config, config_lib.model_config(config.model, 259)


def placed(tree, shardings):
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def abstract_batch(mesh, terms, rows, length):
  """A batch of one optimiser step without its numbers."""
  def leaf(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_lib.sharding_of(shape, mesh))
  scores = {label(n) for t in terms for n in t.needs if not isinstance(n, Want)}
  ints, floats, number = (
      (rows, length, jnp.int32), (rows, length, jnp.float32), leaf((), jnp.float32))
  plane = lambda spec: leaf(spec[:2], spec[2])
  return Batch(
      tokens=plane(ints), positions=plane(ints), segments=plane(ints),
      masks={'train': plane(floats)}, weights={t.name: plane(floats) for t in terms},
      coef={t.name: number for t in terms}, data={s: plane(floats) for s in sorted(scores)},
      temperature=number, use=leaf((), jnp.int32), advantage=plane(floats))


def compile_train_step(cfg, target, mesh, c, terms, rows, length):
  specs = model.specs(cfg)
  shardings = param.shardings(specs, mesh, dict(cfg.rules))
  tx, _ = optimizer.from_config(specs, c.optimizer, c.steps)
  opt = optimizer.state_shardings(tx, specs, shardings, mesh)
  params = param.abstract(specs, shardings)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = step_lib.TrainState(
      jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), params,
      placed(jax.eval_shape(tx.init, params), opt))
  train_step = step_lib.make_train_step(
      step_lib.make_loss(engine.make_forward(cfg), terms), tx, specs, c.microbatches)
  rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
  # Not above: what runs there would run on devices that are not here.
  with jax.set_mesh(mesh):
    return jax.jit(train_step, donate_argnums=0).lower(
        state, abstract_batch(mesh, terms, rows, length), rate).compile(OPTIONS[target])


@pytest.mark.extras
@pytest.mark.parametrize('target', ['v5e', 'h200'])
@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_train_steps_compile(path, target):
  config, cfg = read(path)
  mesh = mesh_lib.make_mesh({'data': -1}, devices(target))
  for name in config.phases:
    c = config[name]
    if name == 'rl':
      method = methods.build(c.methods, config_lib.method_options(c), max_tokens=c.max_tokens,
                             mtp_depth=cfg.mtp.depth)
      terms = rl_phase.watched(method).terms
      rows, length = c.prompts * c.group // c.parts, c.max_prompt + c.max_tokens
    else:
      method = text_phase.make_method(f'{name}.mtp', c.mtp, cfg.mtp.depth, 0)
      terms, rows, length = method.terms, c.rows, c.length
    compiled = compile_train_step(cfg, target, mesh, c, terms, rows, length)
    mixers, program = {mixer for mixer, _ in cfg.layers}, compiled.as_text()
    if 'attention' in mixers:
      chosen = attention.choose('tpu' if target == 'v5e' else 'gpu', length, cfg.head_dim)
      assert {'splash': 'splash', 'gpu': 'triton'}.get(chosen, '') in program
    if 'gdn' in mixers and target == 'v5e':
      assert 'forward_kernel' in program and 'backward_kernel' in program
    parameters = 4 * param.count(model.specs(cfg))
    assert compiled.memory_analysis().alias_size_in_bytes > parameters, (
        'parameters and moments are donated')


@pytest.mark.extras
@pytest.mark.parametrize('target', ['v5e', 'h200'])
@pytest.mark.parametrize(
    'path', [p for p in CONFIGS if 'rl' in read(p)[0].phases], ids=lambda p: p.stem)
def test_decode_loops_compile(path, target):
  config, cfg = read(path)
  c = config.rl
  mesh = mesh_lib.make_mesh({'data': -1}, devices(target))
  specs = model.specs(cfg)
  params = param.abstract(specs, param.shardings(specs, mesh, dict(cfg.rules)))
  rows = mesh_lib.batch_sharding(mesh)
  decoder = engine.make_decoder(cfg)

  def draw(params, tokens, start, keys):
    return sample.sample(
        decoder, model.prepare(params, cfg), tokens, start, jax.random.wrap_key_data(keys),
        group=c.group,
        sampling=sample.Sampling(max_tokens=c.max_tokens, temperature=c.temperature, eos=(1,)))

  leaf = lambda dtype, *shape: jax.ShapeDtypeStruct((c.prompts, *shape), dtype, sharding=rows)
  with jax.set_mesh(mesh):
    compiled = jax.jit(draw).lower(
        params, leaf(jnp.int32, c.max_prompt), leaf(jnp.int32),
        leaf(jnp.uint32, 2)).compile(OPTIONS[target])
  assert 'while' in compiled.as_text()
