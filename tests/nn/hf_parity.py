"""Public models and ours, side by side: what both say of the same tokens.

The public ones are random small configurations of transformers, every number in them replaced. A
case is the name of a configuration class and its changes; a new family adds cases to CASES.
"""

import contextlib
import functools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from launch import hf_files
from nn import hf, model, param

VOCAB, LENGTH, NEW = 61, 320, 64
TOLERANCE = 2e-4                       # of logits in float32

SMALL = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=2048)
LLAMA3 = dict(rope_type='llama3', rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = dict(rope_type='yarn', rope_theta=1e4, factor=4.0, original_max_position_embeddings=96)
GEMMA_ROPE = {'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
              'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6}}

LATENT = dict(num_key_value_heads=3, kv_lora_rank=9, qk_rope_head_dim=6, qk_nope_head_dim=8,
              v_head_dim=6)
EXPERTS = dict(moe_intermediate_size=12, num_experts_per_tok=2)
# A small epsilon would let the norm of a linear layer's output magnify both sides' roundings.
LINEAR = dict(linear_key_head_dim=8, linear_value_head_dim=12, linear_num_key_heads=2,
              linear_num_value_heads=4, rms_norm_eps=1e-3)
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)

CASES = {
    'llama': ('Llama', dict(rope_parameters=LLAMA3)),
    'llama tied, biases, odd head size': ('Llama', dict(
        tie_word_embeddings=True, attention_bias=True, head_dim=14, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=3)),
    'qwen2': ('Qwen2', dict(num_key_value_heads=3)),
    'qwen2 tied, window in the last layer': ('Qwen2', dict(
        tie_word_embeddings=True, num_hidden_layers=3, use_sliding_window=True, sliding_window=40,
        max_window_layers=2)),
    'qwen3': ('Qwen3', dict(head_dim=16, rope_parameters=YARN)),
    'qwen3 tied, alternating windows and a remainder': ('Qwen3', dict(
        tie_word_embeddings=True, head_dim=6, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=33, layer_types=[
            'sliding_attention', 'full_attention'] * 2 + ['sliding_attention'])),
    'qwen3_moe': ('Qwen3Moe', dict(
        head_dim=8, moe_intermediate_size=20, num_experts=5, num_experts_per_tok=3)),
    'qwen3_moe tied, dense first layer, renormalised': ('Qwen3Moe', dict(
        tie_word_embeddings=True, head_dim=10, moe_intermediate_size=12, num_experts=4,
        num_experts_per_tok=2, norm_topk_prob=True, mlp_only_layers=[0], num_hidden_layers=3)),
    'mixtral': ('Mixtral', dict(head_dim=8, num_local_experts=4)),
    'mixtral tied, window': ('Mixtral', dict(
        tie_word_embeddings=True, head_dim=6, num_local_experts=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=50, num_experts_per_tok=1)),
    'gemma3': ('Gemma3Text', dict(
        head_dim=12, sliding_window=16, rope_parameters=GEMMA_ROPE, num_hidden_layers=4,
        layer_types=[
            'sliding_attention', 'sliding_attention', 'full_attention', 'sliding_attention'])),
    'gemma3 untied, biases, scale of its own': ('Gemma3Text', dict(
        tie_word_embeddings=False, head_dim=8, attention_bias=True, query_pre_attn_scalar=20,
        sliding_window=70, num_key_value_heads=3, layer_types=[
            'full_attention', 'sliding_attention'])),
    'deepseek_v3': ('DeepseekV3', LATENT | EXPERTS | dict(
        num_hidden_layers=3, q_lora_rank=10, n_routed_experts=8, n_group=4, topk_group=2,
        first_k_dense_replace=1, rope_parameters=YARN | dict(
            mscale=0.7, mscale_all_dim=1.2, beta_fast=16.0))),
    'deepseek_v3 tied, plain queries, wide values': ('DeepseekV3', LATENT | EXPERTS | dict(
        q_lora_rank=None, n_routed_experts=4, n_group=1, topk_group=1, norm_topk_prob=False,
        n_shared_experts=2, qk_nope_head_dim=5, v_head_dim=13, first_k_dense_replace=0,
        rope_interleave=False, tie_word_embeddings=True, rms_norm_eps=1e-4)),
    'deepseek_v3 without experts': ('DeepseekV3', LATENT | dict(
        q_lora_rank=7, first_k_dense_replace=2, routed_scaling_factor=3.0)),
    'glm4_moe': ('Glm4Moe', EXPERTS | dict(
        num_hidden_layers=3, head_dim=12, n_routed_experts=6, n_group=2, topk_group=1,
        n_shared_experts=2, routed_scaling_factor=1.5, use_qk_norm=True, attention_bias=True)),
    'glm4_moe tied, dense layers, without norms': ('Glm4Moe', EXPERTS | dict(
        tie_word_embeddings=True, num_hidden_layers=3, head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, n_routed_experts=5, norm_topk_prob=False, first_k_dense_replace=2,
        rope_parameters=dict(rope_type='default', rope_theta=500.0, partial_rotary_factor=0.75))),
    'qwen3_next': ('Qwen3Next', EXPERTS | LINEAR | dict(
        num_hidden_layers=5, head_dim=16, num_experts=4, shared_expert_intermediate_size=10)),
    'qwen3_next tied, biases, dense layers, every second attends': ('Qwen3Next', EXPERTS | dict(
        tie_word_embeddings=True, num_hidden_layers=4, head_dim=8, attention_bias=True,
        num_experts=3, norm_topk_prob=False, shared_expert_intermediate_size=7,
        decoder_sparse_step=2, mlp_only_layers=[3], full_attention_interval=2,
        linear_key_head_dim=10, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_conv_kernel_dim=3, rms_norm_eps=1e-3)),
    'qwen3_5': ('Qwen3_5Text', LINEAR | dict(
        num_hidden_layers=3, head_dim=16, full_attention_interval=2)),
    'qwen3_5 tied, biases, three heads a key': ('Qwen3_5Text', LINEAR | dict(
        tie_word_embeddings=True, num_hidden_layers=3, head_dim=16, attention_bias=True,
        linear_num_key_heads=1, linear_num_value_heads=3,
        layer_types=['full_attention', 'linear_attention', 'full_attention'])),
    'qwen3_5_moe': ('Qwen3_5MoeText', EXPERTS | LINEAR | dict(
        num_hidden_layers=4, head_dim=16, num_experts=4, shared_expert_intermediate_size=10)),
    'qwen3_5_moe tied, more of a head turned': ('Qwen3_5MoeText', EXPERTS | LINEAR | dict(
        tie_word_embeddings=True, head_dim=8, num_experts=3, num_experts_per_tok=1,
        shared_expert_intermediate_size=5, full_attention_interval=2, linear_num_value_heads=2,
        rope_parameters=dict(rope_type='default', rope_theta=500.0, partial_rotary_factor=0.5))),
    'kimi_linear': ('KimiLinear', LATENT | EXPERTS | IDS | dict(
        num_hidden_layers=5, num_experts=4, linear_head_dim=12, linear_num_heads=2,
        rms_norm_eps=1e-3)),
    'kimi_linear with groups and short queries': ('KimiLinear', LATENT | EXPERTS | IDS | dict(
        num_hidden_layers=4, num_experts=8, n_group=4, topk_group=2, n_shared_experts=2,
        norm_topk_prob=False, q_lora_rank=10, rms_norm_eps=1e-3, first_k_dense_replace=2,
        linear_attn_config=dict(kda_layers=[1, 2, 4], full_attn_layers=[3], num_heads=3,
                                head_dim=10, short_conv_kernel_size=3))),
}


class Both(NamedTuple):
  """A public model in memory and in a folder, and ours read from the folder."""
  theirs: object
  folder: Path
  cfg: object
  params: dict


def make(case: str, folder: Path) -> Both:
  """A model of the case with every number replaced, saved, and imported."""
  folder = Path(folder) / 'public'
  theirs = public_model(*CASES[case])
  save(theirs, folder)
  cfg = hf_files.model_config(folder)
  return Both(theirs, folder, cfg, hf_files.load(folder, cfg, param.abstract(model.specs(cfg))))


def public_model(kind: str, changes: dict):
  """A causal model of transformers with random parameters and buffers far from their defaults."""
  import torch
  import transformers
  config = getattr(transformers, f'{kind}Config')(**(SMALL | changes))
  torch.manual_seed(0)
  made = transformers.AutoModelForCausalLM.from_config(
      config, attn_implementation='eager', dtype=torch.float32).eval()
  rng = np.random.default_rng(0)
  with torch.no_grad():
    saved = made.state_dict()
    for name, tensor in made.named_parameters():
      if name.endswith('A_log'):       # decays that leave something of a state, and not all of it
        tensor.copy_(torch.tensor(np.log(rng.uniform(0.05, 1.5, tuple(tensor.shape)))))
        continue
      spread = 0.5 if tensor.ndim < 2 else 1.3 * tensor.shape[-1] ** -0.5
      shift = 0.7 if tensor.ndim < 2 else 0.0
      if 'norm' in name and not tensor.any():
        shift -= 1                     # of a norm that adds 1: the same gains as the others have
      tensor.copy_(torch.tensor(shift + spread * rng.standard_normal(tuple(tensor.shape))))
    for name, tensor in made.named_buffers():
      if name in saved:                # the others follow from the config
        tensor.copy_(torch.tensor(0.3 * rng.standard_normal(tuple(tensor.shape))))
  return made


def save(theirs, folder: Path) -> None:
  """As published: transformers 5.23 saves dense layers of Kimi-Linear as if they had experts."""
  with quiet():
    theirs.save_pretrained(folder)
  if theirs.config.model_type == 'kimi_linear':
    from safetensors import numpy as safetensors
    dense = re.compile(r'block_sparse_moe(?=\.(gate|up|down)_proj)')
    path = folder / 'model.safetensors'
    tensors = {dense.sub('mlp', name): a for name, a in safetensors.load_file(path).items()}
    safetensors.save_file(tensors, path, metadata={'format': 'pt'})


@contextlib.contextmanager
def quiet():
  """Without transformers' progress bars."""
  import transformers
  transformers.utils.logging.disable_progress_bar()
  transformers.utils.logging.set_verbosity_error()
  yield


def tokens(rows: int = 2, length: int = LENGTH) -> np.ndarray:
  return np.random.default_rng(1).integers(0, VOCAB, (rows, length))


def their_logits(theirs, ids: np.ndarray, real: np.ndarray | None = None) -> np.ndarray:
  """[B, T] -> [B, T, V]. real: [B, T], 0 at padding."""
  import torch
  real = np.ones_like(ids) if real is None else real
  positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
  with torch.no_grad():
    return theirs(
        torch.tensor(ids), attention_mask=torch.tensor(real), position_ids=torch.tensor(positions),
        use_cache=False).logits.numpy()


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, cfg, ids, positions, segments):
  hidden = model.forward(params, cfg, ids, positions, segments).hidden
  return model.unembed(params, cfg, hidden)


