"""How public checkpoints name and lay out parameters: one table per family, read both ways.

A public tensor holds the numbers of a parameter, or of a part of one, in another order. A layout
says in which, as a view of the tensor with the parameter's order: import reads through the view,
export writes through it, and nothing is computed. A cell is the part of a parameter that belongs to
one layer, or to one expert of it.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nn import lora, model, param
from nn.config import ModelConfig
from nn.hf.keys import Keys

ALIGNMENT = 64                         # bytes
# Buffers that older checkpoints hold although they follow from the config.
COMPUTED = re.compile(r'.*\.rotary_emb\.inv_freq')

Sizes = Mapping[str, int | str]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One kind of tensor.

  name: {layer}, {expert} and {head} stand for indices.
  path: of the parameter; below that of its layer where the name has {layer}. With {head} it is of
    a head of multi-token prediction, whose {layer} counts on behind the model's last.
  layout: factors of the tensor's dimensions, then of the cell's, as
    '(heads head_dim) embed -> embed heads head_dim'. Factors are names of the family's sizes; 1 is
    a dimension of one; gate+up is a dimension with one after the other.
  part: which one, where the tensor has such a dimension.
  of: mixers or FFNs whose layers have the tensor; (): all.
  """
  name: str
  path: str
  layout: str
  part: str = ''
  of: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
  """What one `model_type` of config.json means.

  entries: one per kind of tensor. Those whose parameter a model has not are passed over.
  fused: tensors that may be there in place of entries of the same path; only read, never written.
  copies: tensors that may be there once more for every head of multi-token prediction and have the
    numbers of a parameter of the model's, which is their path.
  heads: how names of the heads' tensors begin; '': the family has none, or is sure to have them
    where config.json says so.
  sizes: of the factors in layouts: numbers, or names of the factors that make one up.
  read: config.json -> fields of ModelConfig. write: the reverse.
  defaults: keys that config.json may leave out, with what its readers then assume.
  """
  model_type: str
  architecture: str
  entries: tuple[Entry, ...]
  sizes: Callable[[ModelConfig], Sizes]
  read: Callable[[Keys], dict[str, Any]]
  write: Callable[[ModelConfig], dict[str, Any]]
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  fused: tuple[Entry, ...] = ()
  copies: tuple[Entry, ...] = ()
  heads: str = ''


class Layout:
  """An entry's layout with sizes.

  theirs, ours: shapes of the tensor and of the cell.
  """

  def __init__(self, entry: Entry, sizes: Sizes):
    def atoms(name: str) -> list[str]:
      made_of = sizes[name] if name != '1' else 1
      return [a for n in made_of.split() for a in atoms(n)] if isinstance(made_of, str) else [name]

    def size(name: str) -> int:
      return math.prod(sizes[a] if a != '1' else 1 for a in atoms(name))

    theirs, ours = (_dimensions(side) for side in entry.layout.split('->'))
    self._joint, self._cut, self._apart, names = [], None, [], []
    for factor in (f for dimension in theirs for f in dimension):
      parts = factor.split('+')
      if len(parts) > 1:
        assert entry.part in parts, entry
        begin = sum(size(p) for p in parts[:parts.index(entry.part)])
        self._cut = len(self._joint), begin, begin + size(entry.part)
      self._joint.append(sum(map(size, parts)))
      for a in atoms(entry.part if len(parts) > 1 else factor):
        self._apart.append(size(a))
        names.append(a)
    wanted = [a for dimension in ours for f in dimension for a in atoms(f)]
    kept = [n for n in names if n != '1']
    assert sorted(kept) == sorted(wanted) and len(set(kept)) == len(kept), entry
    ones = [i for i, n in enumerate(names) if n == '1']
    self._order = [names.index(a) for a in wanted] + ones
    self._ones = len(ones)
    total = lambda dimension: math.prod(
        sum(size(p) for p in factor.split('+')) for factor in dimension)
    self.theirs, self.ours = tuple(map(total, theirs)), tuple(map(total, ours))

  def view(self, tensor: np.ndarray) -> np.ndarray:
    """The tensor's numbers in the order of the cell, every factor a dimension; never a copy."""
    x = np.reshape(tensor, self._joint, copy=False)
    if self._cut:
      axis, begin, end = self._cut
      x = x[(slice(None),) * axis + (slice(begin, end),)]
    x = np.reshape(x, self._apart, copy=False).transpose(self._order)
    return x[(..., *(0,) * self._ones)]


class Piece(NamedTuple):
  """A cell and the tensor it is in."""
  tensor: str
  path: str                            # of the parameter
  lead: tuple[int, ...]                # which repeat, which expert: the parameter's first indices
  layout: Layout


def pieces(family: Family, cfg: ModelConfig) -> list[Piece]:
  """All cells of a model without adapters, in the order of its layers, as the family writes them.

  Raises:
    ValueError: the family has no tensor for some parameter.
  """
  specs = param.flat(lora.base(model.specs(cfg)))
  found = _pieces(family.entries, family, cfg, specs)
  cells = Counter((p.path, p.lead) for p in found)
  assert max(cells.values()) == 1, cells.most_common(1)
  held = Counter()
  for p in found:
    held[p.path] += math.prod(p.layout.ours)
  if lacking := [path for path, s in specs.items() if held[path] != math.prod(s.shape)]:
    raise ValueError(f'a model of type {family.model_type} has no tensor for {_some(lacking)}')
  return found


