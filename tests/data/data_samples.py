"""Tokenizers and files made for the tests of data/."""

import gzip
import io
import json
import random

import sentencepiece
import tokenizers
import zstandard
from tokenizers import decoders, models, pre_tokenizers, trainers


def corpus():
  rng = random.Random(0)
  words = 'the cat sat on a mat and then ran off with hello world number seven café'.split()
  return [' '.join(rng.choices(words, k=12)) for _ in range(200)]


CHATML = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|tool use|>')


def byte_level(folder, config=None, specials=CHATML):
  """A byte-level BPE with special tokens, the first ids, as tokenizer.json."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.train_from_iterator(corpus(), trainers.BpeTrainer(
      vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
      special_tokens=list(specials)))
  return write(made, folder, config)


def metaspace(folder, config=None):
  """A byte-fallback BPE that writes spaces as U+2581, as Llama 2's."""
  made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
  made.decoder = decoders.Sequence([
      decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
      decoders.Strip(' ', 1, 0)])
  # 'split=False' would learn whole lines: train on words.
  words = [w for line in corpus() for w in line.split()]
  made.train_from_iterator(words, trainers.BpeTrainer(
      vocab_size=500, show_progress=False,
      special_tokens=['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256))]))
  text = json.loads(made.to_str())
  text['added_tokens'] = [t for t in text['added_tokens'] if not t['content'].startswith('<0x')]
  return write(tokenizers.Tokenizer.from_str(json.dumps(text)), folder, config)


def write(made, folder, config):
  folder.mkdir(exist_ok=True)
  made.save(str(folder / 'tokenizer.json'))
  if config is not None:
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


def piece_model(path, **options):
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(corpus()), model_writer=out, vocab_size=320, model_type='bpe',
      byte_fallback=True, hard_vocab_limit=False, minloglevel=2, **options)
  path.write_bytes(out.getvalue())
  return path


def write_rows(path, rows):
  """JSON lines, packed by the suffix."""
  return write_bytes(path, ''.join(json.dumps(r) + '\n' for r in rows).encode())


def write_bytes(path, content):
  pack = {'.gz': gzip.compress, '.zst': zstandard.ZstdCompressor().compress}
  path.write_bytes(pack.get(path.suffix, bytes)(content))
  return str(path)
