"""Memory: what was saved comes back, and saving it again gives the same bytes."""

import json

import ml_dtypes
import numpy as np
import pytest

from launch import memory

DTYPES = ['bool', 'int4', 'int8', 'uint8', 'int32', '>i4', 'int64', 'uint64', 'float8_e4m3fn',
          'float16', 'bfloat16', 'float32', 'float64', '>f8', 'complex64', 'U7', 'S3',
          'datetime64[s]']


def example():
  return {
      'grpo': {'seen': np.arange(6, dtype=np.int64).reshape(2, 3), 'rate': 0.1, 'none': None,
               'name': 'naïve \ud800 "x"', 'mean': np.float64(0.3), 'flag': np.bool_(True),
               'half': ml_dtypes.bfloat16(1.5)},
      'reader': {'0': {'next': 2**70, 'epochs': [1, 2, [True, {}]], 'shape': (3, (4, 'a'), [])},
                 '1': [np.zeros((0, 4), np.float32), np.array(7, np.int32), np.arange(9)[::2]]},
      'odd': {3: 'int key', (1, 'b'): -0.0}, 'like a reference': {'$array': 'but is none'},
      'numbers': [float('nan'), float('inf'), -float('inf'), 5e-324, 1, True, False],
  }


def same(a, b):
  """Equal in type, dtype, order and bits."""
  if type(a) is not type(b):
    return False
  if isinstance(a, dict):
    return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
  if isinstance(a, (list, tuple)):
    return len(a) == len(b) and all(map(same, a, b))
  if isinstance(a, (np.ndarray, np.generic)):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
  return repr(a) == repr(b)


def through_files(tree):
  document, arrays = memory.encode(tree)
  return memory.decode(json.loads(json.dumps(document, allow_nan=False)), arrays)


def test_what_was_saved_comes_back():
  assert same(through_files(example()), example())


def test_save_load_save_gives_the_same_bytes():
  document, arrays = memory.encode(example())
  again, arrays_again = memory.encode(through_files(example()))
  assert json.dumps(document) == json.dumps(again)
  raw = lambda arrays: {name: x.tobytes() for name, x in arrays.items()}
  assert raw(arrays) == raw(arrays_again)


@pytest.mark.parametrize('dtype', DTYPES)
def test_every_dtype(dtype):
  raw = np.arange(2 * 3 * np.dtype(dtype).itemsize, dtype=np.uint8) % 2
  x = raw.view(np.dtype(dtype)).reshape(2, 3)
  assert same(through_files({'x': x, 'none': x[:0]}), {'x': x, 'none': x[:0]})


def test_encoding_shares_nothing_with_the_tree():
  tree = {'x': np.arange(4), 'deep': {'y': [1]}}
  document, arrays = memory.encode(tree)
  tree['x'][:], tree['deep']['y'][0] = 9, 9
  assert same(memory.decode(document, arrays), {'x': np.arange(4), 'deep': {'y': [1]}})


def test_decoded_arrays_can_be_written():
  restored = through_files({'x': np.zeros(2)})
  restored['x'][0] = 1


def test_sizes_are_those_of_the_arrays():
  document, arrays = memory.encode(example())
  assert memory.sizes(document) == {name: x.size for name, x in arrays.items()}
  assert sorted(memory.sizes(document).values()) == [1, 2, 4, 8, 40, 48]


@pytest.mark.parametrize('value, what', [
    ({1, 2}, 'set'), (b'bytes', 'bytes'), (1j, 'complex'), (np.array([None]), 'object'),
    (np.zeros(2, [('a', 'i4')]), "'a', '<i4'")])
def test_other_values_are_refused_by_place(value, what):
  with pytest.raises(ValueError, match=f'memory/method/1.*{what}'):
    memory.encode({'method': ['fine', value]})


def test_parts_of_processes_are_united():
  parts = [{'reader': {'0': 1, '2': 3}, 'method': {'x': np.arange(3), 'nan': float('nan')}},
           {'reader': {'1': 2}, 'method': {'x': np.arange(3), 'nan': float('nan')}}]
  assert same(memory.merge(parts), {'reader': {'0': 1, '2': 3, '1': 2},
                                    'method': {'x': np.arange(3), 'nan': float('nan')}})


@pytest.mark.parametrize('a, b', [
    (1, 2), (np.arange(3), np.arange(3.0)), (np.arange(3), np.array([0, 1, 3])), ([1], [1, 2]),
    ({'x': 1}, 1)])
def test_parts_that_disagree_are_refused_by_place(a, b):
  with pytest.raises(ValueError, match='memory/method/x differs'):
    memory.merge([{'method': {'x': a}}, {'method': {'x': b}}])


def test_one_process_gathers_its_own():
  tree = example()
  assert memory.gather(tree) is tree
