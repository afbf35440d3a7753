"""Takes the adapters out of a run: `python launch/adapters.py --workdir runs/x --peft out/adapter`.

--peft writes a folder that `peft.PeftModel.from_pretrained` reads on top of the public model they
were trained on. --merged writes a checkpoint of the model without adapters that computes the same,
for --config.init, launch/generate.py and everything else that reads a checkpoint.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import cli  # noqa: E402


def main(arguments: list[str]) -> int:
  options = parse(arguments)
  cli.prepare(arguments)

  import jax

  from launch import checkpoint, models, talk
  from launch import mesh as mesh_lib
  from nn import hf, lora, model, param
  from nn.config import LoRA
  from nn.hf import peft

  target = Path(options.peft or options.merged)
  if target.exists():
    raise ValueError(f'{target} exists and is never written over')
  folder = talk.find(options.workdir, options.step)
  known, meta = models.describe(folder), checkpoint.read_meta(folder)
  cfg = known.cfg
  if not cfg.lora.rank:
    raise ValueError(f'{folder} has no adapters: its model.lora.rank is 0')
  specs = model.specs(cfg)
  if options.peft:
    family = hf.family_of(known.origin.config) if known.origin else hf.choose(cfg)
    with checkpoint.reader(folder) as array:
      small = {name: array(f'lora/{name}') for name in param.flat(specs['lora'])}
    save(target, *peft.export(param.unflat(small), cfg, family, options.base))
    return 0
  mesh = mesh_lib.make_mesh(talk.mesh_sizes(options.mesh))
  where = param.shardings(specs, mesh, dict(cfg.rules))
  params = checkpoint.load_params(folder, param.abstract(specs, where))
  merge = jax.jit(lambda p: lora.merge(p, cfg.lora), out_shardings=lora.base(where))
  meta['config']['model']['lora'] = dataclasses.asdict(LoRA())
  kept = {name: meta[name] for name in ('config', 'phase', 'step', 'hf') if name in meta}
  checkpoint.save_params(target, merge(params), {**kept, 'from': str(folder)})
  return 0


def parse(arguments: list[str]) -> argparse.Namespace:
  p = cli.parser(__doc__)
  p.add_argument('--workdir', required=True, help='folder of a run with adapters, or of a step')
  p.add_argument('--step', type=int, default=None, help='of the checkpoint; default: the newest')
  p.add_argument(
      '--mesh', default='data=1', help='with --merged: devices to load it onto, as fsdp=2')
  p.add_argument('--base', default='', help='with --peft: name of the model without adapters')
  kinds = p.add_mutually_exclusive_group(required=True)
  kinds.add_argument('--peft', default='', help='folder to write in the format of peft')
  kinds.add_argument('--merged', default='', help='folder of a checkpoint to write')
  options = p.parse_args(arguments)
  if options.base and not options.peft:
    raise ValueError('--base has no effect without --peft')
  return options


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
  """Writes a folder of peft, which appears when it is whole.

  Args:
    config: of adapter_config.json.
    tensors: {name: float32 array} of adapter_model.safetensors.
  """
  from launch import hf_files

  with hf_files.appearing(folder) as partial:
    partial.mkdir(parents=True)
    shapes = {name: ('F32', x.shape) for name, x in tensors.items()}
    stored = hf_files.allocate(partial / 'adapter_model.safetensors', shapes)
    for name, x in tensors.items():
      hf_files.mapped(stored[name], 'r+')[...] = x
    hf_files.write_json(partial / 'adapter_config.json', config)


if __name__ == '__main__':
  cli.run(main)
