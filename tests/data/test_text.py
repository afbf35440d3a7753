"""Plain text and token files: what windows and chunks cover, and what evaluation predicts."""

import collections
import json

import numpy as np
import pytest

from data import build, reader, text, tokenizer
from data.fields import Format
from data_samples import byte_level, write_bytes, write_rows

TEXT, TOKENS = Format(kind='text'), Format(kind='tokens')
BYTES = tokenizer.load('bytes')


def windows(path, length, tmp_path, **options):
  cache = str(tmp_path / 'cache')
  return build.examples(str(path), BYTES, form=TEXT, length=length, seed=5, cache=cache, **options)


def content(size):
  """Bytes that differ from their neighbours and say where they stand."""
  return bytes(i * 7 % 251 for i in range(size))


def test_the_windows_of_an_epoch_tile_the_file_from_an_offset_of_its_own(tmp_path):
  whole = content(1000)
  found = windows(write_bytes(tmp_path / 'a.txt', whole), 16, tmp_path)
  assert len(found) == (1000 - 15) // 16
  offsets = set()
  for epoch in range(40):
    rows = [found.example(i, epoch)['tokens'] - 3 for i in range(len(found))]
    joined = np.concatenate(rows).astype(np.uint8).tobytes()
    assert all(len(r) == 16 for r in rows)
    assert joined in whole
    offsets.add(whole.find(joined))
  assert offsets <= set(range(16)) and len(offsets) > 10


def test_offsets_follow_from_the_seed(tmp_path):
  path = write_bytes(tmp_path / 'a.txt', content(1000))
  first = [windows(path, 16, tmp_path).example(0, e)['tokens'].tolist() for e in range(8)]
  assert first == [windows(path, 16, tmp_path).example(0, e)['tokens'].tolist() for e in range(8)]
  other = build.examples(path, BYTES, form=TEXT, length=16, seed=6, cache=str(tmp_path))
  assert first != [other.example(0, e)['tokens'].tolist() for e in range(8)]


@pytest.mark.parametrize('size, rows, lengths', [
    (2, 1, {2}),                       # shorter than a row
    (16, 1, {16}),
    (17, 1, {16}),
    (31, 1, {16}),
    (32, 1, {16}),
    (47, 2, {16}),
])
def test_short_files(tmp_path, size, rows, lengths):
  found = windows(write_bytes(tmp_path / 'a.txt', content(size)), 16, tmp_path)
  assert len(found) == rows
  assert {len(found.example(i, e)['tokens']) for i in range(rows) for e in range(20)} == lengths


def test_no_window_crosses_from_file_to_file(tmp_path):
  for name, char in (('a', b'a'), ('b', b'b'), ('c', b'c')):
    write_bytes(tmp_path / f'{name}.txt', char * 50)
  found = windows(tmp_path / '*.txt', 16, tmp_path)
  assert len(found) == 3 * 2
  for i in range(len(found)):
    assert len(set(found.example(i, 1)['tokens'])) == 1


def test_head_and_tail_cut_at_a_byte_of_the_whole(tmp_path):
  whole = content(130)
  write_bytes(tmp_path / 'a.txt', whole[:100])
  write_bytes(tmp_path / 'b.txt.gz', whole[100:])
  seen = {}
  for side in ('train', 'heldout'):
    found = windows(tmp_path / '*.txt*', 16, tmp_path, heldout=0.5, side=side)
    texts = found.in_order(collections.Counter())
    seen[side] = [(tokens - 3).astype(np.uint8).tobytes() for tokens, _, _ in texts]
  assert b''.join(seen['train']) == whole[:65]
  assert b''.join(seen['heldout']) == whole[65:]
  short = windows(tmp_path / 'b.txt.gz', 16, tmp_path, heldout=0.7)
  assert short.example(0, 0)['tokens'].tolist() == [b + 3 for b in whole[100:109]]


def predicted(batches):
  """(token before, token) for each token that is predicted."""
  return [(int(t[j - 1]), int(t[j])) for b in batches for t, m in zip(b['tokens'], b['mask'])
          for j in range(len(t)) if m[j]]


@pytest.mark.parametrize('size', [1000, 106, 107, 105, 16, 2])
def test_evaluation_predicts_every_token_but_the_first_once_and_in_order(tmp_path, size):
  whole = content(size)
  found = windows(write_bytes(tmp_path / 'a.txt', whole), 16, tmp_path)
  batches = list(reader.once(found, length=16, rows=4))
  assert predicted(batches) == [(a + 3, b + 3) for a, b in zip(whole, whole[1:])]
  assert all(b['tokens'].shape == (4, 16) for b in batches)
  last = batches[-1]
  assert ((last['segments'] > 0) | (last['mask'] == 0)).all()


def test_evaluation_of_documents_predicts_every_token_but_each_first(tmp_path):
  rows = [{'text': 'x' * n} for n in (40, 3, 5, 1, 30)]
  path = write_rows(tmp_path / 'a.jsonl', rows)
  found = build.examples(path, BYTES, form=TEXT, length=16, seed=0, cache=str(tmp_path))
  batches = list(reader.once(found, length=16, rows=2))
  # As many as letters: the ends are predicted, the firsts are not.
  assert len(predicted(batches)) == sum(len(r['text']) for r in rows)
  assert sum(b == BYTES.eos_id for _, b in predicted(batches)) == 5


def test_processes_share_the_batches_of_an_evaluation(tmp_path):
  found = windows(write_bytes(tmp_path / 'a.txt', content(1000)), 16, tmp_path)
  whole = list(reader.once(found, length=16, rows=4))
  halves = [list(reader.once(found, length=16, rows=4, process=p, processes=2)) for p in range(2)]
  for w, a, b in zip(whole, *halves, strict=True):
    np.testing.assert_array_equal(w['tokens'], np.concatenate([a['tokens'], b['tokens']]))


