"""The delta-rule family: definition against matrices, fast forms against definition, invariances.

Laws are checked in float64 where they are exact in exact arithmetic, so that the tolerance is a
rounding and no more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import fg2_gdn as op

# Small arrays, many programs: without LLVM's optimisation these compile in less than half the time.
OPTIONS = {'xla_backend_optimization_level': 0}
B, HK, HV, K, V = 2, 2, 4, 8, 6
SEGMENTS = np.array(
  [
    [0, 0, 0]
    + [7] * 9
    + [2] * 1
    + [7] * 12
    + [0, 0]
    + [7] * 6
    + [5] * 4,  # the second 7 is another document
    [1] * 20 + [0] * 3 + [1] * 2 + [0] * 1 + [2] * 8 + [0] * 3,
  ]
)


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def small_blocks(monkeypatch):
  """Several chunks in a block and several blocks in a short row."""
  monkeypatch.setattr(op, 'BORDER', 0)
  monkeypatch.setattr(op, 'BLOCK', {'cpu': 2 * 4 * B * HV * max(K, V)})


def inputs(length, dtype=np.float64, seed=0, value_width=V):
  """q, k, v and gates of every variant; decays from 0 to a few nats a token."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal((B, length, *shape))
  k = normal(HK, K)
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  arrays = dict(
    q=normal(HK, K),
    k=k,
    v=normal(HV, value_width),
    g=-np.exp(normal(HV, K)),
    g_head=-np.exp(normal(HV)),
    gate_k=1 / (1 + np.exp(-normal(HV, K))),
    gate_v=1 / (1 + np.exp(-normal(HV, value_width))),
    beta=2 / (1 + np.exp(-normal(HV))),
    state=rng.standard_normal((B, HV, K, value_width)),
  )
  return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}


# variant -> (the op, its arguments after q, k, v)
VARIANTS = {
  'fg2': (op.fg2_gdn, ('g', 'gate_k')),
  'fg2_plus': (op.fg2_gdn, ('g', 'gate_k', 'gate_v')),
  'kda': (op.kda, ('g', 'beta')),
  'gdn': (op.gdn, ('g_head', 'beta')),
  'gdn2': (op.gdn2, ('g', 'gate_k', 'gate_v')),
}
STEPS = {
  'fg2': op.fg2_gdn_step,
  'fg2_plus': op.fg2_gdn_step,
  'kda': op.kda_step,
  'gdn': op.kda_step,
  'gdn2': op.gdn2_step,
}


def apply(variant, arrays, segment_ids=None, **options):
  function, names = VARIANTS[variant]
  given = (arrays[name] for name in ('q', 'k', 'v', *names))
  return function(*given, initial_state=arrays['state'], segment_ids=segment_ids, **options)


def call(variant, arrays, segment_ids=None, **options):
  """(o, final state) of a variant, compiled as a whole."""
  whole = lambda arrays, ids: apply(variant, arrays, ids, **options)
  return jax.jit(whole, compiler_options=OPTIONS)(arrays, segment_ids)


def width(variant):
  return K if variant == 'fg2' else V


def value_and_gradients(variant, arrays, **options):
  """Output, final state and the gradients of a random reading of both."""
  names = ('q', 'k', 'v', *VARIANTS[variant][1], 'state')
  rng = np.random.default_rng(1)

  def loss(given):
    o, state = apply(variant, arrays | given, **options)
    weights = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in (o, state)]
    return sum(jnp.sum(w * x) for w, x in zip(weights, (o, state))), (o, state)

  gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=OPTIONS)
  (_, values), gradients = gradient({name: arrays[name] for name in names})
  return dict(zip(('o', 'final_state'), values)) | {
    f'gradient of {name}': x for name, x in gradients.items()
  }


def assert_close(actual, expected, tolerance, zero=0.0):
  """Largest difference over largest expected magnitude, array by array."""
  for name in expected:
    x, y = (np.asarray(z[name], np.float64) for z in (actual, expected))
    assert np.isfinite(x).all(), name
    assert np.abs(x - y).max() <= tolerance * np.abs(y).max() + zero, (
      name,
      np.abs(x - y).max() / np.abs(y).max(),
    )


