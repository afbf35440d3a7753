"""Text to ids and back, without TensorFlow: bytes, tokenizer.json and SentencePiece files."""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

# One role and content per line; a turn of the assistant ends with the end-of-sequence id.
PLAIN_CHAT = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")

EOS_NAMES = (
    '</s>', '<|endoftext|>', '<eos>', '<|end_of_text|>', '<|eot_id|>', '<|im_end|>', '[EOS]')
PAD_NAMES = ('<pad>', '<|pad|>', '<|padding|>', '<|finetune_right_pad_id|>', '[PAD]')
BOS_NAMES = ('<s>', '<bos>', '<|begin_of_text|>', '[BOS]')

# Appended to a serialised SentencePiece model, which merges it (protocol buffers do):
# normalizer_spec { add_dummy_prefix: false  remove_extra_whitespaces: false }.
KEEP_SPACES = bytes.fromhex('1a0418002000')


class Tokenizer(Protocol):
  """What every tokenizer offers. All of them pickle.

  specials: {'eos_token': text, ...}: special tokens that `encode` recognises in text, by their name
    in chat templates. Empty where special ids have no text.
  end_ids: what ends a response: eos_id, and what generation_config.json names beside it.
  byte_shift: the id of byte 0, where every byte is one token; None otherwise.
  """
  vocab_size: int
  pad_id: int
  eos_id: int
  end_ids: tuple[int, ...]
  bos_id: int | None
  chat_template: str | None
  specials: dict[str, str]
  byte_shift: int | None

  def encode(self, text: str) -> list[int]:
    """Ids of the text alone: nothing is put before or after it."""

  def encode_after(self, text: str) -> list[int]:
    """Ids of text that continues other text: without the space some put before a first word."""

  def decode(self, ids) -> str:
    """Text of the ids; special tokens have none."""

  def token_bytes(self) -> list[bytes]:
    """What each id adds to the text, in the middle of it; b'' for ids without text."""

  def fingerprint(self) -> str:
    """Equal for two tokenizers only if they do the same."""


class Bytes:
  """UTF-8 bytes: pad 0, end 1, unknown 2, byte b is b + 3."""
  vocab_size, pad_id, eos_id, bos_id, byte_shift = 259, 0, 1, None, 3
  specials = {}

  def __init__(self, chat_template: str | None = None):
    self.chat_template = chat_template or PLAIN_CHAT

  @property
  def end_ids(self) -> tuple[int, ...]:
    return (self.eos_id,)

  def encode(self, text: str) -> list[int]:
    return [b + 3 for b in text.encode()]

  encode_after = encode

  def decode(self, ids) -> str:
    return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors='replace')

  def token_bytes(self) -> list[bytes]:
    return [b'', b'', b''] + [bytes([b]) for b in range(256)]

  def fingerprint(self) -> str:
    return _digest('bytes', self.chat_template)