def our_logits(params: dict, cfg, ids: np.ndarray, real: np.ndarray | None = None) -> np.ndarray:
  real = np.ones_like(ids) if real is None else real
  positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
  as_int = lambda x: jnp.asarray(x, jnp.int32)
  return np.asarray(_logits(params, cfg, as_int(ids), as_int(positions), as_int(real)))


def difference_of_logits(both: Both) -> float:
  """Over LENGTH random tokens, the largest."""
  ids = tokens()
  return float(np.abs(
      our_logits(both.params, both.cfg, ids) - their_logits(both.theirs, ids)).max())


def difference_under_padding(both: Both) -> float:
  """With one row padded on the left and one on the right."""
  ids, real = tokens(), np.ones((2, LENGTH), int)
  real[0, :37], real[1, -50:] = 0, 0
  apart = np.abs(
      our_logits(both.params, both.cfg, ids, real) - their_logits(both.theirs, ids, real))
  return float(apart[real == 1].max())


def difference_of_greedy(both: Both, num: int = NEW) -> float:
  """0 if both continue a prompt alike; else how far their best two logits lie apart at the first
  difference.
  """
  import torch
  prompt = tokens(1, 20)
  with torch.no_grad(), quiet():
    theirs = both.theirs.generate(
        torch.tensor(prompt), attention_mask=torch.ones_like(torch.tensor(prompt)),
        max_new_tokens=num, min_new_tokens=num, do_sample=False, eos_token_id=None,
        pad_token_id=0).numpy()[0, prompt.shape[1]:]
  ours = np.asarray(_greedy(both.params, both.cfg, jnp.asarray(prompt, jnp.int32), num))[0]
  if (theirs == ours).all():
    return 0.0
  first = int(np.flatnonzero(theirs != ours)[0])
  ids = np.concatenate([prompt[0], ours[:first]])[None]
  best = np.sort(our_logits(both.params, both.cfg, ids)[0, -1])[-2:]
  return float(best[1] - best[0])