def explicit(variant, arrays, scale):
  """In numpy: S_t = (I - a b^T) Diag(exp g) S_{t-1} + a x^T, o_t = scale S_t^T q_t."""
  x = {name: np.asarray(y, np.float64) for name, y in arrays.items()}
  o, states = np.zeros(x['v'].shape), x['state'].copy()
  for row in range(B):
    for h in range(HV):
      for t in range(x['q'].shape[1]):
        q, k = x['q'][row, t, h // (HV // HK)], x['k'][row, t, h // (HV // HK)]
        v, at = x['v'][row, t, h], (row, t, h)
        decay = np.exp(x['g_head'][at] * np.ones(K) if variant == 'gdn' else x['g'][at])
        if variant == 'fg2':
          a, b, write = x['gate_k'][at] * k, x['gate_k'][at] * k, x['gate_k'][at] * v
        elif variant == 'fg2_plus':
          a, b, write = x['gate_k'][at] * k, x['gate_k'][at] * k, x['gate_v'][at] * v
        elif variant == 'gdn2':
          a, b, write = k, x['gate_k'][at] * k, x['gate_v'][at] * v
        else:
          a, b, write = k, x['beta'][at] * k, x['beta'][at] * v
        step = (np.eye(K) - np.outer(a, b)) @ np.diag(decay)
        states[row, h] = step @ states[row, h] + np.outer(a, write)
        o[row, t, h] = scale * q @ states[row, h]
  return {'o': o, 'final_state': states}


@pytest.mark.parametrize('variant', VARIANTS)
def test_reference_is_the_recurrence(x64, variant):
  arrays = inputs(11, value_width=width(variant))
  o, state = call(variant, arrays, scale=0.3, implementation='reference')
  assert_close({'o': o, 'final_state': state}, explicit(variant, arrays, 0.3), 1e-14)


@pytest.mark.parametrize('variant', VARIANTS)
def test_chunked_equals_reference_in_values_and_every_gradient(x64, small_blocks, variant):
  arrays = inputs(37, value_width=width(variant))
  expected = value_and_gradients(variant, arrays, segment_ids=SEGMENTS, implementation='reference')
  actual = value_and_gradients(
    variant, arrays, segment_ids=SEGMENTS, implementation='chunked', chunk_size=4
  )
  assert_close(actual, expected, 1e-13)


@pytest.mark.parametrize('length', [1, 2, 5, 16, 33])
def test_any_length(x64, length):
  arrays = inputs(length)
  o, state = call('fg2_plus', arrays, implementation='reference')
  fast, fast_state = call('fg2_plus', arrays, implementation='chunked')
  assert_close({'o': fast, 'final_state': fast_state}, {'o': o, 'final_state': state}, 1e-13)


def test_chunk_sizes_and_float32(x64):
  arrays = inputs(70)
  expected = call('fg2_plus', arrays, implementation='reference')
  for chunk in (2, 16, 64):
    for dtype, tolerance in ((jnp.float64, 1e-13), (jnp.float32, 2e-6)):
      o, state = call(
        'fg2_plus', {name: x.astype(dtype) for name, x in arrays.items()}, chunk_size=chunk
      )
      assert (o.dtype, state.dtype) == (dtype, dtype)
      assert_close({'o': o, 'state': state}, dict(zip(('o', 'state'), expected)), tolerance)


def test_two_calls_with_a_carried_state_are_one(x64):
  arrays = inputs(37)
  cut = lambda a, b: {name: x if name == 'state' else x[:, a:b] for name, x in arrays.items()}
  whole = call('fg2_plus', arrays, SEGMENTS)
  first, state = call(
    'fg2_plus', cut(0, 29), SEGMENTS[:, :29]
  )  # 29 is inside a segment of both rows
  second, state = call('fg2_plus', cut(29, 37) | {'state': state}, SEGMENTS[:, 29:])
  assert_close(
    {'o': jnp.concatenate([first, second], 1), 'state': state},
    dict(zip(('o', 'state'), whole)),
    1e-13,
  )


@pytest.mark.parametrize('variant', VARIANTS)
def test_steps_are_the_whole(x64, variant):
  arrays = inputs(9, value_width=width(variant))
  whole, final = call(variant, arrays)
  state, outputs = arrays['state'], []
  for t in range(9):
    given = [arrays[name][:, t] for name in ('q', 'k', 'v', *VARIANTS[variant][1])]
    given += [None] if variant == 'fg2' else []
    o, state = STEPS[variant](*given, state)
    outputs.append(o)
  assert_close({'o': jnp.stack(outputs, 1), 'state': state}, {'o': whole, 'state': final}, 1e-13)


def test_packed_documents_are_separate_ones(x64, small_blocks):
  """Row 0: padding, a document going on from the state, one token, one with padding, one more."""
  arrays = inputs(37)
  pieces = [range(3, 12), [12], [*range(13, 25), *range(27, 33)], range(33, 37)]
  o, state = call('fg2_plus', arrays, SEGMENTS, chunk_size=4)
  for i, piece in enumerate(pieces):
    alone = {name: x if name == 'state' else x[:, np.array(piece)] for name, x in arrays.items()}
    if i > 0:
      alone['state'] = jnp.zeros_like(alone['state'])
    alone_o, alone_state = call('fg2_plus', alone, implementation='reference')
    assert_close({'o': o[0, np.array(piece)]}, {'o': alone_o[0]}, 1e-13)
  assert_close({'state': state[0]}, {'state': alone_state[0]}, 1e-13)
  np.testing.assert_array_equal(o[SEGMENTS == 0], 0)


@pytest.mark.parametrize('implementation', ['reference', 'chunked'])
def test_padding_neither_gives_nor_takes(implementation):
  arrays = inputs(37, np.float32)
  padding = SEGMENTS == 0
  other = {
    name: x if name == 'state' else jnp.where(padding.reshape(B, 37, *[1] * (x.ndim - 2)), 3.0, x)
    for name, x in arrays.items()
  }
  run = functools.partial(
    value_and_gradients, 'fg2_plus', implementation=implementation, chunk_size=4
  )
  expected = run(arrays, segment_ids=SEGMENTS)
  for name, x in run(other, segment_ids=SEGMENTS).items():
    np.testing.assert_array_equal(
      x, expected[name], err_msg=f'{name} depends on what padding holds'
    )
    if 'state' not in name:
      np.testing.assert_array_equal(x[padding], 0, err_msg=name)
  _, state = call(
    'fg2_plus', arrays, np.zeros((B, 37), int), implementation=implementation, chunk_size=4
  )
  np.testing.assert_array_equal(state, arrays['state'])


def test_the_initial_state_belongs_to_the_first_segment_only(x64):
  arrays = inputs(37)
  other = arrays | {'state': arrays['state'] + 1}
  o, state = call('fg2_plus', arrays, SEGMENTS)
  o_other, state_other = call('fg2_plus', other, SEGMENTS)
  np.testing.assert_array_equal(o[0, 12:], o_other[0, 12:])
  np.testing.assert_array_equal(state, state_other)
  assert (o[0, 3:12] != o_other[0, 3:12]).any(axis=-1).all()


@pytest.mark.parametrize('variant', ['fg2_plus', 'gdn'])
def test_float32_is_accurate_at_any_decay(x64, variant):
  """-50 a token beside almost none: quotients overflow, and differences of sums lose digits."""
  arrays = inputs(48)
  strong = np.random.default_rng(5).random(arrays['g'].shape) < 0.5
  arrays['g'] = jnp.where(strong, -50.0, arrays['g'] * 1e-2)
  arrays['g_head'] = jnp.where(strong[..., 0], -50.0, arrays['g_head'] * 1e-2)
  expected = value_and_gradients(variant, arrays, implementation='reference')
  actual = value_and_gradients(
    variant, {name: x.astype(jnp.float32) for name, x in arrays.items()}, implementation='chunked'
  )
  assert_close(actual, expected, 3e-6)


def test_gradients_of_decays_that_forget_everything_are_tiny_not_noise():
  """The gradient of g is a few times exp(-50); a sum of cancelling terms would leave 1e-7."""
  arrays = inputs(20, np.float32)
  arrays['g'] = jnp.full_like(arrays['g'], -50.0)
  actual = value_and_gradients('fg2_plus', arrays, implementation='chunked')
  expected = value_and_gradients('fg2_plus', arrays, implementation='reference')
  assert 0 < np.abs(expected['gradient of g']).max() < 1e-19
  assert_close(actual, expected, 3e-6)


@pytest.mark.parametrize('gate', [1.0, np.sqrt(2.0)])
def test_equal_keys_do_not_blow_up(x64, gate):
  """A repeated token without decay: the powers of L grow like binomials, its resolvent does not."""
  arrays = inputs(64)
  arrays |= {
    'k': jnp.broadcast_to(arrays['k'][:, :1], arrays['k'].shape),
    'g': jnp.zeros_like(arrays['g']),
  }
  arrays['gate_k'] = jnp.full_like(arrays['gate_k'], gate)
  expected = call('fg2_plus', arrays, implementation='reference')
  single = {name: x.astype(jnp.float32) for name, x in arrays.items()}
  for chunk in (16, 64):
    actual = call('fg2_plus', single, implementation='chunked', chunk_size=chunk)
    assert_close(dict(zip('os', actual)), dict(zip('os', expected)), 2e-5)


def test_gates_of_zero_only_decay_and_gates_of_one_store_and_recall():
  arrays = inputs(6, np.float32)
  zero = {name: jnp.zeros_like(arrays[name]) for name in ('gate_k', 'gate_v')}
  _, state = call('fg2_plus', arrays | zero)
  np.testing.assert_allclose(
    state, jnp.exp(arrays['g'].sum(1))[..., None] * arrays['state'], rtol=1e-5
  )

  one = {name: jnp.ones_like(arrays[name]) for name in ('gate_k', 'gate_v')}
  keys = jnp.broadcast_to(jnp.eye(6, K)[None, :, None], arrays['k'].shape)
  o, state = call(
    'fg2_plus', arrays | one | {'k': keys, 'q': keys, 'g': jnp.zeros_like(arrays['g'])}, scale=1.0
  )
  np.testing.assert_allclose(o, arrays['v'], atol=1e-6)
  np.testing.assert_allclose(state[:, :, :6], jnp.moveaxis(arrays['v'], 1, 2), atol=1e-6)
  np.testing.assert_allclose(state[:, :, 6:], arrays['state'][:, :, 6:], atol=1e-6)


def test_the_variants_are_each_other_s_special_cases(x64):
  """By the definition, which the fast forms equal; with one gate per head by the fast form, too."""
  arrays = inputs(21, value_width=K)
  root = jnp.sqrt(arrays['beta'])
  wide = lambda x: jnp.broadcast_to(x[..., None], (*x.shape, K))
  pair = lambda x: dict(zip('os', x))
  run = functools.partial(call, implementation='reference')
  kda = pair(run('kda', arrays))
  fast = functools.partial(call, chunk_size=4)
  for by, gate in ((fast, root), (run, wide(root))):
    assert_close(pair(by('fg2_plus', arrays | {'gate_k': gate, 'gate_v': gate})), kda, 1e-14)
    assert_close(pair(by('fg2', arrays | {'gate_k': gate})), kda, 1e-14)
  beta = wide(arrays['beta'])
  assert_close(pair(run('gdn2', arrays | {'gate_k': beta, 'gate_v': beta})), kda, 1e-14)
  assert_close(
    pair(run('gdn', arrays)), pair(run('kda', arrays | {'g': wide(arrays['g_head'])})), 1e-14
  )
  assert_close(
    pair(run('fg2_plus', arrays | {'gate_v': arrays['gate_k']})), pair(run('fg2', arrays)), 1e-14
  )
  repeat = lambda x: jnp.repeat(x, HV // HK, axis=2)
  scaled = {
    'q': repeat(arrays['q']),
    'k': arrays['gate_k'] * repeat(arrays['k']),
    'v': arrays['gate_v'] * arrays['v'],
  }
  assert_close(
    pair(run('kda', arrays | scaled | {'beta': jnp.ones_like(arrays['beta'])})),
    pair(run('fg2_plus', arrays)),
    1e-14,
  )


def test_bfloat16_inputs_are_computed_in_float32():
  arrays = {
    name: x if name == 'state' else x.astype(jnp.bfloat16)
    for name, x in inputs(40, np.float32).items()
  }
  o, state = call('fg2_plus', arrays)
  exact_o, exact_state = call(
    'fg2_plus', {name: x.astype(jnp.float32) for name, x in arrays.items()}
  )
  assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_array_equal(state, exact_state)
  np.testing.assert_array_equal(o, exact_o.astype(jnp.bfloat16))
  gradients = value_and_gradients('fg2_plus', arrays)
  assert (
    gradients['gradient of g'].dtype == jnp.bfloat16
    and gradients['gradient of state'].dtype == jnp.float32
  )
  expected = value_and_gradients('fg2_plus', arrays, implementation='reference')
  assert_close(gradients, expected, 2**-8)


def test_time_split_over_devices_is_one_device(x64):
  """Four devices of ten tokens: documents that end on a border, cross one, and skip a device."""
  arrays = inputs(40)
  segments = np.array(
    [[0] * 3 + [1] * 7 + [2] * 12 + [3] * 18, [1] * 8 + [0] * 15 + [1] * 9 + [4] * 8]
  )
  names = ('q', 'k', 'v', 'g', 'gate_k', 'gate_v')
  mesh = jax.make_mesh(
    (4,), ('time',), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,)
  )
  over, whole = jax.sharding.PartitionSpec(None, 'time'), jax.sharding.PartitionSpec()
  options = dict(implementation='chunked', chunk_size=4)

  def split(given, ids):
    rule = lambda state, ids, *x: op.fg2_gdn(
      *x, initial_state=state, segment_ids=ids, time_axis='time', **options
    )
    mapped = jax.shard_map(
      rule, mesh=mesh, in_specs=(whole, *[over] * 7), out_specs=(over, whole), check_vma=False
    )
    return mapped(given['state'], ids, *(given[name] for name in names))

  def together(given, ids):
    return apply('fg2_plus', given, ids, **options)

  def everything(function):
    def loss(given):
      result = function(given, segments)
      rng = np.random.default_rng(1)
      return sum(jnp.sum(x * rng.standard_normal(x.shape)) for x in result), result

    given = {name: arrays[name] for name in (*names, 'state')}
    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=OPTIONS)
    (_, result), gradients = step(given)
    return dict(zip('os', result)) | {f'gradient of {name}': x for name, x in gradients.items()}

  assert_close(everything(split), everything(together), 1e-12)


