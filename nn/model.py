"""The decoder: tokens to hidden states, whole rows at a time or one token at a time with a cache.

B rows, T positions, P prompt positions, L cache slots, D model width, V vocabulary, R repeats.
A stack is `head` layers, then `pattern` x `repeats` with parameters stacked over repeats, then `tail` layers.
"""

import functools

import jax
import jax.numpy as jnp

from nn import block, norm, param
from nn.config import ModelConfig, pair
from nn.param import Spec
from nn.types import Cache, Output


def specs(cfg: ModelConfig) -> dict:
  """The table of every parameter."""
  embed = Spec((cfg.vocab_size, cfg.embed_dim), ('vocab', 'embed'), param.normal(0.02))
  table = {'embed': {'table': embed}}
  for part, layers in _parts(cfg).items():
    layer = {name: block.specs(cfg, names) for name, names in layers.items()}
    table[part] = param.stack(layer, cfg.repeats) if part == 'blocks' else layer
  table['norm'] = norm.specs(cfg.embed_dim, 'embed')
  if not cfg.tied:
    sizes = {'vocab': cfg.vocab_size, 'embed': cfg.embed_dim}
    table['unembed'] = {'table': param.matrix(sizes, ('vocab', 'embed'), contract=('embed',))}
  return table


def init(key: jax.Array, cfg: ModelConfig) -> dict:
  """Float32 parameters, the same on every mesh."""
  return param.init(key, specs(cfg))