@functools.partial(jax.jit, static_argnums=(1, 3))
def _greedy(params, cfg, prompt, num):
  hidden, cache, _ = model.prefill(
      params, cfg, prompt, jnp.zeros(1, jnp.int32), prompt.shape[1] + num)

  def one(carry, _):
    hidden, cache = carry
    token = jnp.argmax(model.unembed(params, cfg, hidden), axis=-1).astype(jnp.int32)
    return model.step(params, cfg, token, cache)[:2], token

  return jax.lax.scan(one, (hidden, cache), None, num)[1].T


def export(both: Both, folder: Path, **options) -> Path:
  """Ours as a folder again."""
  leaves = param.flat(both.params)
  hf_files.save(folder, both.cfg, lambda path: np.asarray(leaves[path]),
                origin=hf_files.read_origin(both.folder), **options)
  return Path(folder)


def contents(folder: Path) -> dict[str, np.ndarray]:
  return {name: np.array(hf_files.mapped(t)) for name, t in hf_files.tensors(folder).items()}


def assert_every_tensor_counts(family, both: Both) -> None:
  """Without one the plan names it; two of a shape exchanged make other parameters."""
  import pytest
  found = contents(both.folder)
  copies = {p.tensor: p.path for p in hf.copies(family, both.cfg)}
  shapes = {name: x.shape for name, x in found.items()}
  names = [name for name in found if name not in copies]
  for name in names:
    with pytest.raises(ValueError, match=f'{re.escape(name)} is missing'):
      hf.plan(family, both.cfg, {n: s for n, s in shapes.items() if n != name})
  specs = param.flat(model.specs(both.cfg))
  plan = hf.plan(family, both.cfg, shapes)

  def tree(tensors):
    whole = lambda shape: tuple(slice(None) for _ in shape)
    return {path: hf.read(plan[path], s.shape, whole(s.shape), tensors.__getitem__, np.float32)
            for path, s in specs.items()}

  straight = tree(found)
  for path, a in straight.items():
    np.testing.assert_array_equal(a, param.flat(both.params)[path])
  for name, path in copies.items():
    np.testing.assert_array_equal(found[name], straight[path])
  partners = {a: b for a, b in zip(names, names[1:] + names[:1])}
  for a in names:
    same_shape = [b for b in names if b != a and shapes[b] == shapes[a]]
    if not same_shape:
      continue
    b = same_shape[names.index(partners[a]) % len(same_shape)]
    swapped = tree(found | {a: found[b], b: found[a]})
    assert any((swapped[path] != straight[path]).any() for path in specs), (a, b)


