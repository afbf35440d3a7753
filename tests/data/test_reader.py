"""Readers: epochs, mixtures, bitwise resuming, any number of processes and workers, contracts."""

import json
import threading

import numpy as np
import pytest

from data import build, mixture, reader, sources, tokenizer
from data.fields import Format
from data.mixture import Part

BYTES = tokenizer.load('bytes')
TEXT, PROBLEM = Format(kind='text'), Format(kind='problem')


def documents(count, letter='a', **options):
  """Texts of different lengths; the first character says which."""
  rows = [{'text': chr(0x100 + i) + letter * (i * 5 % 11)} for i in range(count)]
  return build.of_rows(sources.Listed(rows, letter), BYTES, form=TEXT, length=16, **options)


def problems(count, **options):
  rows = [{'prompt': f'{i}?', 'response': 'y' * (i % 7 + 1)} for i in range(count)]
  return build.of_rows(sources.Listed(rows, 'problems'), BYTES, form=PROBLEM, length=16, **options)


def faulty():
  rows = [{'prompt': 'x', 'response': 'y' * n} for n in (1, 2, 3, 0, 99)]
  del rows[3]['response']
  return build.of_rows(sources.Listed(rows, 'faulty'), BYTES, form=PROBLEM, length=16, long='drop',
                       skip_bad_rows=True)


def mixed():
  return (Part('a', documents(30, 'a'), 3.0), Part('b', documents(23, 'b'), 1.0))


def make(parts=None, **options):
  return reader.Reader(parts or mixed(), **dict(dict(
      length=16, rows=8, seed=3, packing_kind='split', streams=2), **options))


def same(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other):
    assert a.keys() == b.keys()
    for k in a:
      np.testing.assert_array_equal(a[k], b[k])


def take(made, n):
  return [made.next() for _ in range(n)]


@pytest.mark.parametrize('streams', [1, 2, 4])
def test_in_every_epoch_each_row_is_in_one_stream(streams):
  part = Part('a', documents(12))
  epochs = []
  for epoch in range(3):
    rows = []
    for s in range(streams):
      found = mixture.elements((part,), seed=0, stream=s, streams=streams)
      size = 12 // streams
      rows += [found[epoch * size + i]['tokens'][:2].tolist() for i in range(size)]
    assert len({tuple(r) for r in rows}) == 12
    epochs.append(rows)
  assert epochs[0] != epochs[1] != epochs[2]


def test_without_a_shuffle_rows_come_as_they_stand():
  found = mixture.elements((Part('a', documents(5)),), seed=0, stream=0, streams=1, shuffle=False)
  first = [found[i]['tokens'][1] for i in range(10)]
  assert first == [documents(5).example(i % 5, 0)['tokens'][1] for i in range(10)]


def test_every_epoch_has_offsets_of_its_own(tmp_path):
  (tmp_path / 'a.txt').write_bytes(bytes(range(250)))
  found = build.examples(str(tmp_path / 'a.txt'), BYTES, form=TEXT, length=16, seed=0, cache='')
  elements = mixture.elements((Part('a', found),), seed=0, stream=0, streams=1)
  starts = [{elements[e * len(found) + i]['tokens'][0] % 16 for i in range(len(found))}
            for e in range(10)]
  assert all(len(s) == 1 for s in starts)                # one tiling per epoch
  assert len(set.union(*starts)) > 4


def test_weights_three_and_one_give_three_of_every_four():
  parts = (Part('a', documents(8, 'a'), 3), Part('b', problems(8), 1))
  found = mixture.elements(parts, seed=0, stream=0, streams=1)
  kinds = ['b' if (found[i]['mask'] == 0).any() else 'a' for i in range(40)]
  assert all(kinds[i:i + 4].count('a') == 3 for i in range(0, 40, 4))


@pytest.mark.parametrize('parts, complaint', [
    ((), 'wanted parts'),
    ((Part('a', documents(5)), Part('a', documents(5))), 'different names'),
    ((Part('a', documents(5), 0.0),), 'a: weight 0.0'),
    ((Part('a', documents(1)),), 'a: 1 rows cannot feed 2 streams'),
])
def test_bad_mixtures_are_named(parts, complaint):
  with pytest.raises(ValueError, match=complaint):
    reader.Reader(parts, length=16, rows=8, seed=3, packing_kind='split', streams=2)


