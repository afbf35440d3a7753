"""Trains a model: `python launch/train.py --config configs/x.py --workdir runs/x`. Read this first.

A run is a list of phases in one workdir with one running count of steps. Run again with the same workdir, it goes on where
it was. This file sets up devices, model, phases and checkpoints, and hands each phase to `launch.loop.train`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import cli  # noqa: E402


def parse(arguments: list[str]):
  """The options of this command, and the overrides of the config."""
  from launch import config as config_lib
  rest, overrides = config_lib.split(arguments)
  parser = cli.processes_parser()
  parser = cli.parser(__doc__, parents=[parser])
  parser.add_argument('--config', required=True, help='a Python file with get_config(), see configs/')
  parser.add_argument('--workdir', required=True, help='folder of the run; an unfinished run in it is resumed')
  parser.add_argument('--allow_config_change', action='store_true', help='resume although the config has changed')
  return parser.parse_args(rest), overrides


def main(arguments: list[str]) -> int:
  # Worker processes import this file again: whatever needs jax is imported here, not above.
  cli.prepare(arguments)
  options, overrides = parse(arguments)

  import jax
  from data import tokenizer as tokenizer_lib
  from launch import checkpoint, loop, metrics, phases, report
  from launch import config as config_lib
  from launch import mesh as mesh_lib
  from nn import model

  locked = config_lib.load(options.config, overrides)
  config = config_lib.Tracked(locked)
  workdir = Path(options.workdir)
  mesh_lib.init_distributed(options.coordinator, options.num_processes, options.process_id)
  tokenizer = tokenizer_lib.load(config.tokenizer)
  cfg = config_lib.model_config(config.model, tokenizer.vocab_size)
  mesh = mesh_lib.make_mesh(config.mesh.to_dict())
  with jax.set_mesh(mesh):
    run = phases.Run(config, cfg, model.specs(cfg), mesh, tokenizer, workdir, jax.random.key(config.seed), [], {})
    checkpoints = checkpoint.Checkpointer(
        workdir, keep=config.checkpoint.keep, best_metric=config.checkpoint.best_metric,
        best_mode=config.checkpoint.best_mode)
    try:
      return execute(run, locked, checkpoints, options, overrides)
    finally:
      for thing in run.closing:
        thing.close()
      checkpoints.close()
