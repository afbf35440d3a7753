"""The data of a phase, opened as its config says: examples for text phases, prompts for RL."""

import dataclasses
from pathlib import Path
from typing import Any

from data import build, fields, mixture, recall, sources
from data import prompts as prompts_lib
from rl.names import unknown

ROWS = ('problem', 'chat', 'arithmetic')         # formats of rows that stand alone
TEXT = ('text', 'tokens', *ROWS, 'recall')       # formats of text phases
FORMATS = {'pretrain': TEXT, 'sft': TEXT, 'rl': ROWS}


@dataclasses.dataclass(frozen=True)
class Answered:
  """Rows that all have an answer, whatever the field is called where they come from."""
  rows: sources.Rows
  field: str

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, index):
    row = self.rows[index]
    if self.field not in row:
      raise ValueError(f'field {self.field!r} is missing; the row has {sorted(row)}')
    return {**row, 'answer': row[self.field]}

  def where(self, index):
    return self.rows.where(index)

  def identity(self):
    return self.rows.identity()


def form_of(phase: str, d: Any) -> fields.Format:
  """How rows of a phase's data become text; reads only the fields that its format has."""
  if d.format not in FORMATS[phase]:
    raise ValueError(f'{phase}.data.format: ' + unknown('format', d.format, FORMATS[phase]))
  if d.format == 'arithmetic':
    return fields.Format(kind='problem')
  if d.format == 'problem':
    return fields.Format(
        kind='problem', prompt=d.prompt, response=d.response if phase != 'rl' else 'response',
        prompt_template=d.prompt_template)
  name = {'chat': 'messages'}.get(d.format, d.format)
  return fields.Format(kind=d.format, **{name: d[name]})


def cache_of(run: Any, d: Any) -> str:
  """The folder of file indexes."""
  return d.cache or str(run.workdir / 'data')


def files_of(phase: str, d: Any, side: str) -> tuple[tuple[str, ...], float]:
  """The files of a side (train or heldout), and the share at their end that is held out."""
  if not d.files:
    raise ValueError(f'{phase}.data.files is empty, and format {d.format!r} reads files')
  if d.heldout_files:
    return d.heldout_files if side == 'heldout' else d.files, 0.0
  return d.files, d.heldout


def has_heldout(d: Any) -> bool:
  return d.format in ('arithmetic', 'recall') or bool(d.heldout_files) or d.heldout > 0


def parts(run: Any, phase: str, length: int, d: Any, side: str) -> tuple[mixture.Part, ...]:
  """What a text phase trains on (side train), or what is kept for its evaluation (heldout)."""
  if d.format == 'recall':
    return recall_parts(run, length, side)
  long = 'drop' if d.format in ROWS and d.skip_long_rows else 'error'
  options = {'form': form_of(phase, d), 'length': length, 'long': long}
  if d.format == 'arithmetic':
    rows = sources.Listed(run.task['demos' if side == 'train' else 'heldout'], 'arithmetic')
    return (mixture.Part('arithmetic', build.of_rows(rows, run.tokenizer, **options)),)
  names, share = files_of(phase, d, side)
  # The same parts on both sides: what is held out of each is not trained on.
  weights = d.weights if names == d.files else ()
  if weights and len(weights) != len(names):
    raise ValueError(
        f'{phase}.data.weights has {len(weights)} numbers for {len(names)} entries of files')

  if d.format == 'tokens':
    options['dtype'] = d.dtype

  def part(name, patterns, weight):
    return mixture.Part(name, build.examples(
        patterns, run.tokenizer, seed=run.config.seed, cache=cache_of(run, d), heldout=share,
        side=side if share else 'train', skip_bad_rows=d.skip_bad_rows, **options), weight)

  if not weights:
    return (part('rows', names, 1.0),)         # one sequence of rows: every file by its size
  # Not by path: files may have moved when a run is resumed.
  return tuple(part(f'{i} {Path(name).name}', (name,), weight)
               for i, (name, weight) in enumerate(zip(names, weights)))


def recall_parts(run: Any, length: int, side: str) -> tuple[mixture.Part, ...]:
  """One part for each number of pairs."""
  c, last = run.config.recall, run.cfg.vocab_size
  rows = c.rows if side == 'train' else c.heldout
  if 2 * c.symbols > last:
    raise ValueError(
        f'recall.symbols {c.symbols} keys and as many values do not fit model.vocab_size {last}')
  if not c.pairs or rows < 1:
    raise ValueError(
        f'recall.pairs is {c.pairs} and there are {rows} rows of each; wanted at least 1')
  return tuple(
      mixture.Part(f'{n} pairs', recall.Recall(
          n, symbols=c.symbols, first_id=last - 2 * c.symbols, rows=rows, seed=run.config.seed,
          side=side, length=length), max(c.pairs) / n)
      for n in c.pairs)


def prompts(run: Any, d: Any, max_prompt: int, side: str, answer: str) -> prompts_lib.Prompts:
  """Problems to sample answers to, or (side heldout) those kept for evaluation.

  Args:
    answer: field that every row must have; '': none.
  """
  form, seed = form_of('rl', d), run.config.seed
  if d.format == 'arithmetic':
    return prompts_lib.Prompts(
        sources.Listed(run.task[side], 'arithmetic'), run.tokenizer, form=form,
        max_prompt=max_prompt, seed=seed, shuffle=side == 'train' and d.shuffle)
  names, share = files_of('rl', d, side)
  rows = sources.load(names, cache_of(run, d))
  if share:
    rows = sources.Section(rows, *sources.split(len(rows), share, side))
  if answer:
    rows = Answered(rows, answer)
  return prompts_lib.Prompts(
      rows, run.tokenizer, form=form, max_prompt=max_prompt, seed=seed,
      shuffle=side == 'train' and d.shuffle, long='drop' if d.skip_long_rows else 'error',
      skip_bad_rows=d.skip_bad_rows)
