"""Low-rank adapters (arXiv:2106.09685): a trained model stays, w + scale * a b is what layers see.

Adapters are a part of the parameters like any other, `lora` at the top, nested like the rest: for a
matrix 'blocks/0/mixer/q' there are 'lora/blocks/0/mixer/q/a' and 'lora/blocks/0/mixer/q/b'. So all
that is derived from the table knows them, and a checkpoint without them is the model's.

I inputs and O outputs of a matrix, of any number of axes, R rank. Leading axes are layers and
experts, each of which has its own two.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Callable

import jax

from nn import param
from nn.config import LoRA
from nn.linear import Adapted
from nn.param import Spec, Tree

LEAD = ('layers', 'expert')
LAYERS = ('head/', 'blocks/', 'tail/', 'mtp/')


def specs(table: Tree, cfg: LoRA) -> Tree:
  """The table with adapters, and nothing else to train; the table itself where cfg.rank is 0.

  Heads of multi-token prediction have adapters like any layer, for their projection, too; what they
  know they must have learnt before.

  a is drawn as in PEFT (Kaiming's uniform law with slope sqrt(5)): evenly within 1 / sqrt(inputs).
  b is 0, so that training begins with the model as it was.

  Raises:
    ValueError: a target that means no matrix of a layer, or one that is smaller than the rank.
  """
  if not cfg.rank:
    return table
  frozen = jax.tree.map(lambda spec: dataclasses.replace(spec, trainable=False), table)
  leaves, adapters = param.flat(table), {}
  for name in targets(table, cfg):
    adapters |= {f'{name}/{part}': s for part, s in _pair(name, leaves[name], cfg.rank).items()}
  return frozen | {'lora': param.unflat(adapters)}


def targets(table: Tree, cfg: LoRA) -> list[str]:
  """Names of the matrices that are adapted, in the order of the table."""
  if not cfg.rank:
    return []
  leaves = param.flat(base(table))
  matrices = [n for n, spec in leaves.items() if n.startswith(LAYERS) and spec.contract]
  for pattern in cfg.targets:
    if not fnmatch.filter(matrices, pattern):
      others = fnmatch.filter(leaves, pattern)
      reason = (f'means {others[0]}, which is no matrix of a layer' if others
                else 'means no parameter')
      raise ValueError(f'model.lora.targets: {pattern!r} {reason}; matrices are '
                       f'{", ".join(matrices)}')
  return [n for n in matrices if any(fnmatch.fnmatchcase(n, p) for p in cfg.targets)]


def _pair(name: str, spec: Spec, rank: int) -> dict[str, Spec]:
  """a [lead, I, R] and b [lead, R, O] of one matrix [lead, I, O]."""
  sizes = dict(zip(spec.axes, spec.shape))
  lead = tuple(axis for axis in spec.axes if axis in LEAD)
  outs = tuple(axis for axis in spec.axes if axis not in (*lead, *spec.contract))
  assert spec.axes == (*lead, *spec.contract, *outs), name
  num_inputs, num_outputs = (
      math.prod(sizes[axis] for axis in axes) for axes in (spec.contract, outs))
  if rank > min(num_inputs, num_outputs):
    raise ValueError(f'model.lora.rank is {rank}, more than {name} can have, a matrix of '
                     f'{num_inputs} x {num_outputs}; lower it, or leave the matrix out of '
                     'model.lora.targets')
  sizes['adapter'], bound = rank, num_inputs ** -0.5

  def uniform(key, shape):
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

  def one(axes, init, contract):
    return Spec(tuple(sizes[axis] for axis in axes), axes, init, contract)

  return {'a': one((*lead, *spec.contract, 'adapter'), uniform, spec.contract),
          'b': one((*lead, 'adapter', *outs), param.zeros, ('adapter',))}


def base(tree: Tree) -> Tree:
  """A table, or parameters, without the adapters."""
  return {name: part for name, part in tree.items() if name != 'lora'}


def changing(params: Tree) -> Tree:
  """What training changes, as a tree of its own: the adapters; without them all."""
  return {'lora': params['lora']} if 'lora' in params else params


def on_base(weights: Tree, params: Tree) -> Tree:
  """Other weights of the model of params: adapters alone are on the base it has."""
  return base(params) | weights if weights.keys() == {'lora'} else weights


def adapted(params: Tree, cfg: LoRA) -> Tree:
  """Parameters as layers take them: every matrix that has adapters is together with them."""
  if 'lora' not in params:
    return params
  leaves, adapters = param.flat(base(params)), param.flat(params['lora'])
  for name in {name.rpartition('/')[0] for name in adapters}:
    leaves[name] = Adapted(leaves[name], adapters[f'{name}/a'], adapters[f'{name}/b'], cfg.scale)
  return param.unflat(leaves)


def merge(params: Tree, cfg: LoRA) -> Tree:
  """Parameters of the model without adapters that computes the same, to rounding."""
  is_adapted = lambda x: isinstance(x, Adapted)
  return jax.tree.map(
      lambda x: x.merged() if is_adapted(x) else x, adapted(params, cfg), is_leaf=is_adapted)


def merging(
    array: Callable[[str], jax.Array], table: Tree, cfg: LoRA,
) -> Callable[[str], jax.Array]:
  """array(name of a parameter), merged: `merge` one parameter at a time."""
  names = targets(table, cfg)

  def merged(name):
    if name not in names:
      return array(name)
    return Adapted(
        array(name), array(f'lora/{name}/a'), array(f'lora/{name}/b'), cfg.scale).merged()

  return merged
