"""From a row of an evaluation file to what the model reads and what it is judged by.

A row is a dict, `names` says which of its fields to use. What is wrong with a row is a ValueError;
who reads the file adds the place.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from evals.metrics import LETTERS

ASK = 'Answer with the letter of the right choice.'
WINDOW = 4096          # tokens of a text that are read at once, where the model could read more


@dataclasses.dataclass(frozen=True)
class Codec:
  """Text and ids of one model."""
  prompt: Callable[[str], tuple[str, list[int]]]   # of a question, put as the model is to be asked
  after: Callable[[str], list[int]]                # of text that continues a prompt
  whole: Callable[[str], list[int]]                # of a text of its own
  decode: Callable[[list[int]], str]               # of a response
  room: int                                        # tokens a prompt may have before a response
  max_length: int                                  # tokens the model reads at once


@dataclasses.dataclass(frozen=True)
class Example:
  """inputs: ids given. targets: ids to be scored after them; [] where the model is to answer."""
  inputs: list[int]
  targets: list[int]
  info: dict[str, Any]                             # for the metric and the output; JSON


def problem(row: dict, codec: Codec, names: dict[str, str]) -> list[Example]:
  """A question to be answered, and its answer.

  A prompt that leaves no room for a response is not asked, and counts as answered wrongly.
  """
  answer = _get(row, names['answer'])
  if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
    raise ValueError(f'field {names["answer"]!r} is {answer!r}, wanted text or a number')
  return _asked(_string(row, names['prompt']), str(answer), codec)


def choices(row: dict, codec: Codec, names: dict[str, str]) -> list[Example]:
  """A prompt with each of its choices behind it, to be scored.

  A space is put between the two where neither has white space.
  """
  question, options, answer = _choice(row, names)
  prompt, ids = codec.prompt(question)
  space = '' if prompt[-1:].isspace() else ' '
  found = []
  for i, option in enumerate(options):
    targets = codec.after(option if option[0].isspace() else space + option)
    if len(ids) + len(targets) > codec.max_length:
      raise ValueError(f'the prompt with choice {i} has {len(ids) + len(targets)} tokens, the '
                       f'model reads {codec.max_length}')
    found.append(Example(ids, targets, {
        'prompt': prompt, 'choice': option, 'tokens': len(targets), 'target': answer}))
  return found


def letters(row: dict, codec: Codec, names: dict[str, str]) -> list[Example]:
  """A prompt that lists its choices under letters, to be answered by one."""
  question, options, answer = _choice(row, names)
  if len(options) > len(LETTERS):
    raise ValueError(f'{len(options)} choices, there are {len(LETTERS)} letters')
  listed = '\n'.join(f'{name}. {option}' for name, option in zip(LETTERS, options))
  (example,) = _asked(f'{question}\n{listed}\n{ASK}', LETTERS[answer], codec)
  return [dataclasses.replace(example, info=example.info | {'choices': len(options)})]


def document(row: dict, codec: Codec, names: dict[str, str]) -> list[Example]:
  """A text in windows of what the model reads, at most WINDOW; each but the first token is scored
  once.

  From the second window on, the first half is context: it was scored before.
  """
  text = _string(row, names['text'])
  ids = codec.whole(text)
  if len(ids) < 2:
    raise ValueError('the text is a single token, with nothing to predict it from')
  length, found = min(codec.max_length, WINDOW), []
  done, stop = 1, min(length, len(ids))
  while done < len(ids):
    info = {'tokens': stop - done, 'bytes': 0 if found else len(text.encode())}
    found.append(Example(ids[max(0, stop - length):done], ids[done:stop], info))
    done, stop = stop, min(stop + max(1, length // 2), len(ids))
  return found


# {task: (how a row is read, its fields)}. evals/tasks.py knows how each is judged.
KINDS = {
    'gsm8k': (problem, {'prompt': 'question', 'answer': 'answer'}),
    'math': (problem, {'prompt': 'prompt', 'answer': 'answer'}),
    'exact': (problem, {'prompt': 'prompt', 'answer': 'answer'}),
    'choice': (choices, {'prompt': 'prompt', 'choices': 'choices', 'answer': 'answer'}),
    'choice_letter': (letters, {'prompt': 'prompt', 'choices': 'choices', 'answer': 'answer'}),
    'perplexity': (document, {'text': 'text'}),
}


def _asked(question: str, target: str, codec: Codec) -> list[Example]:
  prompt, ids = codec.prompt(question)
  long = len(ids) > codec.room
  info = {'prompt': prompt, 'target': target, 'too_long': long}
  return [Example([] if long else ids, [], info)]


def _choice(row: dict, names: dict[str, str]) -> tuple[str, list[str], int]:
  """Question, choices and the right one's index."""
  options, answer = _get(row, names['choices']), _get(row, names['answer'])
  if not isinstance(options, list) or len(options) < 2 or not all(
      isinstance(x, str) and x for x in options):
    raise ValueError(f'field {names["choices"]!r}: wanted a list of at least 2 texts')
  if type(answer) is not int or not 0 <= answer < len(options):
    raise ValueError(f'field {names["answer"]!r} is {answer!r}, wanted the index of one of '
                     f'{len(options)} choices, from 0')
  return _string(row, names['prompt']), options, answer


def _string(row: dict, field: str) -> str:
  value = _get(row, field)
  if not isinstance(value, str) or not value:
    raise ValueError(f'field {field!r} is {value!r}, wanted text')
  return value


def _get(row: dict, field: str) -> Any:
  if field not in row:
    raise ValueError(f'field {field!r} is missing; the row has {sorted(row)}')
  return row[field]
