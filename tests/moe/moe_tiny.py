"""One small expert layer, layouts of public models in small, and the dense sum over all experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe import layer
from nn import param
from nn.config import ModelConfig, MoE

WIDTH, EXPERTS = 16, 8
LAYOUTS = {
    'qwen3_moe': MoE(experts=EXPERTS, top_k=2, ffw_dim=12, balance_loss=0.7, z_loss=0.3),
    'qwen3_next': MoE(experts=EXPERTS, top_k=3, ffw_dim=12, shared_dim=12, shared_gate=True),
    'deepseek_v3': MoE(
        experts=EXPERTS, top_k=3, ffw_dim=12, scores='sigmoid', scale=2.5, groups=4, top_groups=2,
        shared_dim=12, bias_rate=0.01),
    'glm4_moe': MoE(
        experts=EXPERTS, top_k=2, ffw_dim=12, scores='sigmoid', shared_dim=12, bias_rate=0.01),
    'not renormalised': MoE(experts=EXPERTS, top_k=2, ffw_dim=12, renormalise=False, scale=1.5),
}


def config(moe: MoE, **changes) -> ModelConfig:
  sizes = dict(vocab_size=8, embed_dim=WIDTH, num_heads=2, num_kv_heads=2, head_dim=4, ffw_dim=24,
               ffn='moe', moe=moe)
  return ModelConfig(**(sizes | changes))


def draw(specs: dict, seed: int = 0) -> dict:
  """Parameters of visible size, gains and selection biases included."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda s: jnp.asarray(
          0.4 * rng.standard_normal(s.shape) + (s.init is param.ones), jnp.float32), specs)


def params(cfg: ModelConfig) -> dict:
  return draw(layer.specs(cfg))


def rows(num_rows: int = 8, length: int = 6, seed: int = 1) -> tuple[jax.Array, jax.Array]:
  """x [B, T, D] and segments [B, T]: two documents a row, then padding.

  There is more padding in every row; the last is all padding.
  """
  x = jnp.asarray(
      np.random.default_rng(seed).standard_normal((num_rows, length, WIDTH)), jnp.float32)
  time, end = np.arange(length), np.linspace(length, 0, num_rows).round()[:, None]
  return x, jnp.asarray(np.where(time < 2, 1, 2) * (time < end), jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def pull(params, cfg, x, segments, routes=None):
  """((loss, (y, extras)), gradients of the trainable parameters and x).

  The loss weights y and takes the auxiliary losses.
  """
  trainable, frozen = param.split(params, layer.specs(cfg))

  def loss(trainable, x):
    y, extras = layer.apply(param.merge(trainable, frozen), cfg, x, segments, routes)
    weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
    return jnp.sum(weights * y) + sum(extras['aux_loss'].values(), jnp.float32(0)), (y, extras)

  return jax.value_and_grad(loss, (0, 1), has_aux=True)(trainable, x)


def chosen_by_hand(params: dict, cfg: ModelConfig, x: jax.Array, segments: jax.Array) -> np.ndarray:
  """Which experts every token goes to, by sorting: [B, T, E] bool."""
  moe, size = cfg.moe, cfg.moe.experts
  logits = np.asarray(x, np.float64) @ np.asarray(params['router'], np.float64)
  scores = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) if moe.scores == 'softmax'
            else 1 / (1 + np.exp(-logits)))
  ranked = scores + np.asarray(params.get('bias', 0.0), np.float64)
  members = ranked.reshape(*ranked.shape[:-1], moe.groups, -1)
  worth = np.sort(members, axis=-1)[..., -2:].sum(-1)
  worst = np.argsort(-worth, axis=-1)[..., moe.top_groups:]
  left_out = (np.arange(size) // (size // moe.groups) == worst[..., None]).any(-2)
  experts = np.argsort(-np.where(left_out, -np.inf, ranked), axis=-1)[..., :moe.top_k]
  return (np.arange(size) == experts[..., None]).any(-2) & (np.asarray(segments) != 0)[..., None]


@functools.partial(jax.jit, static_argnums=1)
def dense(
    params: dict, cfg: ModelConfig, x: jax.Array, chosen: np.ndarray, kept: np.ndarray = True,
) -> jax.Array:
  """The layer by its definition: every expert on every token, and gates that are mostly zero.

  kept: [B, T, E] bool, false where a choice was dropped.
  """
  moe = cfg.moe
  logits = jnp.einsum('btd,de->bte', x, params['router'])
  scores = jax.nn.softmax(logits) if moe.scores == 'softmax' else jax.nn.sigmoid(logits)
  gates = jnp.where(chosen, scores, 0)
  if moe.renormalise:
    gates = gates / jnp.where(chosen.any(-1, keepdims=True), gates.sum(-1, keepdims=True), 1)
  gates = jnp.where(kept, gates, 0)
  inner = jax.nn.silu(jnp.einsum('btd,edf->btef', x, params['gate'])) * jnp.einsum(
      'btd,edf->btef', x, params['up'])
  y = moe.scale * jnp.einsum('btef,efd,bte->btd', inner, params['down'], gates)
  if moe.shared_dim:
    p = params['shared']
    z = (jax.nn.silu(x @ p['gate']) * (x @ p['up'])) @ p['down']
    y += z * jax.nn.sigmoid(x @ params['shared_gate'])[..., None] if moe.shared_gate else z
  return y
