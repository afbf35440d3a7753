"""Trains a model: `python launch/train.py --config configs/x.py --workdir runs/x`. Read this first.

A run is a list of phases in one workdir, with one running count of steps. Started again with the same workdir, it goes on
where it was. This file sets up devices, model, phases and checkpoints, and hands each phase to `launch.loop.train`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import cli  # noqa: E402


def main(arguments: list[str]) -> int:
  # Data workers import this file again: whatever needs jax is imported here, not above.
  from launch import config as config_lib
  rest, overrides = config_lib.split(arguments)
  parser = cli.parser(__doc__, cli.processes_parser())
  parser.add_argument('--config', required=True, help='a Python file with get_config(), see configs/')
  parser.add_argument('--workdir', required=True, help='folder of the run; an unfinished run in it is resumed')
  parser.add_argument('--allow_config_change', action='store_true', help='resume although the config has changed')
  options = parser.parse_args(rest)
  cli.prepare(arguments)

  import jax
  from data import tokenizer as tokenizer_lib
  from launch import checkpoint, phases, start
  from launch import mesh as mesh_lib
  from nn import model

  locked = config_lib.load(options.config, overrides)
  config = config_lib.Tracked(locked)
  mesh_lib.init_distributed(options.coordinator, options.num_processes, options.process_id)
  tokenizer = tokenizer_lib.load(config.tokenizer)
  cfg = config_lib.model_config(config.model, tokenizer.vocab_size)
  mesh = mesh_lib.make_mesh(config.mesh.to_dict())
  run = phases.Run(config, cfg, model.specs(cfg), mesh, tokenizer, Path(options.workdir), jax.random.key(config.seed))
  keep = config.checkpoint
  with jax.set_mesh(mesh), checkpoint.Checkpointer(
      run.workdir, keep=keep.keep, best_metric=keep.best_metric, best_mode=keep.best_mode) as checkpoints:
    try:
      resumed = start.check_workdir(checkpoints, locked, options.allow_config_change)
      built = [phases.build(run, name, first, last) for name, first, last in phases.plan(config)]
      init, report = config.init, config.report
      log = start.open_log(run, built, resumed)
      hooks = start.make_hooks(run, built, checkpoints, log, locked)
      config_lib.check_read(config, [key for key, _ in overrides])
      start.write_config(run, locked)
      state, memory, step = start.begin(run, built, checkpoints, resumed, init)
      return train(run, built, hooks, log, state, memory, step, resumed, report)
    finally:
      run.close()


def train(run, built, hooks, log, state, memory, step, resumed, report) -> int:
  """Runs the phases that are left. Returns the exit status."""
  from launch import loop, start
  try:
    for phase in built:
      if step > phase.phase.last or (step == phase.phase.last and phase is not built[-1]):
        continue
      state, memory = start.enter(run, phase, state, memory, step, resumed)
      state, memory[phase.phase.name] = loop.train(
          phase.phase, state, memory[phase.phase.name], step, hooks(phase, memory), fresh=step != resumed)
      step = phase.phase.last
  except loop.Stopped as signal:
    log.say(f'{signal}: saved; run the same command to go on')
    return 0
  except loop.NonFinite as error:
    log.say(f'stopped: {error}')
    return 1
  finally:
    log.close()
  if report:
    start.finish(run)
  return 0


if __name__ == '__main__':
  cli.run(main)
