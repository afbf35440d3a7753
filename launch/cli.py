"""What every command does around its main: thread count, errors as one line, common options."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rl import names

THREADS = 16                           # enough for 8 devices; more devices get two each


def prepare(arguments: Sequence[str] | None = None) -> None:
  """Keeps runs from hanging on machines with few cores. To be called before jax is imported.

  XLA runs the devices of a process, and the messages between processes, on one pool with a thread
  per core. A collective waits in its thread for the others, so with fewer threads than waiting
  devices all wait for ever. NPROC is what XLA takes for the number of cores; a larger one costs 1.1
  to 1.7 times of the speed of one device. So it is set only where CPU devices may have to wait for
  one another: several of them in a process, or several processes.

  Args:
    arguments: the command line, which may ask for several processes; None: of this process.
  """
  platforms = os.environ.get('JAX_PLATFORMS', '')
  if platforms and 'cpu' not in platforms.split(','):
    return
  devices = num_cpu_devices()
  if devices == 1 and num_processes(sys.argv[1:] if arguments is None else arguments) == 1:
    return
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  wanted = max(THREADS, 2 * devices)
  given = os.environ.get('NPROC', '')
  if (int(given) if given.isdigit() else cores) < wanted:
    os.environ['NPROC'] = str(wanted)


def num_cpu_devices() -> int:
  """CPU devices this process will have, as far as the environment says."""
  flags = os.environ.get('XLA_FLAGS', '')
  counts = re.findall(r'--xla_force_host_platform_device_count=(\d+)', flags)[-1:]
  counts += re.findall(r'^\d+$', os.environ.get('JAX_NUM_CPU_DEVICES', ''))
  return max([1, *map(int, counts)])


def num_processes(arguments: Sequence[str]) -> int:
  """Processes the run will have; at least 2 where only the cluster knows."""
  options, _ = processes_parser().parse_known_args(arguments)
  given = os.environ.get('JAX_NUM_PROCESSES', '')
  named = options.num_processes or (int(given) if given.isdigit() else 0)
  return named or (2 if options.coordinator == 'auto' else 1)


def processes_parser() -> argparse.ArgumentParser:
  """The options of a run of several processes; see launch/mesh.py, init_distributed."""
  p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  p.add_argument('--coordinator', default='',
                 help='host:port of process 0, the same for all; auto: ask the cluster')
  p.add_argument('--num_processes', type=int, default=0, help='of the run, this one included')
  p.add_argument('--process_id', type=int, default=-1, help='of this process, from 0')
  return p


def asking_parser(temperature: float) -> argparse.ArgumentParser:
  """How a model is asked and answers; see launch/talk.py. temperature: where none is given."""
  p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  p.add_argument('--max_tokens', type=int, default=0,
                 help='of a response; 0: half of what the model reads, at most 256')
  p.add_argument('--temperature', type=float, default=temperature,
                 help=f'0: always the likeliest token; {temperature:g} if not given')
  p.add_argument('--top_k', type=int, default=0, help='sample among the k likeliest; 0: all')
  p.add_argument('--top_p', type=float, default=1.0,
                 help='sample among the likeliest tokens with this probability')
  p.add_argument('--min_p', type=float, default=0.0,
                 help='drop tokens below this share of the likeliest one')
  p.add_argument('--stop', action='append', default=[],
                 help='text that ends a response; may be given several times')
  p.add_argument('--seed', type=int, default=0)
  p.add_argument('--chat', action='store_true', help='ask by the chat template')
  p.add_argument('--system', default='', help='what a conversation begins with, for --chat')
  p.add_argument('--template',
                 help="what a prompt is put into, '{prompt}': nothing; if not given, the run's own")
  return p


class Parser(argparse.ArgumentParser):
  """One whose complaints are ValueErrors: one line, which names an option that is misspelt."""

  def parse_args(self, args: Sequence[str], namespace: None = None) -> argparse.Namespace:
    known = [name for name in self._option_string_actions if name.startswith('--')]
    for text in args:
      name = text.partition('=')[0]
      if re.fullmatch(r'--[\w-]+', name) and name not in known:
        raise ValueError(names.unknown('option', name, known))
    return super().parse_args(args, namespace)

  def error(self, message: str) -> NoReturn:
    raise ValueError(f'{message}; see --help')


def parser(description: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
  """A parser with --debug, to which a command adds its own options. Abbreviations are errors."""
  p = Parser(description=description, parents=parents, allow_abbrev=False,
             formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--debug', action='store_true',
                 help='show where an error came from (also: NACRE_DEBUG=1)')
  return p


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
  """Calls main with the command line and exits with what it returns.

  A ValueError or an OSError is the user's to mend: it becomes one line on stderr and exit status 2.
  With --debug, or NACRE_DEBUG set, the traceback is shown instead.
  """
  arguments = sys.argv[1:]
  if '--debug' in arguments or os.environ.get('NACRE_DEBUG', '0') not in ('', '0'):
    sys.exit(main(arguments))
  try:
    status = main(arguments)
  except (ValueError, OSError) as error:
    print(f'error: {one_line(error)}', file=sys.stderr)
    status = 2
  sys.exit(status)


def one_line(error: Exception) -> str:
  """The message without line breaks; of a system error what it was and with which file."""
  if isinstance(error, OSError) and error.strerror and error.filename is not None:
    return f'{error.strerror}: {error.filename}'
  return ' '.join(str(error).split()) or type(error).__name__
