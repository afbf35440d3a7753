"""Chat templates: messages to ids with a mask on what the assistant said.

A message is {'role': str, 'content': str}; instead of content it may carry token ids ('tokens'),
which pass through untouched. Templates are Jinja as in Hugging Face tokenizers, run in a sandbox.
What is trained on is what stands in {% generation %} blocks; a template without them is rendered
once up to each answer and once with it, and the difference is the answer, up to the last id in it
that ends a response, if it has one.
"""

import datetime
import functools
import json
import re

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from data.tokenizer import Tokenizer

# Unicode noncharacters, which no text contains: around a generation block, and around the name of
# what has ids.
START, STOP, HOLE = '\ufdd0', '\ufdd1', '\ufdd2'

# The day templates see: rows must not change from one day of a run to the next.
TODAY = datetime.datetime(2024, 7, 26)


class _Generation(jinja2.ext.Extension):
  """{% generation %} ... {% endgeneration %}: puts START and STOP around what it renders."""
  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
    mark = lambda text: jinja2.nodes.Output([jinja2.nodes.TemplateData(text)], lineno=line)
    return [mark(START), *body, mark(STOP)]


def render(
    tokenizer: Tokenizer,
    messages: list[dict],
    add_generation_prompt: bool,
    tools: list | None = None,
) -> str:
  """The conversation as text; ids of messages that carry them are decoded.

  Raises:
    ValueError: no chat template, a malformed message, or an error inside the template.
  """
  text = _render(tokenizer, messages, add_generation_prompt, tools)
  holes = _holes(tokenizer, messages)
  parts = text.replace(START, '').replace(STOP, '').split(HOLE)
  return ''.join(tokenizer.decode(holes[part]) if i % 2 else part for i, part in enumerate(parts))


def prompt(
    tokenizer: Tokenizer, messages: list[dict], tools: list | None = None
) -> tuple[str, list[int]]:
  """Text and ids of a conversation that the assistant is to continue."""
  text = _render(tokenizer, messages, True, tools).replace(START, '').replace(STOP, '')
  ((ids, _),) = _encode(tokenizer, messages, [(text, False)])
  return render(tokenizer, messages, True, tools), ids


def encode(
    tokenizer: Tokenizer, messages: list[dict], tools: list | None = None
) -> tuple[list[int], list[int]]:
  """Ids of a whole conversation, and a mask that is 1 on what the assistant said.

  The text before an answer is encoded apart from the answer, so that it is the prompt the model
  meets when it samples.

  Raises:
    ValueError: as render; no answer to train on; without generation blocks also a template whose
      text up to an answer changes with what follows.
  """
  whole = _render(tokenizer, messages, False, tools)
  marked = START in whole
  spans = _marked(whole) if marked else _derived(tokenizer, messages, whole, tools)
  ids, mask = [], []
  for new, said in _encode(tokenizer, messages, spans):
    ends = [i for i, token in enumerate(new, 1) if token in tokenizer.end_ids]
    end = ends[-1] if said and not marked and ends else len(new)
    ids += new
    mask += [int(said)] * end + [0] * (len(new) - end)
  if not any(mask):
    raise ValueError('no message of the assistant to train on')
  return ids, mask


def _encode(tokenizer, messages, spans) -> list[tuple[list[int], bool]]:
  """Rendered (text, said) -> (ids, said); what has ids already is never encoded again."""
  holes, result = _holes(tokenizer, messages), []
  started, own = False, []
  for text, said in spans:
    ids = []
    for i, part in enumerate(text.split(HOLE)):
      if i % 2:
        new = holes[part]
      elif part:
        new = tokenizer.encode_after(part) if started else tokenizer.encode(part)
      else:
        continue
      if own and new[:1] == own:
        new = new[1:]                  # sampled ids bring the end that the template adds as well
      own = [t for t in new[-1:] if i % 2 and part.isdigit() and t in tokenizer.end_ids]
      started |= i % 2 == 0 or part.isdigit()
      ids += new
    result.append((ids, said))
  return result


