"""Rows of files: which there are, where they stand, what is wrong; and no file is read whole."""

import json
import multiprocessing
import pickle
import random
import tracemalloc
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from data import build, fields, files, sources, tokenizer
from data_samples import write_bytes, write_rows

ROWS = [{'n': i, 'text': f'row {i}'} for i in range(7)]


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst', 'a.ndjson'])
def test_rows_of_lines_plain_and_packed(tmp_path, name):
  rows = sources.load(write_rows(tmp_path / name, ROWS), str(tmp_path / 'cache'))
  assert [rows[i] for i in (6, 0, 3)] == [ROWS[i] for i in (6, 0, 3)]
  assert len(rows) == 7
  assert rows.where(4) == f'{tmp_path / name}:5'


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
  path = write_bytes(tmp_path / 'a.jsonl', b'\n{"n": 1}\r\n  \n\n{"n": 2}')
  rows = sources.load(path, str(tmp_path))
  assert [rows[i]['n'] for i in range(len(rows))] == [1, 2]
  assert [rows.where(i).split(':')[-1] for i in range(2)] == ['2', '5']


def test_globs_are_sorted_and_each_file_comes_once(tmp_path):
  for name in 'cab':
    write_rows(tmp_path / f'{name}.jsonl', [{'of': name}])
  rows = sources.load((str(tmp_path / 'b.*'), str(tmp_path / '*.jsonl')), str(tmp_path / 'cache'))
  assert [rows[i]['of'] for i in range(len(rows))] == ['a', 'b', 'c']
  assert rows.where(2).endswith('c.jsonl:1')
  assert [f['name'] for f in rows.identity()] == ['a.jsonl', 'b.jsonl', 'c.jsonl']


def test_rows_of_array_records(tmp_path):
  path = str(tmp_path / 'a.array_record')
  writer = ArrayRecordWriter(path, 'group_size:1')
  for row in ROWS:
    writer.write(json.dumps(row).encode())
  writer.close()
  rows = sources.load(path, str(tmp_path))
  assert len(rows) == 7 and rows[5] == ROWS[5]
  assert rows.where(5) == f'{path}, record 5'
  assert pickle.loads(pickle.dumps(rows))[5] == ROWS[5]


def test_a_section_and_the_rest_are_the_whole(tmp_path):
  rows = sources.load(write_rows(tmp_path / 'a.jsonl', ROWS), str(tmp_path))
  ends = [sources.split(len(rows), 0.3, side) for side in ('train', 'heldout')]
  parts = [sources.Section(rows, *e) for e in ends]
  assert [len(p) for p in parts] == [4, 3]
  assert [p[i] for p in parts for i in range(len(p))] == ROWS
  assert parts[1].where(0).endswith(':5')
  with pytest.raises(IndexError):
    parts[0][4]
  with pytest.raises(ValueError, match='leaves nothing'):
    sources.split(7, 0.0, 'heldout')
  with pytest.raises(ValueError, match='fraction below 1'):
    sources.split(7, 1.0, 'train')


def test_the_last_tenth_of_shakespeare():
  assert sources.split(1115394, 0.1, 'heldout') == (1003854, 1115394)


@pytest.mark.parametrize('content, complaint', [
    (b'{"n": 1}\n{"n": \n', ':2: not JSON'),
    (b'{"n": 1}\n[1]\n', ':2: a JSON list, wanted an object'),
    (b'{"n": 1}\n"\xff"\n', ':2: not JSON'),
])
def test_a_malformed_line_is_named(tmp_path, content, complaint):
  rows = sources.load(write_bytes(tmp_path / 'a.jsonl', content), str(tmp_path))
  fields.at(rows, 0, lambda row: row)
  with pytest.raises(ValueError, match=str(tmp_path / 'a.jsonl') + complaint):
    fields.at(rows, 1, lambda row: row)


@pytest.mark.parametrize('name, content, complaint', [
    ('a.jsonl', b'', 'a.jsonl is empty'),
    ('a.jsonl', b'\n \n', 'has no rows: every line is blank'),
    ('a.jsonl.gz', b'', 'a.jsonl.gz is empty'),
    ('a.txt', b'hello', 'rows are read from'),
    ('a.array_record', b'hello', 'a.array_record is not an ArrayRecord file'),
])
def test_files_without_rows_are_named(tmp_path, name, content, complaint):
  path = write_bytes(tmp_path / name, content)
  with pytest.raises(ValueError, match=complaint):
    sources.load(path, str(tmp_path / 'cache'))


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
  rows = sources.load(write_rows(tmp_path / 'a[1].jsonl', ROWS), str(tmp_path))
  assert len(rows) == 7
  with pytest.raises(ValueError, match='needs a cache folder'):
    sources.load(str(tmp_path / 'a[1].jsonl'), '')