def test_token_files_by_header_by_json_and_by_option(tmp_path):
  ids = (np.arange(100) * 3 % 259).astype(np.uint16)
  np.save(tmp_path / 'a.npy', ids)
  (tmp_path / 'b.bin').write_bytes(ids.tobytes())
  (tmp_path / 'b.bin.json').write_text(json.dumps({'dtype': 'uint16'}))
  (tmp_path / 'c.bin').write_bytes(ids.astype('>u4').tobytes())
  for name, dtype in (('a.npy', ''), ('b.bin', ''), ('c.bin', '>u4')):
    found = build.examples(
        str(tmp_path / name), BYTES, form=TOKENS, length=16, seed=0, cache='', dtype=dtype)
    got = np.concatenate([t for t, _, _ in found.in_order(collections.Counter())])
    np.testing.assert_array_equal(got, ids)
    assert got.dtype == np.int32


def test_rows_of_ids_pass_through(tmp_path):
  path = write_rows(tmp_path / 'a.jsonl', [{'tokens': [5, 6]}, {'tokens': [259]}])
  found = build.examples(path, BYTES, form=TOKENS, length=16, seed=0, cache=str(tmp_path))
  assert found.example(0, 0)['tokens'].tolist() == [5, 6]
  with pytest.raises(ValueError, match="a.jsonl:2: field 'tokens': ids from 259 to 259, the vocab"):
    found.example(1, 0)


def test_bad_token_files_are_named(tmp_path):
  def go(name, **options):
    found = build.examples(
        str(tmp_path / name), BYTES, form=TOKENS, length=16, seed=0, cache='', **options)
    return [found.example(i, 0) for i in range(len(found))]

  (tmp_path / 'a.bin').write_bytes(b'1234')
  with pytest.raises(ValueError, match='a.bin: of what dtype'):
    go('a.bin')
  for dtype in ('float32', 'unit16'):
    with pytest.raises(ValueError, match=f'a.bin: tokens of type {dtype}, wanted integers'):
      go('a.bin', dtype=dtype)
  np.save(tmp_path / 'b.npy', np.zeros((3, 3), np.int32))
  with pytest.raises(ValueError, match='one dimension'):
    go('b.npy')
  (tmp_path / 'c.npy').write_bytes(b'no array')
  with pytest.raises(ValueError, match='c.npy'):
    go('c.npy')
  np.save(tmp_path / 'd.npy', np.array([3] * 10 + [300] + [3] * 5))
  with pytest.raises(ValueError, match='d.npy: token 10 is 300, the vocabulary has 259'):
    go('d.npy')
  (tmp_path / 'e.txt').write_bytes(b'text')
  with pytest.raises(ValueError, match='token files are'):
    go('e.txt')
  (tmp_path / 'f.txt').write_bytes(b'x')
  with pytest.raises(ValueError, match='nothing to predict'):
    windows(tmp_path / 'f.txt', 16, tmp_path)


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
  return tokenizer.load(str(byte_level(tmp_path_factory.mktemp('bpe') / 'a')))


LINES = ''.join(f'{i} the cat sät on ' + 'mat ' * (i % 9) + '\n' * (i % 3) for i in range(300))


@pytest.mark.parametrize('chunk', [7, 64, 1000, 100000])
def test_chunks_cover_the_text_and_end_where_lines_do(tmp_path, pieces, chunk):
  path = write_bytes(tmp_path / 'a.txt.zst', LINES.encode())
  files = text.text_files(path, pieces, str(tmp_path))
  found = text.Chunks(text.sections(files, 0.0, 'train'), pieces, chunk=chunk)
  texts = [pieces.decode(found.example(i, 0)['tokens']) for i in range(len(found))]
  assert ''.join(texts) == LINES
  if chunk >= 1000:
    assert all(t.endswith('\n') for t in texts[:-1] if t)
  ends = [i for i in range(len(found)) if pieces.eos_id in found.example(i, 0)['tokens']]
  assert len(ends) == 1


@pytest.mark.parametrize('share', [0.1, 0.37, 0.5])
def test_chunks_of_both_sides_are_the_text(tmp_path, pieces, share):
  files = text.text_files(write_bytes(tmp_path / 'a.txt', LINES.encode()), pieces, str(tmp_path))
  texts = []
  for side in ('train', 'heldout'):
    found = text.Chunks(text.sections(files, share, side), pieces, chunk=50)
    texts += [pieces.decode(found.example(i, 0)['tokens']) for i in range(len(found))]
  assert ''.join(texts) == LINES


def test_evaluation_of_chunks_predicts_every_token_but_the_first(tmp_path, pieces):
  files = text.text_files(write_bytes(tmp_path / 'a.txt', LINES.encode()), pieces, str(tmp_path))
  found = text.Chunks(text.sections(files, 0.0, 'train'), pieces, chunk=300)
  ids = [i for k in range(len(found)) for i in found.example(k, 0)['tokens'].tolist()]
  batches = list(reader.once(found, length=32, rows=4))
  assert predicted(batches) == list(zip(ids, ids[1:]))


def test_text_that_is_not_utf8_is_an_error_unless_read_as_bytes(tmp_path, pieces):
  path = write_bytes(tmp_path / 'a.txt', b'good line\n' * 10 + b'bad \xff line\n')
  found = build.examples(path, pieces, form=TEXT, length=16, seed=0, cache=str(tmp_path))
  with pytest.raises(ValueError, match='a.txt: byte 104 is not UTF-8'):
    found.example(0, 0)
  assert len(build.examples(path, BYTES, form=TEXT, length=16, seed=0, cache=str(tmp_path))) == 6
