"""From the options of a config to examples: which kinds of files go with which formats."""

from data import files, sft, sources, text
from data.fields import Format
from data.tokenizer import Tokenizer


def examples(
    patterns: str | tuple[str, ...],
    tokenizer: Tokenizer,
    *,
    form: Format,
    length: int,
    seed: int,
    cache: str,
    heldout: float = 0.0,
    side: str = 'train',
    long: str = 'error',
    skip_bad_rows: bool = False,
    dtype: str = '',
):
  """Examples of files, see data/sft.py.

  Args:
    form: kind text: plain text, or the text field of rows; tokens: .npy and .bin files, or a field
      of ids; problem, chat: rows.
    heldout: share at the end that is not trained on.
    side: train, or heldout for that share.
    long: of problem and chat: what to do with rows of more than `length` tokens; others are split.
    dtype: of .bin files.
  """
  if form.kind in ('problem', 'chat') or _has_rows(patterns):
    return of_rows(sources.load(patterns, cache), tokenizer, form=form, length=length,
                   heldout=heldout, side=side, long=long, skip_bad_rows=skip_bad_rows)
  if form.kind == 'tokens':
    found = text.token_files(patterns, tokenizer, dtype)
  else:
    found = text.text_files(patterns, tokenizer, cache)
  parts = text.sections(found, heldout, side)
  if form.kind == 'tokens' or tokenizer.byte_shift is not None:
    return text.Windows(parts, tokenizer, length=length, seed=seed)
  return text.Chunks(parts, tokenizer)


def of_rows(
    rows: sources.Rows,
    tokenizer: Tokenizer,
    *,
    form: Format,
    length: int,
    heldout: float = 0.0,
    side: str = 'train',
    long: str = 'error',
    skip_bad_rows: bool = False,
) -> sft.Examples:
  """Examples of rows, also of a list: sources.Listed."""
  if heldout or side != 'train':
    rows = sources.Section(rows, *sources.split(len(rows), heldout, side))
  if form.kind in ('text', 'tokens'):
    long = 'split'
  return sft.Examples(rows, form, tokenizer, length=length, long=long, skip_bad_rows=skip_bad_rows)


def _has_rows(patterns: str | tuple[str, ...]) -> bool:
  return all(files.kind(p) in sources.LINES + sources.RECORDS for p in files.expand(patterns))