def _holes(tokenizer: Tokenizer, messages: list[dict]) -> dict[str, list[int]]:
  """{name in the rendered text: ids}: messages by index, and special tokens that have no text."""
  named = {
      'eos_token': tokenizer.eos_id, 'bos_token': tokenizer.bos_id, 'pad_token': tokenizer.pad_id}
  return ({str(i): m['tokens'] for i, m in enumerate(messages) if 'tokens' in m}
          | {name: [] if i is None else [i] for name, i in named.items()})


def _marked(whole: str) -> list[tuple[str, bool]]:
  """(text, whether the assistant said it) by generation blocks."""
  parts = re.split(f'([{START}{STOP}])', whole)
  if parts[1::2] != [START, STOP] * (len(parts) // 4):
    raise ValueError('the generation blocks of the chat template are nested or do not end')
  return [(text, i % 2 == 1) for i, text in enumerate(parts[::2])]


def _derived(tokenizer, messages, whole, tools) -> list[tuple[str, bool]]:
  """(text, whether the assistant said it) by comparing renderings; see the file's docstring."""
  spans, done = [], 0
  for i, message in enumerate(messages):
    if message['role'] != 'assistant':
      continue
    before = _render(tokenizer, messages[:i], True, tools)
    after = _render(tokenizer, messages[:i + 1], False, tools)
    if not (after.startswith(before) and whole.startswith(after) and len(before) >= done):
      raise ValueError(
          f'message {i}: the chat template writes the text up to this answer differently depending '
          'on what follows, so the answer cannot be told from it; use a template with generation '
          'blocks, or rows that end here')
    spans += [(whole[done:len(before)], False), (whole[len(before):len(after)], True)]
    done = len(after)
  return [*spans, (whole[done:], False)]


def _render(tokenizer, messages, add_generation_prompt, tools) -> str:
  """The template's text, with START, STOP and holes."""
  if not tokenizer.chat_template:
    raise ValueError('the tokenizer has no chat template; give one by the option chat_template')
  if not isinstance(messages, list):
    raise ValueError(f'messages are {type(messages).__name__}, wanted a list')
  shown = [_message(m, i) for i, m in enumerate(messages)]
  names = {name: f'{HOLE}{name}{HOLE}' for name in ('eos_token', 'pad_token')}
  names['bos_token'] = '' if tokenizer.bos_id is None else f'{HOLE}bos_token{HOLE}'
  names |= tokenizer.specials
  try:
    return _template(tokenizer.chat_template).render(
        messages=shown, add_generation_prompt=add_generation_prompt, tools=tools, **names)
  except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as e:
    raise ValueError(f'the chat template fails: {e}') from e


def _message(message: dict, i: int) -> dict:
  """The message as the template sees it: ids are a hole."""
  if not isinstance(message, dict) or not isinstance(message.get('role'), str):
    raise ValueError(f"message {i}: wanted an object with a 'role' and a 'content'")
  if any(c in json.dumps(message, ensure_ascii=False, default=str) for c in (START, STOP, HOLE)):
    raise ValueError(f'message {i} contains one of the noncharacters U+FDD0 to U+FDD2')
  if 'tokens' in message:
    ids = message['tokens']
    if not isinstance(ids, list) or any(type(t) is not int or t < 0 for t in ids):
      raise ValueError(f"message {i}: 'tokens' is no list of token ids")
    return message | {'content': f'{HOLE}{i}{HOLE}'}
  if not isinstance(message.get('content'), (str, list)) and 'tool_calls' not in message:
    found = type(message.get('content')).__name__
    raise ValueError(f"message {i}: 'content' is {found}, wanted text")
  return message


@functools.lru_cache
def _template(source: str) -> jinja2.Template:
  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
  environment.filters['tojson'] = tojson
  environment.globals['raise_exception'] = raise_exception
  environment.globals['strftime_now'] = TODAY.strftime
  try:
    return environment.from_string(source)
  except jinja2.TemplateSyntaxError as e:
    raise ValueError(f'the chat template does not parse, line {e.lineno}: {e}') from e
