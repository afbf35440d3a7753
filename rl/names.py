"""Looking things up by the names a config gives them. Reward workers import it: no jax here."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def unknown(what: str, name: str, known: Iterable[str]) -> str:
  """An error message: what was asked for, what comes near, what there is."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=1)
  hint = f'; did you mean {near[0]!r}?' if near else ''
  return f'unknown {what} {name!r}{hint} (known: {", ".join(known)})'


def choose(table: Mapping[str, Any], name: str, what: str) -> Any:
  """table[name], or a ValueError that names what comes near."""
  if name not in table:
    raise ValueError(unknown(what, name, table))
  return table[name]
