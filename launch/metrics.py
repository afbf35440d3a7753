"""What a run says: metrics.jsonl, samples.jsonl, warnings.jsonl, TensorBoard, W&B, a line to watch.

A line of a .jsonl file is one JSON object: 'step', 'time' (seconds since 1970), 'phase' if there is
one, and the values beside them. JSON has no word for numbers that are not finite: they are the
strings 'nan', 'inf' and '-inf'. Lines are flushed one by one, so that a killed run loses at most
the last; readers pass over a last line that was cut short.

The readers here serve launch/report.py, which must run without jax.
"""

import collections
import importlib
import json
import math
import os
import shutil
import sys
import textwrap
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

METRICS, SAMPLES, WARNINGS = 'metrics.jsonl', 'samples.jsonl', 'warnings.jsonl'
RESERVED = ('step', 'time', 'phase')
SIZES = ('eval/problems', 'eval/tokens')    # how much was evaluated, no result
NOT_FINITE = {'nan': math.nan, 'inf': math.inf, '-inf': -math.inf}
SECONDS_BETWEEN_LINES = 5.0           # where the line cannot be written over
LOGS_OF_SPEED = 20                    # the time left is estimated from this many logs

# Dense bfloat16 FLOP/s of what jax calls a device, by its device_kind.
PEAK_FLOPS = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5': 459e12,
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,
    'NVIDIA A100-SXM4-40GB': 312e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA H100 80GB HBM3': 989e12,
    'NVIDIA H200': 989e12,
}


class Logger:
  """Writes what a run says. Only process 0 does anything.

  Args:
    workdir: the run's folder.
    total_steps: of the whole run.
    console: print a live line, warnings and `say`.
    tensorboard: write event files to <workdir>/tensorboard.
    wandb: name of a Weights & Biases project; '': none.
    resumed: the step that the run goes on from: later lines in the files are cut, since the run
      will write them again. 0: a new run, all lines are cut.
    phase_ends: {phase: last step}; the live line then counts to the end of the phase.
    stream: where the console is; None: standard output.
  """

  def __init__(self, workdir: str | Path, *, total_steps: int, console: bool = True,
               tensorboard: bool = True, wandb: str = '', resumed: int = 0,
               phase_ends: Mapping[str, int] | None = None, stream: TextIO | None = None):
    import jax  # here, because readers must do without
    self._active = jax.process_index() == 0
    if not self._active:
      return
    self._workdir = Path(workdir)
    self._workdir.mkdir(parents=True, exist_ok=True)
    self._files = {}
    for name in (METRICS, SAMPLES, WARNINGS):
      cut(self._workdir / name, resumed or -1)
      self._files[name] = open(self._workdir / name, 'a', encoding='utf-8')
    self._tensorboard = _open_tensorboard(self._workdir, resumed) if tensorboard else None
    self._wandb = _open_wandb(self._workdir, wandb) if wandb else None
    self._line = Line(total_steps, phase_ends or {}, stream or sys.stdout) if console else None

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def log(self, step: int, values: Mapping[str, float], phase: str = '') -> None:
    """One line of metrics.jsonl, and the same everywhere else. values: numbers, also 0-d arrays."""
    if not self._active:
      return
    if taken := values.keys() & set(RESERVED):
      raise ValueError(f'metrics cannot be called {sorted(taken)}')
    values = {name: _number(name, value) for name, value in values.items()}
    self._write(METRICS, step, phase, values)
    if self._tensorboard:
      for name, value in values.items():
        self._tensorboard.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log({**values, **({'phase': phase} if phase else {})}, step=step)
    if self._line:
      self._line.show(step, values, phase)

  def samples(self, step: int, rows: Iterable[Mapping[str, Any]], phase: str = '') -> None:
    """One line of samples.jsonl per row: 'prompt', 'response', 'reward', and what else there is."""
    if not self._active:
      return
    for row in rows:
      if taken := row.keys() & set(RESERVED):
        raise ValueError(f'fields of samples cannot be called {sorted(taken)}')
      self._write(SAMPLES, step, phase, row)

  def warn(self, step: int, text: str) -> None:
    """A line of warnings.jsonl, said in the console, too; the report shows it."""
    if not self._active:
      return
    self._write(WARNINGS, step, '', {'text': text})
    self.say(f'warning, step {step}: {text}')

  def say(self, text: str) -> None:
    """A line in the console that stays."""
    if self._active and self._line:
      self._line.say(text)

  def summary(self, pairs: Iterable[tuple[str, Any]]) -> None:
    """What the run is made of, as a table in the console."""
    if self._active and self._line:
      self._line.say(table(pairs, _width()))

  def close(self) -> None:
    if not self._active:
      return
    for file in self._files.values():
      file.close()
    if self._tensorboard:
      self._tensorboard.close()
    if self._wandb:
      self._wandb.finish()
    if self._line:
      self._line.end()

  def _write(self, name: str, step: int, phase: str, values: Mapping[str, Any]) -> None:
    head = {'step': int(step), 'time': round(time.time(), 3), **({'phase': phase} if phase else {})}
    self._files[name].write(json.dumps({**head, **_plain(values)}, allow_nan=False) + '\n')
    self._files[name].flush()


