"""Trains a model: `python launch/train.py --config configs/x.py --workdir runs/x`. Read this first.

A run is a list of phases in one workdir, with one running count of steps. Started again with the
same workdir, it goes on where it was. This file sets up devices, model, phases and checkpoints, and
hands each phase to `launch.loop.train`.
"""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import cli  # noqa: E402


def main(arguments: list[str]) -> int:
  # Data workers import this file again: whatever needs jax is imported here, not above.
  from launch import config as config_lib
  rest, overrides = config_lib.split(arguments)
  parser = cli.parser(__doc__, cli.processes_parser())
  parser.add_argument('--config', required=True, help='Python file with get_config(), see configs/')
  parser.add_argument('--workdir', required=True, help='folder of the run; resumed if it has one')
  parser.add_argument('--allow_config_change', action='store_true',
                      help='resume although the config has changed')
  options = parser.parse_args(rest)
  cli.prepare(arguments)

  import jax

  from data import tokenizer as tokenizer_lib
  from launch import checkpoint, loop, models, phases, start
  from launch import mesh as mesh_lib
  from nn import model

  locked = config_lib.load(options.config, overrides)
  explicit = [key for key, _ in overrides]
  config = config_lib.Tracked(locked)
  models.adopt(locked, config.model_from, explicit)
  mesh_lib.init_distributed(options.coordinator, options.num_processes, options.process_id)
  tokenizer = tokenizer_lib.load(config.tokenizer)
  cfg = config_lib.model_config(config.model, tokenizer.vocab_size)
  mesh = mesh_lib.make_mesh(config.mesh.to_dict())
  run = phases.Run(config, cfg, model.specs(cfg), mesh, tokenizer, Path(options.workdir),
                   jax.random.key(config.seed))

  with contextlib.ExitStack() as ending:
    ending.enter_context(jax.set_mesh(mesh))
    ending.callback(run.close)

    # What a user can have got wrong is refused here, before anything is compiled or written.
    plan = phases.plan(config)
    saved = start.find_saved(run.workdir, locked, plan, options.allow_config_change)
    built = phases.build_all(run, plan)
    settings = start.read_settings(config, saved)
    config_lib.check_read(config, explicit, config_lib.load(options.config))
    changes = start.check(run, built, settings, saved, options.allow_config_change)

    checkpoints = ending.enter_context(checkpoint.Checkpointer(
        run.workdir, keep=settings.keep, best_metric=settings.best_metric,
        best_mode=settings.best_mode))
    start.write_config(run, locked)
    log = ending.enter_context(start.open_log(run, built, settings, saved, changes))
    stop = ending.enter_context(loop.StopSignal())
    hooks = start.make_hooks(run, built, settings, checkpoints, log, stop, locked)
    state, step = start.begin(run, built, checkpoints, settings.init, saved)
    try:
      for b in built:
        if step > b.phase.last or (step == b.phase.last and b is not built[-1]):
          continue
        goes_on = saved is not None and (saved['phase'], saved['step']) == (b.phase.name, step)
        grows = b.growth is not None and step == b.phase.first
        memory = checkpoints.memory(step) if goes_on or grows else None
        if grows:
          state = start.grow(b, state, memory, log)
        state, memory = start.enter(b, state, memory, goes_on and b.phase.name in changes)
        state = loop.train(b.phase, state, memory, step, hooks, fresh=grows or not goes_on)
        step = b.phase.last
        start.warn_of_rows(log, b, step)
      if settings.export:
        start.export(built[-1].run, settings, state.params, config.tokenizer)
    except loop.Stopped as signal:
      log.say(f'{signal}: saved; run the same command to go on')
      return 0
    except loop.NonFinite:
      log.say('stopped: nothing of that step is kept, the last checkpoint is whole')
      return 1
  if settings.report:
    start.finish(run)
  return 0


if __name__ == '__main__':
  cli.run(main)