def test_a_step_is_a_contraction():
  """The one-step matrix, read off by stepping a state of unit vectors, for gates up to sqrt(2)."""
  arrays = inputs(50, np.float32, value_width=K)
  unit = jnp.broadcast_to(jnp.eye(K), (B, HV, K, K))
  matrices = [
    op.fg2_gdn_step(
      *(arrays[name][:, t] for name in ('q', 'k')),
      0 * arrays['v'][:, t],
      1e-2 * arrays['g'][:, t],
      2**0.5 * arrays['gate_k'][:, t],
      arrays['gate_v'][:, t],
      unit,
    )[1]
    for t in range(50)
  ]
  largest = np.linalg.norm(np.stack(matrices), ord=2, axis=(-2, -1)).max()
  assert 0.99 < largest <= 1 + 1e-6


def test_nothing_depends_on_later_tokens():
  arrays = inputs(30, np.float32)
  later = {
    name: x if name == 'state' else x.at[:, 17:].set(x[:, 17:] * 0.5 - 0.1)
    for name, x in arrays.items()
  }
  np.testing.assert_array_equal(
    call('fg2_plus', arrays)[0][:, :17], call('fg2_plus', later)[0][:, :17]
  )
  loss = lambda arrays: jnp.sum(apply('fg2_plus', arrays)[0][:, :17])
  gradients = jax.jit(jax.grad(loss), compiler_options=OPTIONS)(arrays)
  for name in ('q', 'k', 'v', 'g', 'gate_k', 'gate_v'):
    np.testing.assert_array_equal(gradients[name][:, 17:], 0)
    assert (gradients[name][:, :17] != 0).any()


