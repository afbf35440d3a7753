"""Takes the adapters out of a run: `python launch/adapters.py --workdir runs/x --peft out/adapter`.

--peft writes a folder that `peft.PeftModel.from_pretrained` reads on top of the public model they were
trained on. --merged writes a checkpoint of the model without adapters that computes the same, for
--config.init, launch/generate.py and everything else that reads a checkpoint.
"""

import argparse
import dataclasses
import json
import os
import shutil
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
    raise ValueError(f'{target} exists; nothing is written over')
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
  p.add_argument('--mesh', default='data=1', help='with --merged: devices to load it onto, as fsdp=2')
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
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for name, x in tensors.items():
    header[name] = {'dtype': 'F32', 'shape': list(x.shape), 'data_offsets': [end, end + x.nbytes]}
    end += x.nbytes
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  partial = folder.with_name(f'{folder.name}.partial-{os.getpid()}')
  try:
    partial.mkdir(parents=True)
    with (partial / 'adapter_model.safetensors').open('wb') as file:
      file.write(len(text).to_bytes(8, 'little') + text)
      for x in tensors.values():
        file.write(x.astype('<f4').tobytes())
    (partial / 'adapter_config.json').write_text(json.dumps(config, indent=2) + '\n')
    partial.rename(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


if __name__ == '__main__':
  cli.run(main)