CASES = {
    'split': dict(packing_kind='split'),
    'fit': dict(parts=(Part('p', problems(40)),), packing_kind='fit'),
    'pad': dict(parts=(Part('p', problems(40)),), packing_kind='pad'),
    'skipping': dict(parts=(Part('p', faulty()), Part('q', documents(9))), packing_kind='split'),
}


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('after', [0, 1, 7])
def test_resuming_is_exact(case, after):
  first = make(**CASES[case])
  take(first, after)
  state, dropped = json.loads(json.dumps(first.state())), first.dropped()
  rest, dropped_then = take(first, 9), first.dropped()
  first.close()
  second = make(**CASES[case])
  second.restore(state)
  assert second.state() == state
  assert second.dropped() == dropped
  same(take(second, 9), rest)
  assert second.dropped() == dropped_then
  second.restore(state)                                  # also on a reader that has run
  same(take(second, 3), rest[:3])
  second.close()


@pytest.mark.parametrize('case', ['split', 'fit'])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(case):
  options = CASES[case] | {'streams': 4}
  one = make(**options)
  two = [make(**options, process=p, processes=2) for p in range(2)]
  same(take(one, 5), joined(two, 5))
  state = json.loads(json.dumps(reader.merge([r.state() for r in two])))
  assert state == one.state()
  rest = take(one, 5)
  four = [make(**options, process=p, processes=4) for p in range(4)]
  for r in four:
    r.restore(state)
  same(joined(four, 5), rest)
  for r in [one, *two, *four]:
    r.close()


def joined(readers, n):
  steps = [take(r, n) for r in readers]
  return [{k: np.concatenate([b[k] for b in step]) for k in step[0]} for step in zip(*steps)]


def test_workers_change_nothing_and_may_change_on_resuming():
  parts = (Part('p', problems(40), 3.0), Part('q', faulty(), 1.0))
  options = dict(parts=parts, packing_kind='fit', streams=1)
  plain, working = make(**options), make(**options, workers=2)
  take(plain, 2)
  working.restore(json.loads(json.dumps(plain.state())))
  same(take(working, 6), take(plain, 6))
  state, dropped = json.loads(json.dumps(working.state())), working.dropped()
  assert state == plain.state()
  assert dropped.keys() == {'bad', 'long'}
  rest = take(working, 5)
  working.close()
  plain.restore(state)
  assert plain.dropped() == dropped
  same(take(plain, 5), rest)
  plain.close()


def test_dropped_rows_are_counted_once_each_epoch():
  made = make((Part('f', faulty()),), packing_kind='pad', streams=1, rows=3)
  take(made, 10)                                         # three of five rows are good
  counts = made.dropped()
  assert counts['bad'][0] in (9, 10) and counts['long'][0] in (9, 10)
  assert counts['bad'][1] == "faulty, row 3: field 'response' is missing; the row has ['prompt']"
  assert counts['long'][1].startswith('faulty, row 4: 101 tokens')
  made.close()


def test_a_source_of_which_every_row_is_dropped_is_an_error():
  rows = sources.Listed([{'prompt': 'x'}] * 5, 'bad')
  found = build.of_rows(rows, BYTES, form=PROBLEM, length=16, skip_bad_rows=True)
  made = make((Part('f', found),), packing_kind='pad', streams=1)
  with pytest.raises(
      ValueError, match='all of 5 rows in succession were dropped; the last: bad, row'):
    made.next()
  made.close()


def test_a_wrong_field_name_is_an_error_before_the_first_batch():
  rows = sources.Listed([{'question': 'x', 'answer': 'y'}], 'list')
  with pytest.raises(
      ValueError,
      match="list, row 0: field 'prompt' is missing; the row has \\['answer', 'question'\\]"):
    make((Part('p', build.of_rows(rows, BYTES, form=PROBLEM, length=16)),), streams=1)