def shapes_of(jaxpr):
  """Shapes of all values of a jaxpr, those of inner jaxprs included."""
  for equation in jaxpr.eqns:
    yield from (x.aval.shape for x in equation.outvars)
    for inner in jax.tree.leaves(list(equation.params.values())):
      if hasattr(inner, 'eqns') or hasattr(inner, 'jaxpr'):
        yield from shapes_of(getattr(inner, 'jaxpr', inner))


def test_the_backward_pass_holds_no_pairwise_channels_no_state_per_token_and_little_from_before():
  length, chunk, heads, size = 2048, 16, 4, 32
  x = jax.ShapeDtypeStruct((1, length, heads, size), jnp.float32)

  def loss(*arrays):
    return jnp.sum(op.fg2_gdn(*arrays, chunk_size=chunk, implementation='chunked')[0])

  whole = length * heads * size
  largest = max(
    np.prod(shape) for shape in shapes_of(jax.make_jaxpr(jax.grad(loss, range(6)))(*[x] * 6).jaxpr)
  )
  assert (
    largest == whole
  )  # a state per chunk would be 2 times as much, [C, C, K] of every chunk 16 times
  _, backward = jax.eval_shape(lambda *arrays: jax.vjp(loss, *arrays), *[x] * 6)
  saved = sum(np.prod(y.shape) for y in jax.tree.leaves(backward))
  borders = length // 512 * heads * size * size
  assert saved <= 6 * whole + 2 * borders


