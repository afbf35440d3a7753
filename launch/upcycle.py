"""Grows the experts of a checkpoint: `python launch/upcycle.py --input runs/x --output runs/y`.

runs/y is then a run that stands where runs/x did: the same step, data, parameters and moments, but
--factor times as many experts in every layer (moe/upcycle.py). It goes on with

    python launch/train.py --config <the same> --config.model.moe.experts=<printed> --workdir runs/y

or is what another run begins with (--config.init=runs/y). upcycle.json and upcycle.svg say which
expert was copied how often. Scores from gradients take batches of the data of the checkpoint's own
config, from where the run had got to, or of --config; --config.KEY=VALUE changes either.

With --dense the checkpoint's FFNs become --experts experts, of which --top_k take a token, and the
model computes what it did before; --config.model.moe.KEY=VALUE sets the rest of that block.

`--compare runs/y` tells instead, of every checkpoint there, how like their sources the copies are.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import cli  # noqa: E402

OPTIONS = ('factor', 'selection', 'score_batches', 'allocation', 'cap', 'temperature', 'noise',
           'router_noise', 'optimizer')


def main(arguments: list[str]) -> None:
  from launch import config as config_lib
  rest, overrides = config_lib.split(arguments)
  options = parse(rest)
  cli.prepare(arguments)

  import jax

  from launch import grown_run
  from launch import mesh as mesh_lib

  mesh_lib.init_distributed(options.coordinator, options.num_processes, options.process_id)
  if options.compare:
    print(grown_run.compare(options.compare, overrides))
    return
  given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
  source = grown_run.open_source(options.input, options.output, options.config, overrides)
  with jax.set_mesh(source.run.mesh):
    if options.dense:
      grown_run.make_sparse(source, options.experts, options.top_k, options.slices, options.seed)
    else:
      grown_run.grow(source, given, options.seed)


def parse(arguments: list[str]):
  p = cli.parser(__doc__, cli.processes_parser())
  p.add_argument('--input', help='workdir, or the folder of one of its steps; it is only read')
  p.add_argument('--output', help='workdir to make')
  p.add_argument('--config', default='', help="for gradients, in place of the checkpoint's own")
  for name in OPTIONS:
    p.add_argument(f'--{name}', help=f'see upcycle.{name} in configs/base.py')
  p.add_argument(
      '--seed', type=int, help="of noise and draws; that of the checkpoint's run if not given")
  p.add_argument('--dense', action='store_true', help='the checkpoint is dense: make it a mixture')
  p.add_argument('--experts', type=int, default=0, help='with --dense: of a layer')
  p.add_argument('--top_k', type=int, default=0, help='with --dense: experts of a token')
  p.add_argument('--slices', type=int, default=1,
                 help='with --dense: an expert is such a part of the FFN')
  p.add_argument(
      '--compare', default='', help='workdir whose copies are compared with their sources')
  o = p.parse_args(arguments)
  if bool(o.compare) == bool(o.input or o.output) or bool(o.input) != bool(o.output):
    raise ValueError('wanted --input and --output, or --compare')
  if o.dense and (o.experts < 1 or o.top_k < 1 or o.slices < 1):
    raise ValueError(f'--dense wants --experts {o.experts}, --top_k {o.top_k} and --slices '
                     f'{o.slices} of at least 1')
  if o.dense and (named := [f'--{n}' for n in OPTIONS if getattr(o, n) is not None]):
    raise ValueError(f'{", ".join(named)}: without effect with --dense, which copies everything')
  if not o.dense and (o.experts or o.top_k or o.slices != 1):
    raise ValueError('--experts, --top_k and --slices are for --dense; experts grow by --factor')
  return o


if __name__ == '__main__':
  cli.run(main)