class Pieces:
  """A tokenizer.json, read by the tokenizers package."""
  byte_shift = None

  def __init__(self, path: Path, config: dict, chat_template: str | None = None,
               end_ids: tuple[int, ...] = ()):
    """config: the content of tokenizer_config.json, {} without one."""
    self._path = str(path)
    try:
      self._text = path.read_text()
      self._tokenizer = tokenizers.Tokenizer.from_str(self._text)
    except Exception as e:            # the package raises bare Exception
      raise ValueError(f'{path} is not a tokenizer.json: {e}') from e
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values()) + 1
    self._added = {t['id']: t['content'] for t in json.loads(self._text).get('added_tokens', ())}
    eos = _special('eos_token', config, EOS_NAMES, vocabulary, path)
    if eos is None:
      raise ValueError(f'{path}: no end-of-sequence token: tokenizer_config.json beside it names '
                       f'no eos_token, and the vocabulary has none of {EOS_NAMES}')
    pad = _special('pad_token', config, PAD_NAMES, vocabulary, path) or eos
    bos = _special('bos_token', config, BOS_NAMES, vocabulary, path)
    if 'bos_token' in config and config['bos_token'] is None:
      bos = None
    self.specials = {'eos_token': eos, 'pad_token': pad} | ({'bos_token': bos} if bos else {})
    self.eos_id, self.pad_id = vocabulary[eos], vocabulary[pad]
    if strange := [i for i in end_ids if type(i) is not int or not 0 <= i < self.vocab_size]:
      raise ValueError(f'{path}: generation_config.json names eos_token_id {strange}, the '
                       f'vocabulary has {self.vocab_size}')
    self.end_ids = (self.eos_id, *(i for i in end_ids if i != self.eos_id))
    self.bos_id = vocabulary[bos] if bos and config.get('add_bos_token', True) else None
    self.chat_template = chat_template or _template(config)

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_after(self, text: str) -> list[int]:
    if self.eos_id not in self._added or not self._spaces:
      return self.encode(text)
    # A special token splits the text, so what follows it is not first any more.
    return self.encode(self._added[self.eos_id] + text)[1:]

  def decode(self, ids) -> str:
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

  @functools.cached_property
  def _decoders(self) -> list[dict]:
    return _flat(json.loads(self._text).get('decoder'), 'decoders')

  @functools.cached_property
  def _spaces(self) -> bool:
    """Whether pieces write a space as U+2581."""
    return any(d['type'] == 'Metaspace' or d['type'] == 'Replace' and d.get('content') == ' '
               for d in self._decoders)

  def token_bytes(self) -> list[bytes]:
    kinds = {d['type'] for d in self._decoders}
    if 'ByteLevel' in kinds:
      unchar = {c: b for b, c in enumerate(_byte_characters())}
      piece_bytes = lambda piece: bytes(unchar[c] for c in piece)
    elif self._spaces:
      fallback = 'ByteFallback' in kinds
      piece_bytes = lambda piece: _space_piece_bytes(piece, fallback)
    else:
      raise ValueError(f'{self._path}: the bytes of a token are known for byte-level, '
                       'byte-fallback and metaspace decoders, not for '
                       f'{sorted(kinds) or "none"}')
    result = [b''] * self.vocab_size
    for piece, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
      result[i] = self._added[i].encode() if i in self._added else piece_bytes(piece)
    return result

  def fingerprint(self) -> str:
    return _digest(self._text, self.specials, self.chat_template, *self.end_ids[1:])


class SentencePiece:
  """A SentencePiece model file."""
  byte_shift = None
  specials = {}

  def __init__(self, path: Path, chat_template: str | None = None):
    self._proto = path.read_bytes()
    self.chat_template = chat_template
    self._load()
    if self._model.eos_id() < 0:
      raise ValueError(f'{path}: the SentencePiece model has no end-of-sequence id')
    self.vocab_size, self.eos_id = self._model.vocab_size(), self._model.eos_id()
    self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
    self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
    self.end_ids = (self.eos_id,)

  def _load(self):
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=self._proto)
      self._inner = sentencepiece.SentencePieceProcessor(model_proto=self._proto + KEEP_SPACES)
    except RuntimeError as e:
      raise ValueError(f'not a SentencePiece model: {e}') from e

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k not in ('_model', '_inner')}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._load()

  def encode(self, text: str) -> list[int]:
    return self._model.encode(text)

  def encode_after(self, text: str) -> list[int]:
    return self._inner.encode(text)

  def decode(self, ids) -> str:
    return self._model.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

  def token_bytes(self) -> list[bytes]:
    def one(i):
      if self._model.is_control(i) or self._model.is_unused(i):
        return b''
      if self._model.is_unknown(i):
        return ' \u2047 '.encode()
      return _space_piece_bytes(self._model.id_to_piece(i), self._model.is_byte(i))
    return [one(i) for i in range(self.vocab_size)]

  def fingerprint(self) -> str:
    return _digest(hashlib.sha256(self._proto).hexdigest(), self.chat_template)