def test_memory_is_linear_in_the_tokens():
  def temporaries(length):
    x = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
    gradient = jax.grad(lambda *arrays: jnp.sum(op.fg2_gdn(*arrays)[0] ** 2), range(6))
    return jax.jit(gradient).lower(*[x] * 6).compile(OPTIONS).memory_analysis().temp_size_in_bytes

  assert temporaries(8192) <= 4.1 * temporaries(2048)


def test_what_does_not_fit_is_named():
  x = inputs(5, np.float32)
  for message, changed, options in (
    ('q has shape', {'q': x['q'][:, :4]}, {}),
    ('k has shape', {'k': x['k'][0]}, {}),
    ('rows and tokens differ', {'v': x['v'][:, :4]}, {}),
    ('not a multiple of the 2 heads', {'v': x['v'][:, :, :3]}, {}),
    ('g has shape', {'g': x['g'][..., :3]}, {}),
    ('gate_k has shape', {'gate_k': x['gate_v']}, {}),
    ('gate_v has shape', {'gate_v': x['gate_k']}, {}),
    ('q has dtype int32', {'q': x['q'].astype(jnp.int32)}, {}),
    ('initial_state has shape', {'state': x['state'][:1]}, {}),
    ('segment_ids has shape', {}, {'segment_ids': np.ones((B, 4), int)}),
    ('chunk_size is 12', {}, {'chunk_size': 12}),
    ("implementation is 'fast'", {}, {'implementation': 'fast'}),
  ):
    with pytest.raises(ValueError, match=message):
      call('fg2_plus', x | changed, **options)
  for message, variant in (('ties it to gate_k', 'fg2'),):
    with pytest.raises(ValueError, match=message):
      call(variant, x)
  with pytest.raises(ValueError, match='g has shape'):
    op.gdn(x['q'], x['k'], x['v'], x['g'], x['beta'])
  with pytest.raises(ValueError, match='beta has shape'):
    op.kda(x['q'], x['k'], x['v'], x['g'], x['gate_k'])
  with pytest.raises(ValueError, match='state has shape'):
    op.kda_step(
      x['q'][:, 0], x['k'][:, 0], x['v'][:, 0], x['g'][:, 0], x['beta'][:, 0], x['state'][:, :2]
    )


def test_values_are_checked_in_debug_mode():
  x = inputs(5, np.float32)
  plus = lambda x: op.fg2_gdn(
    *(x[name] for name in ('q', 'k', 'v', 'g', 'gate_k', 'gate_v')), implementation='reference'
  )
  plus(x | {'gate_k': 3 * x['gate_k']})  # not checked otherwise
  jax.config.update('jax_enable_checks', True)
  try:
    plus(x)
    for name, value in (('g', 0.5), ('gate_k', 1.5), ('gate_v', -0.1), ('g', np.nan)):
      with pytest.raises(ValueError, match=f'{name} has values'):
        plus(x | {name: x[name].at[0, 3, 1, 2].set(value)})
    with pytest.raises(ValueError, match='beta has values'):
      op.kda(
        x['q'], x['k'], x['v'], x['g'], x['beta'].at[0, 1, 2].set(2.1), implementation='reference'
      )
    with pytest.raises(
      Exception, match='g has values'
    ):  # inside jit: jax's own error, with ours in it
      jax.block_until_ready(jax.jit(plus)(x | {'g': -x['g']}))
      jax.effects_barrier()
  finally:
    jax.config.update('jax_enable_checks', False)