def test_a_bad_row_in_mid_run_reaches_the_caller():
  rows = sources.Listed([{'prompt': 'x', 'response': 'y'}] * 9 + [{'prompt': 'x'}], 'list')
  found = build.of_rows(rows, BYTES, form=PROBLEM, length=16)
  made = make((Part('p', found),), packing_kind='pad', streams=1)
  with pytest.raises(ValueError, match="list, row 9: field 'response' is missing"):
    take(made, 3)
  made.close()


def test_state_counts_what_was_taken_and_not_what_was_prepared():
  made = make(streams=1, rows=4, packing_kind='pad', parts=(Part('p', problems(40)),))
  made.next()
  assert made.state()['0']['parent']['next'] == 4
  made.close()


def test_the_next_batches_are_prepared_in_a_thread():
  seen, before = threading.Event(), set(threading.enumerate())

  class Watched:
    def __len__(self):
      return 40

    def example(self, index, epoch):
      if threading.current_thread() is not threading.main_thread():
        seen.set()
      return problems(40).example(index, epoch)

  made = make((Part('p', Watched()),), packing_kind='pad', streams=1)
  made.next()
  assert seen.is_set()
  made.close()
  assert set(threading.enumerate()) <= before            # and the thread has ended


@pytest.mark.parametrize('options, field', [
    (dict(seed=4), 'seed was 3, is 4'),
    (dict(streams=4), 'streams was 2, is 4'),
    (dict(rows=16), 'rows was 8, is 16'),
    (dict(length=32), 'length was 16, is 32'),
    (dict(packing_kind='pad'), "packing.0 was 'split', is 'pad'"),
    (dict(shuffle=False), 'shuffle was True, is False'),
    (dict(parts=(Part('a', documents(30, 'a'), 2.0), Part('b', documents(23, 'b'), 1.0))),
     'parts.a.weight was 3.0, is 2.0'),
    (dict(parts=(Part('a', documents(30, 'c'), 3.0), Part('b', documents(23, 'b'), 1.0))),
     "parts.a.source.0.name was 'a', is 'c'"),
    (dict(parts=mixed()[:1]), 'parts was'),
])
def test_other_data_are_refused_by_field_and_both_values(options, field):
  made = make()
  saved = json.loads(json.dumps(made.contract()))
  made.check(saved)
  other = make(**options)
  with pytest.raises(ValueError, match=field):
    other.check(saved)
  for r in (made, other):
    r.close()


def test_the_contract_sees_content_tokenizer_and_format(tmp_path):
  def contract(content='one two\n' * 9, **options):
    (tmp_path / 'a.txt').write_text(content)
    found = build.examples(str(tmp_path / 'a.txt'), options.pop('made', BYTES), form=TEXT,
                           length=16, seed=0, cache='', **options)
    return found.identity()

  kinds = [contract(), contract('one twx\n' * 9), contract(heldout=0.5),
           contract(made=tokenizer.Bytes('other'))]
  assert len({json.dumps(k) for k in kinds}) == 4
  forms = [Format(kind='problem'), Format(kind='problem', prompt_template='Q {prompt}')]
  rows = sources.Listed([{'prompt': 'x', 'response': 'y'}], 'list')
  found = [build.of_rows(rows, BYTES, form=f, length=16).identity() for f in forms]
  assert found[0] != found[1]


def test_a_state_without_a_stream_of_this_process_is_refused():
  made = make(streams=4, process=1, processes=2)
  assert sorted(made.state()) == ['2', '3']
  with pytest.raises(ValueError, match=r"streams \['0', '1'\], not \[2, 3\]"):
    made.restore({'0': {}, '1': {}})
  made.close()


def test_rows_streams_and_processes_divide():
  with pytest.raises(ValueError, match='8 rows, 3 streams'):
    make(streams=3)
  with pytest.raises(ValueError, match='2 streams, 4 processes'):
    make(processes=4)
  with pytest.raises(ValueError, match='3 rows of a batch'):
    next(reader.once(documents(3), length=16, rows=3, processes=2))