def forward(params: dict, cfg: ModelConfig, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> Output:
  """Hidden states of whole rows.

  Args:
    tokens, positions, segments: [B, T] int32; segments 0 is padding.
  """
  def layer(names, layer_params, x, state):
    del state
    x, extras = block.apply(layer_params, cfg, names, x, positions, segments)
    return x, None, extras

  x, _, extras = _walk(params, cfg, layer, _embed(params, cfg, tokens), None)
  return Output(hidden=norm.rms_norm(x, params['norm']['scale'], cfg.norm_eps), **_collect(extras))


def prefill(
    params: dict, cfg: ModelConfig, tokens: jax.Array, start: jax.Array, length: int,
) -> tuple[jax.Array, Cache]:
  """Reads prompts that end at the same slot.

  Args:
    tokens: [B, P] int32, padded on the left.
    start: [B] int32, first slot that is not padding.
    length: L, slots of the cache, P included.

  Returns:
    hidden of the last slot [B, D], and the cache.
  """
  num_rows, num_slots = tokens.shape
  slots = jnp.arange(num_slots)
  segments = (slots >= start[:, None]).astype(jnp.int32)
  positions = jnp.maximum(slots - start[:, None], 0)

  def layer(names, layer_params, x, state):
    x, state = block.prefill(layer_params, cfg, names, x, positions, segments, state)
    return x, state, {}

  x, states, _ = _walk(params, cfg, layer, _embed(params, cfg, tokens), _init_cache(cfg, num_rows, length))
  hidden = norm.rms_norm(x[:, -1], params['norm']['scale'], cfg.norm_eps)
  return hidden, Cache(layers=states, start=start, index=jnp.int32(num_slots))


def step(params: dict, cfg: ModelConfig, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
  """Reads one more token of every row: [B] -> hidden [B, D], and the cache."""
  num_slots = jax.tree.leaves(cache.layers)[0].shape[-2]
  slots = jnp.arange(num_slots)
  valid = (slots >= cache.start[:, None]) & (slots <= cache.index)
  position = cache.index - cache.start

  def layer(names, layer_params, x, state):
    x, state = block.step(layer_params, cfg, names, x, position, valid, cache.index, state)
    return x, state, {}

  x, states, _ = _walk(params, cfg, layer, _embed(params, cfg, tokens), cache.layers)
  hidden = norm.rms_norm(x, params['norm']['scale'], cfg.norm_eps)
  return hidden, Cache(layers=states, start=cache.start, index=cache.index + 1)


def repeat_cache(cache: Cache, n: int) -> Cache:
  """Every row n times, copies of a row adjacent."""
  layers = {part: jax.tree.map(lambda a: jnp.repeat(a, n, axis=1 if part == 'blocks' else 0), states)
            for part, states in cache.layers.items()}
  return Cache(layers=layers, start=jnp.repeat(cache.start, n), index=cache.index)


def unembedding(params: dict, cfg: ModelConfig) -> jax.Array:
  """The table [V, D] that turns hidden states into logits."""
  return params['embed' if cfg.tied else 'unembed']['table']


def unembed(params: dict, cfg: ModelConfig, hidden: jax.Array) -> jax.Array:
  """Logits: [..., D] -> [..., V] float32."""
  table = unembedding(params, cfg).astype(hidden.dtype)
  return jnp.einsum('...d,vd->...v', hidden, table, preferred_element_type=jnp.float32)


def flops(cfg: ModelConfig, length: int) -> int:
  """Training FLOPs per token of rows of `length`: forward, and twice that backward. Recomputation is not counted."""
  layers = sum(block.flops(cfg, names, length) for names in cfg.layers)
  return 3 * (layers + 2 * cfg.embed_dim * cfg.vocab_size)


def _parts(cfg: ModelConfig) -> dict[str, dict[str, block.Names]]:
  """{head, blocks, tail: {position: (mixer, ffn)}}, without the empty ones."""
  parts = {'head': cfg.head, 'blocks': cfg.pattern if cfg.repeats else (), 'tail': cfg.tail}
  return {part: {str(i): pair(entry, cfg.ffn) for i, entry in enumerate(layers)}
          for part, layers in parts.items() if layers}


def _embed(params: dict, cfg: ModelConfig, tokens: jax.Array) -> jax.Array:
  x = jnp.take(params['embed']['table'], tokens, axis=0).astype(cfg.dtype)
  return param.constrain(x, cfg.rules, 'batch', *('time',) * (tokens.ndim - 1), None)


def _init_cache(cfg: ModelConfig, rows: int, length: int) -> dict:
  states = {part: {name: block.init_cache(cfg, names, rows, length) for name, names in layers.items()}
            for part, layers in _parts(cfg).items()}
  if 'blocks' in states:
    states['blocks'] = jax.tree.map(
        lambda a: jnp.broadcast_to(a, (cfg.repeats, *a.shape)), states['blocks'])
  return states


def _walk(params, cfg, layer, x, states):
  """Runs layer(names, params, x, state) -> (x, state, extras) through the stack.

  Returns:
    x, states nested like params, and the extras of every layer in the order of the model.
  """
  run = functools.partial(_remat, cfg, layer)
  extras, new_states = [], {}
  for part, layers in _parts(cfg).items():
    old = states[part] if states else dict.fromkeys(layers)
    if part == 'blocks':
      def period(x, xs, layers=layers):
        new, out = {}, []
        for name, names in layers.items():
          x, new[name], more = run(names)(xs[0][name], x, xs[1][name] if xs[1] else None)
          out.append(more)
        return x, (new, out)
      x, (new_states[part], stacked) = jax.lax.scan(
          period, x, (params[part], old if states else None), length=cfg.repeats, unroll=cfg.unroll or 1)
      extras += [jax.tree.map(lambda a, r=r: a[r], out) for r in range(cfg.repeats) for out in stacked]
    else:
      new_states[part] = {}
      for name, names in layers.items():
        x, new_states[part][name], more = run(names)(params[part][name], x, old[name])
        extras.append(more)
  return x, new_states, extras


def _remat(cfg, layer, names):
  """layer with the backward pass that cfg.remat asks for."""
  layer = functools.partial(layer, names)
  policies = {'full': None, 'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
  return layer if cfg.remat == 'none' else jax.checkpoint(layer, policy=policies[cfg.remat])


def _collect(extras: list[dict]) -> dict:
  """What layers report, as fields of Output: losses are summed, metrics averaged over the layers that have them."""
  add = lambda kind: {name: sum(e[kind][name] for e in extras if name in e.get(kind, {}))
                      for name in dict.fromkeys(n for e in extras for n in e.get(kind, {}))}
  count = lambda name: sum(name in e.get('metrics', {}) for e in extras)
  return {
      'aux_loss': add('aux_loss'),
      'routes': {i: e['routes'] for i, e in enumerate(extras) if 'routes' in e},
      'metrics': {name: total / count(name) for name, total in add('metrics').items()},
  }