def plan(
    family: Family, cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, list[Piece]]:
  """Where every parameter of a model is found among tensors.

  Args:
    shapes: of the tensors that are there, by name.

  Returns:
    {path of the parameter: its pieces}.

  Raises:
    ValueError: names tensors that are missing, not wanted, or of another shape.
  """
  plain, chosen = pieces(family, cfg), []
  fused = {}
  for p in _pieces(family.fused, family, cfg, param.flat(lora.base(model.specs(cfg)))):
    if p.tensor in shapes:
      fused[p.path, p.lead] = p
  for p in plain:
    instead = next((fused[p.path, p.lead[:n]] for n in range(len(p.lead) + 1)
                    if (p.path, p.lead[:n]) in fused), None)
    chosen.append(p if p.tensor in shapes or instead is None else instead)
  wanted = {p.tensor: p.layout.theirs for p in chosen}
  known = wanted | {p.tensor: p.layout.theirs for p in copies(family, cfg)}
  extra = [name for name in shapes if name not in known and not COMPUTED.fullmatch(name)]
  faults = [f'{name} is missing' for name in wanted if name not in shapes]
  faults += [f'{name} has shape {tuple(shapes[name])}, wanted {shape}'
             for name, shape in known.items() if name in shapes and tuple(shapes[name]) != shape]
  faults += [f'{name} has no place in the model' for name in sorted(extra)]
  if faults:
    raise ValueError(
        f'the tensors do not make a model of type {family.model_type}: {_some(faults)}')
  result = {}
  for p in dict.fromkeys(chosen):
    result.setdefault(p.path, []).append(p)
  return result


def copies(family: Family, cfg: ModelConfig) -> list[Piece]:
  """Tensors that repeat a parameter for heads of multi-token prediction, each a whole one."""
  specs, sizes = param.flat(lora.base(model.specs(cfg))), family.sizes(cfg)
  return [Piece(e.name.format(layer=len(cfg.layers) + head), e.path, (), Layout(e, sizes))
          for head in range(cfg.mtp.depth) for e in family.copies if e.path in specs]


def of_heads(family: Family, cfg: ModelConfig) -> tuple[str, ...]:
  """Patterns of all names that tensors of the model's heads have; (): see Family.heads."""
  return tuple(dict.fromkeys(
      family.heads.format(layer=len(cfg.layers) + head) + '*'
      for head in range(cfg.mtp.depth) if family.heads))


def read(
    some: Sequence[Piece], shape: tuple[int, ...], index: tuple[slice, ...],
    fetch: Callable[[str], np.ndarray], dtype: np.dtype,
) -> np.ndarray:
  """The block of one parameter that a device holds.

  Args:
    some: the parameter's pieces.
    shape: of the whole parameter.
    index: of the block.
    fetch: a tensor by its name, not necessarily in memory: only what the block needs is touched.
  """
  ranges = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
  block = _aligned([len(r) for r in ranges], np.dtype(dtype))
  for p in some:
    if all(i in r for i, r in zip(p.lead, ranges)):
      cell = p.layout.view(fetch(p.tensor)).reshape(p.layout.ours)
      here = tuple(i - r.start for i, r in zip(p.lead, ranges))
      block[here] = cell[tuple(slice(r.start, r.stop) for r in ranges[len(p.lead):])]
  return block


def write(piece: Piece, cell: np.ndarray, tensor: np.ndarray) -> None:
  """Puts a cell into its tensor, rounded to the tensor's dtype."""
  view = piece.layout.view(tensor)
  view[...] = cell.reshape(view.shape)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """An empty array at an address that a CPU device takes over without a copy."""
  size = math.prod(shape) * dtype.itemsize
  room = np.empty(size + ALIGNMENT, np.uint8)
  begin = -room.ctypes.data % ALIGNMENT
  return room[begin:begin + size].view(dtype).reshape(shape)


def _dimensions(side: str) -> list[list[str]]:
  """'(a b) c' -> [[a, b], [c]]."""
  return [text.strip('()').split() for text in re.findall(r'\([^)]*\)|\S+', side)]


def _pieces(
    entries: Sequence[Entry], family: Family, cfg: ModelConfig, specs: Mapping[str, param.Spec],
) -> list[Piece]:
  sizes, layouts, found = family.sizes(cfg), {}, []

  def add(entry, path, lead=(), layer='', head=''):
    if path not in specs:
      return
    if entry not in layouts:
      layouts[entry] = Layout(entry, sizes)
    layout, whole = layouts[entry], specs[path].shape
    experts = range(whole[len(lead)]) if '{expert}' in entry.name else ('',)
    for e in experts:
      at = lead + ((e,) if '{expert}' in entry.name else ())
      assert whole[len(at):] == layout.ours, (entry, whole, layout.ours)
      found.append(Piece(entry.name.format(layer=layer, expert=e, head=head), path, at, layout))

  has = lambda names, entry: not entry.of or set(names) & set(entry.of)
  heads = [e for e in entries if '{head}' in e.path]
  layered = [e for e in entries if '{layer}' in e.name and e not in heads]
  for entry in entries:
    if entry not in heads and entry not in layered:
      add(entry, entry.path)
  for i, (names, (place, lead)) in enumerate(zip(cfg.layers, model.places(cfg), strict=True)):
    for entry in layered:
      if has(names, entry):
        add(entry, f'{place}/{entry.path}', lead, i)
  for head in range(cfg.mtp.depth):
    for entry in heads:
      if has(cfg.mtp_layer, entry):
        add(entry, entry.path.format(head=head), layer=len(cfg.layers) + head, head=head)
  return found


def _some(faults: Sequence[str], most: int = 5) -> str:
  more = f'; and {len(faults) - most} more' if len(faults) > most else ''
  return '; '.join(faults[:most]) + more
