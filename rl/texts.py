"""Texts a pass may read instead of the row. The driver encodes strings, never ids."""

from rl.types import Record, Texts


def prompts(record: Record) -> list[list[int]]:
  """Token ids of every row before its response."""
  return [tokens[:start].tolist() for tokens, start in zip(record.rows.tokens, record.rows.start)]


def responses(record: Record) -> list[list[int]]:
  """Token ids of every row's response."""
  rows = zip(record.rows.tokens, record.rows.start, record.rows.end)
  return [tokens[start:end].tolist() for tokens, start, end in rows]


def plain(record: Record) -> Texts:
  """The row as it is: a pass under it equals the pass without a context."""
  return Texts(tuple((ids,) for ids in prompts(record)))


TEXTS = {'plain': plain}
