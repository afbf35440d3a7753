"""What a row, a dict, says: text, ids, a problem with its answer, or a conversation."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from data import chat
from data.tokenizer import Tokenizer

FORMATS = ('text', 'tokens', 'problem', 'chat')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """Which fields of a row matter, and how a prompt is made of them."""
  kind: str = 'problem'                # one of FORMATS
  text: str = 'text'
  tokens: str = 'tokens'
  prompt: str = 'prompt'
  response: str = 'response'
  messages: str = 'messages'
  prompt_template: str = '{prompt}'    # {prompt} is the prompt field, any other {name} that field

  def __post_init__(self):
    if self.kind not in FORMATS:
      raise ValueError(f'format is {self.kind!r}, wanted one of {FORMATS}')


def at(rows, index: int, read: Callable[[dict], Any]) -> Any:
  """read(rows[index]); what is wrong with the row is said with its place."""
  try:
    return read(rows[index])
  except ValueError as e:
    raise ValueError(f'{rows.where(index)}: {e}') from e


def string(row: dict, field: str, empty: bool = False) -> str:
  """The text in a field.

  Raises:
    ValueError: the field is missing, not text, or empty where that is not allowed.
  """
  value = _get(row, field)
  if not isinstance(value, str):
    raise ValueError(f'field {field!r} is {type(value).__name__}, wanted text')
  if not value and not empty:
    raise ValueError(f'field {field!r} is empty')
  return value


def ids(row: dict, field: str, vocab_size: int) -> list[int]:
  """The token ids in a field."""
  value = _get(row, field)
  if not isinstance(value, list) or not value or any(type(i) is not int for i in value):
    raise ValueError(f'field {field!r}: wanted a list of token ids')
  if min(value) < 0 or max(value) >= vocab_size:
    raise ValueError(f'field {field!r}: ids from {min(value)} to {max(value)}, '
                     f'the vocabulary has {vocab_size}')
  return value


def begin(tokenizer: Tokenizer) -> list[int]:
  """What a text starts with: the tokenizer's own start, unless it is its end as well."""
  return [] if tokenizer.bos_id in (None, tokenizer.eos_id) else [tokenizer.bos_id]


def prompt(row: dict, form: Format, tokenizer: Tokenizer) -> tuple[str, list[int]]:
  """Text and ids of what the model is asked: of a conversation, all before a closing answer."""
  if form.kind == 'chat':
    messages = _messages(row, form, tokenizer)
    if messages[-1].get('role') == 'assistant':
      messages = messages[:-1]
    return chat.prompt(tokenizer, messages, row.get('tools'))
  fill = lambda match: string(row, form.prompt if match[1] == 'prompt' else match[1])
  text = re.sub(r'\{(\w+)\}', fill, form.prompt_template)
  return text, begin(tokenizer) + tokenizer.encode(text)


def example(row: dict, form: Format, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
  """Ids of a whole row, and a mask that is 1 on what is to be learnt.

  Everything of texts and ids; of the others the response with its end.
  """
  if form.kind == 'text':
    found = begin(tokenizer) + tokenizer.encode(string(row, form.text)) + [tokenizer.eos_id]
    return found, [1] * len(found)
  if form.kind == 'tokens':
    found = ids(row, form.tokens, tokenizer.vocab_size)
    return found, [1] * len(found)
  if form.kind == 'chat':
    return chat.encode(tokenizer, _messages(row, form, tokenizer), row.get('tools'))
  _, asked = prompt(row, form, tokenizer)
  answered = tokenizer.encode_after(string(row, form.response)) + [tokenizer.eos_id]
  return asked + answered, [0] * len(asked) + [1] * len(answered)


def _messages(row: dict, form: Format, tokenizer: Tokenizer) -> list[dict]:
  messages = _get(row, form.messages)
  is_list = isinstance(messages, list) and messages
  if not is_list or not all(isinstance(m, dict) for m in messages):
    raise ValueError(f"field {form.messages!r}: wanted a list of {{'role', 'content'}}")
  for message in messages:
    if 'tokens' in message:
      ids(message, 'tokens', tokenizer.vocab_size)
  return messages


def _get(row: dict, field: str) -> Any:
  if field not in row:
    raise ValueError(f'field {field!r} is missing; the row has {sorted(row)}')
  return row[field]
