"""Tokenizers: what ids are worth in bytes, special tokens, and what is said when one is missing."""

import pickle

import pytest
import tokenizers
from tokenizers import models

from data import tokenizer
from data_samples import byte_level, metaspace, piece_model, write

TEXTS = ('hello world', ' two  spaces\n\n new line', 'naïve café – 東京 🙂', '', 'x' * 50)


def test_bytes_are_their_value_plus_three():
  made = tokenizer.load('bytes')
  assert made.encode('Aé') == [65 + 3, 0xC3 + 3, 0xA9 + 3]
  assert (made.pad_id, made.eos_id, made.bos_id, made.vocab_size) == (0, 1, None, 259)
  assert made.decode([0, 68, 1, 2, 69]) == 'AB'
  assert made.decode([0xC3 + 3]) == '\ufffd'


def every_kind(folder):
  return {
      'bytes': tokenizer.load('bytes'),
      'byte_level': tokenizer.load(str(byte_level(folder / 'a'))),
      'metaspace': tokenizer.load(str(metaspace(folder / 'b'))),
      'sentencepiece': tokenizer.load(str(piece_model(folder / 'c.model')))}


@pytest.fixture(scope='module')
def kinds(tmp_path_factory):
  return every_kind(tmp_path_factory.mktemp('tokenizers'))


KINDS = ('bytes', 'byte_level', 'metaspace', 'sentencepiece')


@pytest.mark.parametrize('kind', KINDS)
def test_the_bytes_of_the_ids_are_the_bytes_of_the_text(kinds, kind):
  made = kinds[kind]
  table = made.token_bytes()
  assert len(table) == made.vocab_size
  for text in TEXTS:
    got = b''.join(table[i] for i in made.encode_after(text))
    if kind == 'sentencepiece':        # its normaliser makes one space of every white space
      text = text.replace('\n', ' ')
    assert got == text.encode()


@pytest.mark.parametrize('kind', KINDS)
def test_text_survives_the_round_trip(kinds, kind):
  made = kinds[kind]
  for text in ('hello world', 'naïve 東京 🙂 cat'):
    assert made.decode(made.encode(text)) == text


@pytest.mark.parametrize('kind', KINDS)
def test_a_copy_in_another_process_does_the_same(kinds, kind):
  made = kinds[kind]
  copy = pickle.loads(pickle.dumps(made))
  assert copy.encode(TEXTS[2]) == made.encode(TEXTS[2])
  assert copy.fingerprint() == made.fingerprint()
  assert copy.eos_id == made.eos_id


def test_fingerprints_differ(kinds):
  assert len({t.fingerprint() for t in kinds.values()}) == len(kinds)


@pytest.mark.parametrize('kind', ('metaspace', 'sentencepiece'))
def test_only_the_first_word_of_a_text_gets_a_space(kinds, kind):
  made = kinds[kind]
  table = made.token_bytes()
  spell = lambda ids: b''.join(table[i] for i in ids)
  assert spell(made.encode('hello')) == b' hello'
  assert spell(made.encode_after('hello')) == b'hello'
  assert spell(made.encode_after(' hello')) == b' hello'


def test_special_tokens_are_parsed_in_text_and_not_decoded(kinds):
  made = kinds['byte_level']
  ids = made.encode('<|im_start|>cat<|im_end|>')
  assert ids[0] == 1 and ids[-1] == 2
  assert made.decode(ids) == 'cat'
  assert made.token_bytes()[2:4] == [b'<|im_end|>', b'<|tool use|>']


def test_sentencepiece_control_symbols_have_no_bytes(kinds):
  made = kinds['sentencepiece']
  assert made.token_bytes()[made.eos_id] == b''
  assert made.pad_id == made.eos_id                      # the model has no padding of its own


def test_special_tokens_come_from_the_config_before_their_usual_names(tmp_path):
  plain = tokenizer.load(str(byte_level(tmp_path / 'plain')))
  assert (plain.eos_id, plain.pad_id, plain.bos_id) == (0, 0, None)
  told = tokenizer.load(str(byte_level(tmp_path / 'told', {
      'eos_token': {'content': '<|im_end|>'}, 'pad_token': '<|endoftext|>', 'bos_token': None,
      'chat_template': [{'name': 'tool', 'template': 'x'}, {'name': 'default', 'template': 'y'}]})))
  assert (told.eos_id, told.pad_id, told.bos_id) == (2, 0, None)
  assert told.chat_template == 'y'
  assert told.fingerprint() != plain.fingerprint()


def test_templates_lie_beside_the_tokenizer_or_are_given(tmp_path):
  folder = byte_level(tmp_path / 'a', {'chat_template': 'from the config'})
  (folder / 'chat_template.jinja').write_text('from the file')
  assert tokenizer.load(str(folder)).chat_template == 'from the file'
  (tmp_path / 'own.jinja').write_text('my own')
  assert tokenizer.load(str(folder), str(tmp_path / 'own.jinja')).chat_template == 'my own'


def test_what_is_missing_is_said(tmp_path):
  with pytest.raises(ValueError, match='there is no such file'):
    tokenizer.load(str(tmp_path / 'nothing.json'))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match='neither tokenizer.json'):
    tokenizer.load(str(tmp_path / 'empty'))
  (tmp_path / 'bad.json').write_text('{}')
  with pytest.raises(ValueError, match='not a tokenizer.json'):
    tokenizer.load(str(tmp_path / 'bad.json'))
  (tmp_path / 'bad.model').write_bytes(b'abc')
  with pytest.raises(ValueError, match='not a SentencePiece model'):
    tokenizer.load(str(tmp_path / 'bad.model'))
  with pytest.raises(ValueError, match="'<end>', which is not in the vocabulary"):
    tokenizer.load(str(byte_level(tmp_path / 'named', {'eos_token': '<end>'})))
  words = tokenizers.Tokenizer(models.WordLevel({'a': 0, '</s>': 1}))
  with pytest.raises(ValueError, match='known for byte-level'):
    tokenizer.load(str(write(words, tmp_path / 'words', None))).token_bytes()
  with pytest.raises(ValueError, match='no end-of-sequence token'):
    endless = tokenizers.Tokenizer(models.WordLevel({'a': 0}))
    tokenizer.load(str(write(endless, tmp_path / 'endless', None)))