class Line:
  """The live line: written over on a terminal, elsewhere a plain line from time to time.

  It stays where something was evaluated, when the phase changes, and at the end.
  """

  def __init__(self, total_steps: int, phase_ends: Mapping[str, int], stream: TextIO):
    self._total, self._ends, self._stream = total_steps, phase_ends, stream
    self._live = stream.isatty()
    self._shown = ''                  # what is on the terminal's last line
    self._phase, self._said = None, -math.inf
    self._speed = collections.deque(maxlen=LOGS_OF_SPEED)

  def show(self, step: int, values: Mapping[str, float], phase: str) -> None:
    now = time.monotonic()
    if phase != self._phase:
      self.end()
      self._phase, self._said = phase, -math.inf
      self._speed.clear()
    self._speed.append((now, step))
    evaluated = any(name.startswith('eval/') for name in values)
    end = self._ends.get(phase, self._total)
    text = self._text(step, end, values, phase)
    if self._live:
      self._stream.write('\r' + text + ' ' * (len(self._shown) - len(text)))
      self._shown = text
      if evaluated or step >= end:
        self.end()
    elif evaluated or step >= end or now - self._said >= SECONDS_BETWEEN_LINES:
      self._stream.write(text + '\n')
      self._said = now
    self._stream.flush()

  def say(self, text: str) -> None:
    if self._shown:
      self._stream.write('\r' + ' ' * len(self._shown) + '\r')
    self._stream.write(text + '\n' + self._shown)
    self._stream.flush()

  def end(self) -> None:
    if self._shown:
      self._stream.write('\n')
      self._stream.flush()
    self._shown = ''

  def _text(self, step: int, end: int, values: Mapping[str, float], phase: str) -> str:
    """As many parts as a terminal's line has room for; elsewhere all of them."""
    parts = [f'{phase} {step}/{end}'.strip()]
    for name in ('reward', 'loss'):
      if name in values:
        parts.append(f'{name} {values[name]:.4g}')
        break
    parts += [f'{name.replace("/", " ")} {value:.4g}' for name, value in values.items()
              if name.startswith('eval/') and name not in SIZES]
    if 'tokens_per_second' in values:
      parts.append(f'{short(values["tokens_per_second"])} tokens/s')
    if math.isfinite(values.get('mfu', math.nan)):
      parts.append(f'MFU {values["mfu"]:.1%}')
    (first, first_step), (last, last_step) = self._speed[0], self._speed[-1]
    if last_step > first_step and step < end:
      parts.append(f'ETA {duration((end - step) * (last - first) / (last_step - first_step))}')
    if not self._live:
      return '  '.join(parts)
    room = _width() - 1               # a full line would wrap, and could not be written over
    while len(parts) > 1 and len('  '.join(parts)) > room:
      parts.pop()
    return '  '.join(parts)[:room]


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl, numbers that are not finite as floats; [] without a file."""
  def number(name: str, value: Any) -> Any:
    return NOT_FINITE.get(value, value) if name != 'phase' and isinstance(value, str) else value
  lines = read_lines(Path(workdir) / METRICS)
  return [{name: number(name, value) for name, value in line.items()} for line in lines]


def read_lines(path: str | Path) -> list[dict[str, Any]]:
  """The objects of a .jsonl file; [] without a file. A last line that was cut short is passed over.

  Raises:
    ValueError: names file and line of another line that is no object with a step.
  """
  if not Path(path).exists():
    return []
  lines = Path(path).read_bytes().split(b'\n')
  found = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    if (value := _object(line)) is not None:
      found.append(value)
    elif number < len(lines):
      start = line[:80].decode(errors='replace')
      raise ValueError(f'{path}, line {number}: no JSON object with a step: {start}')
  return found


def cut(path: Path, step: int) -> None:
  """Takes lines after the step, and lines that were cut short, off a .jsonl file, all at once."""
  if not path.exists():
    return
  rest = path.with_name(path.name + '.new')
  with open(path, 'rb') as old, open(rest, 'wb') as new:
    for line in old:
      value = _object(line)
      if line.endswith(b'\n') and value is not None and value['step'] <= step:
        new.write(line)
    new.flush()
    os.fsync(new.fileno())
  os.replace(rest, path)


def table(pairs: Iterable[tuple[str, Any]], width: int) -> str:
  """Names and values in two columns; long values go on in the second."""
  pairs = [(str(name), str(value)) for name, value in pairs]
  left = max((len(name) for name, _ in pairs), default=0) + 2
  lines = []
  for name, value in pairs:
    parts = [part for line in value.splitlines() or ['']
             for part in textwrap.wrap(line, max(width - left - 1, 20)) or ['']]
    lines += [f'{name if i == 0 else "":<{left}}{part}'.rstrip() for i, part in enumerate(parts)]
  return '\n'.join(lines)


def peak_flops(devices: Iterable[Any]) -> float:
  """bfloat16 FLOP/s of all devices together, by their makers; 0 if one is not in the table."""
  kinds = [PEAK_FLOPS.get(device.device_kind, 0.0) for device in devices]
  return sum(kinds) if all(kinds) else 0.0


def short(number: float) -> str:
  """1234567 -> '1.23M'."""
  for size, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(number) >= size:
      return f'{number / size:.3g}{letter}'
  return f'{number:.3g}'


def duration(seconds: float) -> str:
  """3725 -> '1h 02m'."""
  seconds = round(seconds)
  if seconds < 60:
    return f'{seconds}s'
  if seconds < 3600:
    return f'{seconds // 60}m {seconds % 60:02}s'
  return f'{seconds // 3600}h {seconds % 3600 // 60:02}m'


def _number(name: str, value: Any) -> float:
  try:
    return float(value)
  except (TypeError, ValueError) as error:
    raise ValueError(f'metric {name} is {value!r}, wanted one number') from error


def _plain(value: Any) -> Any:
  """What JSON can hold: numpy numbers as Python's, those that are not finite as strings."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if hasattr(value, 'tolist'):
    return _plain(value.tolist())
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return repr(value)
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  raise ValueError(f'a {type(value).__name__} cannot be logged: {value!r}')


def _object(line: bytes) -> dict[str, Any] | None:
  try:
    value = json.loads(line)
  except ValueError:
    return None
  return value if isinstance(value, dict) and isinstance(value.get('step'), int) else None


def _width() -> int:
  return shutil.get_terminal_size().columns


def _open_tensorboard(workdir: Path, resumed: int):
  import tensorboardX  # here, because it takes half a second that readers do not need
  # The suffix: two runs within a second would write to one file.
  return tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard'), flush_secs=10, filename_suffix=f'.{uuid.uuid4().hex[:6]}',
      purge_step=resumed + 1 if resumed else 0)


def _open_wandb(workdir: Path, project: str):
  try:
    wandb = importlib.import_module('wandb')
  except ImportError as error:
    raise ValueError(f'log.wandb is {project!r}, but the package wandb is not installed: '
                     'pip install wandb, or leave log.wandb empty') from error
  # The run goes on under the same id after a restart. W&B ignores steps that it has seen.
  name = workdir / 'wandb_id.txt'
  if not name.exists():
    name.write_text(uuid.uuid4().hex[:12])
  return wandb.init(project=project, dir=str(workdir), name=workdir.resolve().name,
                    id=name.read_text().strip(), resume='allow')
