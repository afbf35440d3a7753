"""Turns Hugging Face folders into checkpoints and back.

    python launch/convert.py --from-hf Qwen3-0.6B --to runs/qwen3
    python launch/convert.py --to-hf Qwen3-0.6B-mine --from runs/x
    python launch/convert.py --from-hf Kimi-Linear --to runs/finer --warm-start fg2_plus

A checkpoint is what --config.init takes; one of a run, or of its step, may be given to --from. What
is written appears whole or not at all. Models that no class of transformers computes are written in
the format of nn/hf/own.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import cli  # noqa: E402


def main(arguments: list[str]) -> int:
  options = parse(arguments)
  cli.prepare(arguments)
  from launch import conversion, hf_files
  if options.from_hf:
    if found := hf_files.heads(options.from_hf, options.drop):
      print(f'{options.from_hf}: {found}')
    count = conversion.to_checkpoint(
        options.from_hf, options.to, options.mesh, options.drop, options.warm_start)
    print(f'{options.to}: {count:,} parameters of {options.from_hf}')
  else:
    count = conversion.to_public(options.source, options.to_hf, options.dtype, options.tokenizer)
    print(f'{options.to_hf}: {count:,} parameters of {options.source}')
  return 0


def parse(arguments: list[str]):
  p = cli.parser(__doc__)
  p.add_argument('--from-hf', default='', help='Hugging Face folder to read')
  p.add_argument('--to', default='', help='checkpoint to write; must not exist')
  p.add_argument('--drop', action='append', default=[],
                  help="pattern of tensors to leave out, as 'mtp.*' or 'model.visual.*'; "
                       'may be given several times')
  p.add_argument('--warm-start', default='', choices=('', 'kda', 'fg2', 'fg2_plus', 'gdn2'),
                 help='variant that layers of Gated DeltaNet or KDA become; the same function')
  p.add_argument('--mesh', default='data=1', help='devices along mesh axes, for instance fsdp=4')
  p.add_argument('--from', dest='source', default='', help='checkpoint to read')
  p.add_argument('--to-hf', default='', help='Hugging Face folder to write; must not exist')
  p.add_argument('--dtype', default='', choices=('', 'float32', 'bfloat16', 'float16'),
                 help='of the tensors written; as they once were, or float32, if not given')
  p.add_argument('--tokenizer', default='', help="folder of the tokenizer, if not the model's own")
  options = p.parse_args(arguments)
  ways = {'--from-hf with --to': (options.from_hf, options.to),
          '--to-hf with --from': (options.to_hf, options.source)}
  given = [way for way, values in ways.items() if any(values)]
  if len(given) != 1 or not all(ways[given[0]]):
    raise ValueError(f'wanted either {" or ".join(ways)}')
  useless = {'--drop': options.drop, '--warm-start': options.warm_start} if options.to_hf else {
      '--dtype': options.dtype, '--tokenizer': options.tokenizer}
  if unused := [name for name, value in useless.items() if value]:
    raise ValueError(f'{", ".join(unused)} has no effect with {given[0]}')
  return options


if __name__ == '__main__':
  cli.run(main)