def load(name: str, chat_template: str = '') -> Tokenizer:
  """A tokenizer by name.

  Args:
    name: 'bytes', a tokenizer.json, a SentencePiece *.model, or a folder with one of the two. What
      lies beside a tokenizer.json is used: tokenizer_config.json (special tokens, chat template),
      chat_template.jinja, generation_config.json (what ends a response).
    chat_template: a file with a Jinja template instead of the tokenizer's own; '' for its own.

  Raises:
    ValueError: nothing usable at that path, or a special token is missing; says what was looked
      for.
  """
  if chat_template and not Path(chat_template).is_file():
    raise ValueError(f'chat template: there is no file {chat_template}')
  template = Path(chat_template).read_text() if chat_template else None
  if name == 'bytes':
    return Bytes(template)
  path = Path(name).expanduser()
  if path.is_dir():
    found = [path / f for f in ('tokenizer.json', 'tokenizer.model') if (path / f).is_file()]
    found = found or sorted(path.glob('*.model'))
    if len(found) == 0:
      raise ValueError(f'tokenizer {name!r}: the folder has neither tokenizer.json nor a *.model '
                       'file')
    path = found[0]
  if not path.is_file():
    raise ValueError(f"tokenizer {name!r}: wanted 'bytes', a tokenizer.json, a SentencePiece "
                     '*.model file or a folder with one; there is no such file')
  beside = path.parent / 'chat_template.jinja'
  if template is None and beside.is_file():
    template = beside.read_text()
  if path.suffix == '.model':
    return SentencePiece(path, template)
  if path.suffix != '.json':
    raise ValueError(f'tokenizer {name!r}: wanted a tokenizer.json or a *.model file')
  ends = _beside(path, 'generation_config.json').get('eos_token_id')
  ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
  return Pieces(path, _beside(path, 'tokenizer_config.json'), template, tuple(ends))


def _beside(path: Path, name: str) -> dict:
  """A JSON file in the same folder; {} if there is none."""
  beside = path.parent / name
  if not beside.is_file():
    return {}
  try:
    content = json.loads(beside.read_text())
  except ValueError as e:
    raise ValueError(f'{beside} is not JSON: {e}') from e
  if not isinstance(content, dict):
    raise ValueError(f'{beside} is a JSON {type(content).__name__}, wanted an object')
  return content


def _special(
    name: str, config: dict, usual: tuple[str, ...], vocabulary: dict, path: Path
) -> str | None:
  """The text of a special token, from the config or by its usual names; None if there is none."""
  named = config.get(name)
  if isinstance(named, dict):
    named = named['content']
  if named is not None:
    if named not in vocabulary:
      raise ValueError(f'{path}: tokenizer_config.json names {name} {named!r}, which is not in the '
                       'vocabulary')
    return named
  return next((n for n in usual if n in vocabulary), None)


def _template(config: dict) -> str | None:
  """The chat template of a tokenizer_config.json: a string, or a list with one called default."""
  template = config.get('chat_template')
  if isinstance(template, list):
    return next((t['template'] for t in template if t['name'] == 'default'), None)
  return template


def _flat(node: dict | None, children: str) -> list[dict]:
  """The members of a possibly nested Sequence of a tokenizer.json."""
  if node is None:
    return []
  if node['type'] != 'Sequence':
    return [node]
  return [x for n in node[children] for x in _flat(n, children)]


def _byte_characters() -> list[str]:
  """The character for each byte in byte-level BPE: printable Latin-1 itself, others from U+0100."""
  plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  rest = iter(range(0x100, 0x200))
  return [chr(b if b in plain else next(rest)) for b in range(256)]


def _space_piece_bytes(piece: str, byte_fallback: bool) -> bytes:
  """The bytes of a piece that has U+2581 for a space and, with byte_fallback, <0xAB> for a byte."""
  if byte_fallback and (match := re.fullmatch('<0x([0-9A-F]{2})>', piece)):
    return bytes.fromhex(match[1])
  return piece.replace('\u2581', ' ').encode()


def _digest(*parts) -> str:
  return hashlib.sha256('\0'.join(map(str, parts)).encode()).hexdigest()[:16]