def test_a_pattern_without_files_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"no file matches '.*nothing\*'"):
    sources.load(str(tmp_path / 'nothing*'), str(tmp_path))
  with pytest.raises(ValueError, match='no rows'):
    sources.Listed([], 'arithmetic')


@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
def test_a_packed_file_that_breaks_off_is_an_error_and_leaves_nothing(tmp_path, suffix):
  lines = b''.join(b'{"n": %d}\n' % (i * i) for i in range(5000))
  path = Path(write_bytes(tmp_path / ('a.jsonl' + suffix), lines))
  path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(ValueError, match='cannot be unpacked'):
    sources.load(str(path), str(tmp_path / 'cache'))
  assert not list((tmp_path / 'cache').iterdir())


def test_packed_files_of_several_members(tmp_path):
  for suffix in ('.gz', '.zst'):
    path = tmp_path / ('a.jsonl' + suffix)
    content = b''.join(Path(write_rows(tmp_path / ('x' + suffix), [r])).read_bytes() for r in ROWS)
    path.write_bytes(content)
    rows = sources.load(str(path), str(tmp_path / 'cache'))
    assert [rows[i] for i in range(len(rows))] == ROWS


def test_a_changed_file_gets_a_new_index(tmp_path):
  path = tmp_path / 'a.jsonl'
  first = sources.load(write_rows(path, ROWS), str(tmp_path / 'cache'))
  before = first.identity()
  same_size = ROWS[::-1]
  changed = sources.load(write_rows(path, same_size), str(tmp_path / 'cache'))
  assert changed[0] == ROWS[6]
  assert changed.identity() != before
  assert len(list((tmp_path / 'cache').iterdir())) == 2


def test_the_digest_sees_a_change_in_a_large_file(tmp_path):
  path = tmp_path / 'large'
  content = bytearray(b'x' * (9 << 20) + b'y' * 777)
  digests = set()
  sample = -(-len(content) // files.SAMPLES) * 20
  for place in (None, 0, len(content) - 1, sample):
    if place is not None:
      content[place] ^= 1
    path.write_bytes(content)
    digests.add(files.digest(path))
  assert len(digests) == 4


def build_index(path, cache, done):
  done.put(len(sources.load(path, cache)))


def test_several_processes_may_build_an_index_at_once(tmp_path):
  path = write_rows(tmp_path / 'a.jsonl.gz', [{'n': i} for i in range(20000)])
  context = multiprocessing.get_context('fork')
  done = context.Queue()
  arguments = (path, str(tmp_path / 'cache'), done)
  workers = [context.Process(target=build_index, args=arguments) for _ in range(4)]
  for w in workers:
    w.start()
  assert [done.get(timeout=60) for _ in workers] == [20000] * 4
  for w in workers:
    w.join()
  assert sorted(p.suffix for p in (tmp_path / 'cache').iterdir()) == ['.lines', '.plain']


def test_a_copy_reads_the_same_file(tmp_path):
  rows = sources.load(write_rows(tmp_path / 'a.jsonl', ROWS), str(tmp_path))
  assert pickle.loads(pickle.dumps(rows))[6] == ROWS[6]


def lines_of(megabytes):
  rng = random.Random(0)
  return b''.join(b'{"text": "%s"}\n' % rng.randbytes(500).hex().encode()
                  for _ in range(megabytes * 1000))


@pytest.mark.parametrize('name', ['a.jsonl', 'a.txt', 'a.jsonl.gz', 'a.jsonl.zst'])
def test_memory_does_not_grow_with_the_corpus(tmp_path, name):
  peaks = []
  for megabytes in (3, 30):
    path = write_bytes(tmp_path / f'{megabytes}{name}', lines_of(megabytes))
    tracemalloc.start()
    found = build.examples(path, tokenizer.load('bytes'), form=fields.Format(kind='text'),
                           length=256, seed=0, cache=str(tmp_path / 'cache'))
    for i in range(0, len(found), len(found) // 50):
      found.example(i, 0)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] < peaks[0] + (1 << 20)


def test_an_index_is_built_without_holding_it(tmp_path):
  peaks = []
  for count in (20_000, 200_000):
    path = Path(write_bytes(tmp_path / f'{count}.jsonl', b'{"n": 12345678}\n' * count))
    tracemalloc.start()
    files.line_index(path, str(tmp_path / 'cache'))
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] < peaks[0] + (1 << 16)
