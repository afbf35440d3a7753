"""Train step and decode loop of every shipped config, compiled for TPU v5e and H200.

They are not here: the compilers come as packages (the extra `aot`); nothing can be executed.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import attention
from launch import aot, rl_phase, text_phase
from launch import config as config_lib
from launch import mesh as mesh_lib
from nn import model, param
from rl import methods
from tests.machines import devices

CONFIGS = sorted(
    p for p in Path('configs').glob('*.py') if p.name not in ('__init__.py', 'base.py'))


def read(path):
  """A config and its model, of unrolled layers one period: the others are the same again."""
  config = runpy.run_path(str(path))['get_config']()
  if config.model.unroll:
    config.model.repeats = 1
  return config, config_lib.model_config(config.model, 259)


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
    compiled = aot.train_step(cfg, mesh, c, terms, rows, length)
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
  mesh = mesh_lib.make_mesh({'data': -1}, devices(target))
  assert 'while' in aot.sampling(cfg, mesh, config.rl).as_text()


# Of Qwen3-1.7B.
PUBLIC = {
    'architectures': ['Qwen3ForCausalLM'], 'model_type': 'qwen3', 'vocab_size': 151936,
    'hidden_size': 2048, 'intermediate_size': 6144, 'num_hidden_layers': 28,
    'num_attention_heads': 16, 'num_key_value_heads': 8, 'head_dim': 128, 'hidden_act': 'silu',
    'max_position_embeddings': 40960, 'rms_norm_eps': 1e-6, 'rope_theta': 1e6,
    'tie_word_embeddings': True, 'attention_bias': False, 'use_sliding_window': False}


@pytest.mark.extras
def test_the_recipe_for_a_public_model_fits_its_slice(tmp_path, capsys):
  devices('v5e')
  (tmp_path / 'config.json').write_text(json.dumps(PUBLIC))
  header = json.dumps({'x': {'dtype': 'BF16', 'shape': [1], 'data_offsets': [0, 2]}}).encode()
  (tmp_path / 'model.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + b'12')
  assert aot.main([
      '--machine', 'v5e:2x4', '--config', 'configs/rl_gsm8k_qwen3.py',
      f'--config.model_from={tmp_path}']) == 0
  rows = [line.split('|') for line in capsys.readouterr().out.splitlines()[2:]]
  peaks = {row[1].strip(): float(row[4]) for row in rows}
  assert set(peaks) == {'sampling', 'scoring', 'rl, train step'}
  assert max(peaks.values()) < 15.5, 'GiB of a v5e chip'


@pytest.mark.extras
def test_the_command_needs_no_device_of_the_machine():
  """In a process of its own, whose jax has not been told yet to use the CPU."""
  devices('h200')
  environment = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_'))}
  done = subprocess.run(
      [sys.executable, 'launch/aot.py', '--machine', 'h200', '--config', 'configs/tiny.py',
       '--config.phases=sft'], env=environment, capture_output=True, text=True, timeout=280)
  assert done.returncode == 0 and '| sft, train step |' in done.stdout, done.stderr[-2000:]
  assert 'Traceback' not in done.stderr


@pytest.mark.extras
def test_a_machine_that_is_none_is_refused():
  pytest.importorskip('libtpu', reason='needs the extra aot')
  with pytest.raises(ValueError, match="'v5e:7x7' is no machine to compile for"):
    aot.devices('v5e:7x7')