def same_bits(a: Path, b: Path) -> bool:
  """Whether two folders hold the same tensors, bit for bit, and the same config.json."""
  mine, yours = contents(a), contents(b)
  read = lambda folder: json.loads((folder / 'config.json').read_text())
  return (mine.keys() == yours.keys() and read(a) == read(b) and all(
      x.dtype == yours[n].dtype and x.tobytes() == yours[n].tobytes() for n, x in mine.items()))


def reloaded(folder: Path):
  """(model, names of tensors that were missing or not expected), by transformers."""
  import torch
  import transformers
  with quiet():
    made, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation='eager', dtype=torch.float32)
  faults = [*info['missing_keys'], *info['unexpected_keys'], *info['mismatched_keys']]
  return made.eval(), faults


def difference_of_exported(both: Both, folder: Path) -> float:
  """Of the logits of the exported folder, loaded by transformers, from the original's."""
  made, faults = reloaded(folder)
  assert not faults, faults
  ids = tokens(1, 40)
  return float(np.abs(their_logits(made, ids) - their_logits(both.theirs, ids)).max())


CHECKS = {
    'logits': difference_of_logits,
    'padding': difference_under_padding,
    'greedy': difference_of_greedy,
}


def measure(case: str, folder: Path) -> dict[str, float]:
  """Every check of one case: {name: largest difference}."""
  os.makedirs(folder, exist_ok=True)
  both = make(case, folder)
  found = {name: check(both) for name, check in CHECKS.items()}
  again = export(both, Path(folder) / 'again')
  found['round trip'] = 0.0 if same_bits(both.folder, again) else float('inf')
  found['reloaded'] = difference_of_exported(both, again)
  return found
