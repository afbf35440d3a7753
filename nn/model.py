"""The decoder: tokens to hidden states, whole rows at a time or one token at a time with a cache.

B rows, T positions, P prompt positions, L cache slots, D model width, V vocabulary, R repeats. A
stack is `head` layers, then `pattern` x `repeats` with parameters stacked over repeats, then `tail`
layers.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from nn import block, gdn, linear, lora, mtp, norm, param
from nn import cache as cache_lib
from nn.config import ModelConfig, pair
from nn.param import Spec
from nn.types import Cache, Output


def specs(cfg: ModelConfig) -> dict:
  """The table of every parameter, adapters included."""
  embed = Spec((cfg.vocab_size, cfg.embed_dim), ('vocab', 'embed'), param.normal(0.02))
  table = {'embed': {'table': embed}}
  for part, layers in _parts(cfg).items():
    layer = {name: block.specs(cfg, names) for name, names in layers.items()}
    table[part] = param.stack(layer, cfg.repeats) if part == 'blocks' else layer
  table['norm'] = norm.specs(cfg, cfg.embed_dim, 'embed')
  if not cfg.tied:
    sizes = {'vocab': cfg.vocab_size, 'embed': cfg.embed_dim}
    table['unembed'] = {'table': param.matrix(sizes, ('vocab', 'embed'), contract=('embed',))}
  if cfg.mtp.depth:
    table['mtp'] = mtp.specs(cfg)
  return lora.specs(table, cfg.lora)


def init(key: jax.Array, cfg: ModelConfig) -> dict:
  """Float32 parameters, the same on every mesh."""
  return param.init(key, specs(cfg))


def forward(
    params: dict, cfg: ModelConfig, tokens: jax.Array, positions: jax.Array, segments: jax.Array,
    routes: Mapping[int, jax.Array] | None = None,
    heads: Mapping[tuple[str, ...], int] | None = None,
) -> Output:
  """Hidden states of whole rows.

  Args:
    tokens, positions, segments: [B, T] int32; segments 0 is padding.
    routes: {layer index: [B, T, top_k] integers}, experts to take again, as in Output.routes; -1:
      choose anew. A layer that is not named chooses.
    heads: depths of multi-token prediction, as nn.mtp.wanted gives them; None: none is computed.

  Raises:
    ValueError: rows longer than cfg.max_length; routes of a layer that has no experts.
  """
  _check_length(cfg, tokens.shape[1])

  def layer(names, layer_params, x, state, at):
    replay = None if state is None else cache_lib.read(state, at)
    x, extras = block.apply(layer_params, cfg, names, x, positions, segments, replay)
    return x, state, extras

  states = _replays(cfg, routes, tokens.shape) if routes else _states(cfg, lambda names: None)
  embeddings, ahead = _embed(params, cfg, tokens), {}
  x, _, extras = _walk(params, cfg, layer, embeddings, states)
  hidden = _final_norm(params, cfg, x)

  def head_layer(names, layer_params, x, known):
    return block.apply(layer_params, cfg, names, x, positions, known)

  for detach, depth in (heads or {}).items():
    ahead[detach], more = mtp.apply(
        lora.adapted(params, cfg.lora)['mtp'], cfg, hidden if cfg.mtp.hidden == 'after' else x,
        embeddings, segments, _remat(cfg, head_layer, cfg.mtp_layer), depth, detach)
    extras += more if len(ahead) == 1 else []      # the others are the same but for gradients
  return Output(hidden=hidden, mtp_hidden=ahead, **_collect(extras))


def prepare(params: dict, cfg: ModelConfig) -> dict:
  """Parameters for a loop over tokens.

  Matrices are merged with their adapters and in the compute dtype, unrolled layers apart. `prefill`
  and `step` give the same with either form; without this, they merge, round and cut the weights
  again for every token. Heads of multi-token prediction are left out.
  """
  table = param.flat(specs(cfg))
  merged = {name: part for name, part in lora.merge(params, cfg.lora).items() if name != 'mtp'}
  rounded = {name: a.astype(cfg.dtype) if table[name].contract or name == 'embed/table' else a
             for name, a in param.flat(merged).items()}
  params = param.unflat(rounded)
  if 'blocks' in params and cfg.unroll:
    params['blocks'] = _apart(params['blocks'], cfg)
  return params


def prefill(
    params: dict, cfg: ModelConfig, tokens: jax.Array, start: jax.Array, length: int,
) -> tuple[jax.Array, Cache, dict[int, jax.Array]]:
  """Reads prompts that end at the same slot.

  Args:
    tokens: [B, P] int32, padded on the left.
    start: [B] int32, first slot that is not padding.
    length: L, slots of the cache, P included.

  Returns:
    hidden of the last slot [B, D], the cache, and the routes {layer index: [B, P, top_k] int32}.

  Raises:
    ValueError: a prompt longer than the cache, or a cache longer than cfg.max_length.
  """
  num_rows, num_slots = tokens.shape
  if num_slots > length:
    raise ValueError(f'a prompt of {num_slots} slots does not fit a cache of {length}')
  _check_length(cfg, length)
  slots = jnp.arange(num_slots)
  segments = (slots >= start[:, None]).astype(jnp.int32)
  positions = jnp.maximum(slots - start[:, None], 0)

  def layer(names, layer_params, x, state, at):
    return block.prefill(layer_params, cfg, names, x, positions, segments, state, at)

  states = _states(cfg, lambda names: block.init_cache(cfg, names, num_rows, length))
  x, states, extras = _walk(params, cfg, layer, _embed(params, cfg, tokens), states)
  cache = Cache(layers=states, start=start, index=jnp.int32(num_slots), length=length)
  return _final_norm(params, cfg, x[:, -1]), cache, _by_index(extras, 'routes')


def step(
    params: dict, cfg: ModelConfig, tokens: jax.Array, cache: Cache,
) -> tuple[jax.Array, Cache, dict[int, jax.Array]]:
  """Reads one more token of every row: [B] -> hidden [B, D], cache, routes {layer: [B, top_k]}."""
  slots = jnp.arange(cache.length)
  valid = (slots >= cache.start[:, None]) & (slots <= cache.index)
  position = cache.index - cache.start

  def layer(names, layer_params, x, state, at):
    return block.step(layer_params, cfg, names, x, position, valid, cache.index, state, at)

  x, states, extras = _walk(params, cfg, layer, _embed(params, cfg, tokens), cache.layers)
  routes = {i: experts[:, 0] for i, experts in _by_index(extras, 'routes').items()}
  return _final_norm(params, cfg, x), cache.replace(layers=states, index=cache.index + 1), routes


def repeat_cache(cache: Cache, n: int) -> Cache:
  """Every row n times, copies of a row adjacent."""
  stacked = lambda part: part == 'blocks' and isinstance(cache.layers[part], dict)
  layers = {part: jax.tree.map(lambda a: jnp.repeat(a, n, axis=1 if stacked(part) else 0), states)
            for part, states in cache.layers.items()}
  return cache.replace(layers=layers, start=jnp.repeat(cache.start, n))


def unembed(params: dict, cfg: ModelConfig, hidden: jax.Array) -> jax.Array:
  """Logits: [..., D] -> [..., V] float32.

  Where the model is tied, a table of its own is taken all the same if there is one: the train step
  gives it one to tell the two sides' gradients apart.
  """
  del cfg
  return linear.logits(hidden, params.get('unembed', params['embed'])['table'])


def square_sums(tree: dict, cfg: ModelConfig) -> dict[str, jax.Array]:
  """Sums of squares by part: {'embed', 'unembed', 'norm', 'layer 0', ...: []}, of what there is.

  Args:
    tree: shaped like params, some of them, or their gradients.
  """
  total = lambda part: sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(part))
  layered = {part for (part, _), _ in by_layer(cfg)}
  out = {name: total(part) for name, part in tree.items() if name not in layered}
  for (part, name), indices in by_layer(cfg):
    leaves = jax.tree.leaves(tree.get(part, {}).get(name, {}))
    for r, i in enumerate(indices) if leaves else ():
      out[f'layer {i}'] = total([a[r] for a in leaves] if part == 'blocks' else leaves)
  return out


def flops(cfg: ModelConfig, length: int, depth: int = 0) -> int:
  """Training FLOPs per token of rows of `length`: forward, and twice that backward.

  Under adapters backward is once: of weights there are only their gradients, too small to count.
  Recomputation is not counted.

  Args:
    depth: heads of multi-token prediction that are trained, too.
  """
  layers = sum(block.flops(cfg, names, length) for names in cfg.layers)
  layers += depth * mtp.flops(cfg, length) if depth else 0
  return (2 if cfg.lora.rank else 3) * (layers + (1 + depth) * 2 * cfg.embed_dim * cfg.vocab_size)


def after_update(params: dict, cfg: ModelConfig, load: Mapping[int, jax.Array]) -> dict:
  """Parameters after an optimiser step where more than the gradient changes them: selection biases.

  They stay under adapters, which would not fit another model's.

  Args:
    load: {layer index: [experts]}, Output.load summed over the step.
  """
  if cfg.lora.rank:
    return params
  params, names = dict(params), dict(by_layer(cfg))
  for (part, name), indices in names.items():
    if indices[0] in load:
      totals = jnp.stack([load[i] for i in indices]) if part == 'blocks' else load[indices[0]]
      layer = params[part][name]
      ffn = block.FFNS[cfg.all_layers[indices[0]][1]].after_update(layer['ffn'], cfg, totals)
      params[part] = params[part] | {name: layer | {'ffn': ffn}}
  return params


def warm_start(params: dict, cfg: ModelConfig, variant: str) -> tuple[dict, ModelConfig]:
  """The same function, layers of linear attention as a finer variant, see `gdn.warm_start`.

  Raises:
    ValueError: a model without such layers, or whose variant is no special case of the new one.
  """
  params, new = dict(params), None
  for (part, name), indices in by_layer(cfg):
    if cfg.all_layers[indices[0]][0] == 'gdn':
      layer = params[part][name]
      mixer, new = gdn.warm_start(layer['mixer'], cfg, variant)
      params[part] = params[part] | {name: layer | {'mixer': mixer}}
  if new is None:
    raise ValueError(f'no layer has the mixer gdn, so none can become {variant!r}; '
                     f'the layers have {sorted({mixer for mixer, _ in cfg.all_layers})}')
  return params, new


def _check_length(cfg: ModelConfig, length: int) -> None:
  if length > cfg.max_length:
    raise ValueError(f'rows of {length} tokens are longer than model.max_length, {cfg.max_length}')


def _parts(cfg: ModelConfig) -> dict[str, dict[str, block.Names]]:
  """{head, blocks, tail: {position: (mixer, ffn)}}, without the empty ones."""
  parts = {'head': cfg.head, 'blocks': cfg.pattern if cfg.repeats else (), 'tail': cfg.tail}
  return {part: {str(i): pair(entry, cfg.ffn) for i, entry in enumerate(layers)}
          for part, layers in parts.items() if layers}


def _embed(params: dict, cfg: ModelConfig, tokens: jax.Array) -> jax.Array:
  x = jnp.take(params['embed']['table'], tokens, axis=0).astype(cfg.dtype)
  if cfg.scale_embed:                  # by a root rounded like everything else
    x = x * jnp.asarray(math.sqrt(cfg.embed_dim), cfg.dtype)
  return param.constrain(x, cfg.rules, 'batch', *('time',) * (tokens.ndim - 1), None)


def _final_norm(params: dict, cfg: ModelConfig, x: jax.Array) -> jax.Array:
  return norm.apply(params['norm'], cfg, x)


def _states(cfg: ModelConfig, make) -> dict:
  """make(names) for every layer, nested as `_walk` wants it: stacked over repeats under a scan."""
  states = {part: {name: make(names) for name, names in layers.items()}
            for part, layers in _parts(cfg).items()}
  if 'blocks' in states:
    period = states['blocks']
    stacked = lambda a: jnp.broadcast_to(a, (cfg.repeats, *a.shape))
    states['blocks'] = (period,) * cfg.repeats if cfg.unroll else jax.tree.map(stacked, period)
  return states


def by_layer(cfg: ModelConfig) -> list[tuple[tuple[str, str], tuple[int, ...]]]:
  """((part, position), the model's indices of layers there) for every entry of the parameters.

  Those of multi-token prediction count on behind the last layer: ('mtp', '0') is the first of them.
  """
  first, period, entries = len(cfg.head), len(cfg.pattern), []
  for part, layers in _parts(cfg).items():
    for i, name in enumerate(layers):
      begin = {'head': 0, 'blocks': first, 'tail': first + period * cfg.repeats}[part] + i
      entries.append(((part, name), tuple(
          begin + r * period for r in range(cfg.repeats if part == 'blocks' else 1))))
  return entries + [(('mtp', str(k)), (len(cfg.layers) + k,)) for k in range(cfg.mtp.depth)]


def places(cfg: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
  """Where every layer's parameters are: path in the table, and index in its stacked arrays."""
  found = {}
  for (part, name), indices in by_layer(cfg):
    for r, i in enumerate(indices):
      found[i] = f'{part}/{name}', (r,) if part == 'blocks' else ()
  return [found[i] for i in range(len(cfg.layers))]


def _replays(cfg: ModelConfig, routes: Mapping[int, jax.Array], shape: tuple[int, int]) -> dict:
  """routes as `_walk` wants states; a layer under the scan that is not named chooses anew."""
  if wrong := [i for i in routes if i not in range(len(cfg.layers)) or cfg.layers[i][1] != 'moe']:
    raise ValueError(f'routes are given for layers {wrong}, which have no experts')
  states = _states(cfg, lambda names: None)
  for (part, name), indices in by_layer(cfg):
    if not set(indices) & routes.keys():
      continue
    found = [routes.get(i, jnp.full((*shape, cfg.moe.top_k), -1, jnp.int32)) for i in indices]
    if part != 'blocks':
      states[part][name] = found[0]
    elif cfg.unroll:
      states[part] = tuple(
          period | {name: one} for period, one in zip(states[part], found, strict=True))
    else:
      states[part][name] = jnp.stack(found)
  return states


def _apart(blocks: dict, cfg: ModelConfig) -> tuple[dict, ...]:
  """Stacked parameters as one dict per repeat.

  By one split: the gradients of slices would be added up in full size.
  """
  if isinstance(blocks, tuple):
    return blocks
  pieces = jax.tree.map(
      lambda a: [piece[0] for piece in jax.lax.split(a, (1,) * cfg.repeats)], blocks)
  return tuple(jax.tree.map(lambda a, i=i: a[i], pieces, is_leaf=lambda a: isinstance(a, list))
               for i in range(cfg.repeats))


def _walk(
    params: dict, cfg: ModelConfig, layer, x: jax.Array, states: dict,
) -> tuple[jax.Array, dict, list[dict]]:
  """Runs layer(names, params, x, state, at) -> (x, state, extras) through the stack.

  Args:
    states: nested like params; `at` says which part of its state's arrays is the layer's, see
      `nn/cache.py`.

  Returns:
    x, states, and the extras of every layer in the order of the model.
  """
  extras, new, params = [], {}, lora.adapted(params, cfg.lora)

  def period(layers, params, x, states, at):
    states, out = dict(states), []
    for name, names in layers.items():
      x, states[name], more = _remat(cfg, layer, names)(params[name], x, states[name], at)
      out.append(more)
    return x, states, out

  for part, layers in _parts(cfg).items():
    if part != 'blocks':
      x, new[part], out = period(layers, params[part], x, states[part], None)
      extras += out
    elif cfg.unroll:
      new[part] = ()
      for layer_params, state in zip(_apart(params[part], cfg), states[part], strict=True):
        x, state, out = period(layers, layer_params, x, state, None)
        new[part] += (state,)
        extras += out
    else:
      def body(carry, xs, layers=layers):
        x, state, out = period(layers, xs[0], *carry, xs[1])
        return (x, state), out
      (x, new[part]), out = jax.lax.scan(
          body, (x, states[part]), (params[part], jnp.arange(cfg.repeats)))
      extras += [jax.tree.map(lambda a, r=r: a[r], more)
                 for r in range(cfg.repeats) for more in out]
  return x, new, extras


def _remat(cfg, layer, names):
  """layer with the backward pass that cfg.remat asks for."""
  layer = functools.partial(layer, names)
  policies = {'full': None, 'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
  if cfg.remat == 'none':
    return layer
  # Inside a scan nothing can be merged with the forward pass anyway, and the barriers against it
  # cost time.
  return jax.checkpoint(layer, policy=policies[cfg.remat], prevent_cse=cfg.unroll)


def _by_index(extras: list[dict], name: str) -> dict[int, jax.Array]:
  """One thing that layers report, of those that do."""
  return {i: e[name] for i, e in enumerate(extras) if name in e}


def _collect(extras: list[dict]) -> dict:
  """Layers' reports as fields of Output: losses summed, metrics averaged over layers with them."""
  add = lambda kind: {name: sum(e[kind][name] for e in extras if name in e.get(kind, {}))
                      for name in dict.fromkeys(n for e in extras for n in e.get(kind, {}))}
  count = lambda name: sum(name in e.get('metrics', {}) for e in extras)
  return {
      'aux_loss': add('aux_loss'),
      **{name: _by_index(extras, name) for name in ('routes', 'own_routes', 'load', 'dropped')},
      'metrics': {name: total / count(name) for name, total in add('metrics').items()},
  }
