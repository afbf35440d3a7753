"""Evaluates a model on tasks.

    python launch/evaluate.py --model runs/x --task gsm8k --files test.jsonl --output out

    task           rows                             the model is to
    gsm8k          question, answer                 answer; right if mathematically equivalent
    math           prompt, answer                   the same
    exact          prompt, answer                   answer; right if the same text
    choice         prompt, choices, answer (index)  find the right one likeliest, raw and per token
    choice_letter  prompt, choices, answer (index)  name the right choice's letter
    perplexity     text, or a plain text file       expect the text

Rows are .jsonl (also .gz, .zst). Several tasks: repeat --task and --files, in the same order. The
output folder gets metrics.json, and <task>.jsonl with a line for every output.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import cli  # noqa: E402


def main(arguments: list[str]) -> int:
  options = parse(arguments)
  cli.prepare(arguments)

  import tempfile

  import jax
  from data import files
  from launch import checkpoint, eval_parts, talk

  folder = Path(options.output)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'--output {folder} is a file; wanted a folder')
  talk.check_asking(options)
  plan = eval_parts.read_plan(options)
  try:
    from evals import tasks
  except ImportError as error:
    raise ValueError(f"evaluation needs seqio: pip install -e '.[eval]' ({error})") from error
  speaker = talk.open_model(
      options.model, talk.mesh_sizes(options.mesh), options.step, options.template)
  sampling = talk.make_sampling(speaker, options)
  codec = eval_parts.make_codec(speaker, sampling, options)
  with tempfile.TemporaryDirectory() as cache:
    examples = {name: eval_parts.read_examples(name, *task, codec, options.limit, cache)
                for name, task in plan.items()}
  answer = eval_parts.make_answer(speaker, sampling, options)
  score = eval_parts.make_score(speaker, options.rows)
  with jax.set_mesh(speaker.mesh):
    results = tasks.evaluate(examples, codec, answer, score)

  for name, (numbers, lines) in results.items():
    with files.whole(folder / f'{name}.jsonl') as out:
      for line in lines:
        out.write((json.dumps(line, ensure_ascii=False) + '\n').encode())
    print(f'{name}: ' + ', '.join(f'{key} {number(value)}' for key, value in numbers.items()))
  with files.whole(folder / 'metrics.json') as out:
    out.write(json.dumps({
        'tasks': {name: numbers for name, (numbers, _) in results.items()},
        'step': speaker.step, 'options': vars(options), **checkpoint.provenance(),
    }, indent=1).encode())
  return 0


def parse(arguments: list[str]):
  p = cli.parser(__doc__, cli.asking_parser(temperature=0.0))
  p.add_argument('--model', required=True, help='a run, one of its steps, or a Hugging Face folder')
  p.add_argument('--step', type=int, help='of the checkpoint; the newest if not given')
  p.add_argument('--task', action='append', required=True, help='may be given several times')
  p.add_argument('--files', action='append', required=True, nargs='+',
                 help='of the task with the same place, or globs')
  p.add_argument('--fields', default='',
                 help="where rows name them otherwise: 'prompt=question,answer=gold'")
  p.add_argument('--output', required=True, help='folder to write')
  p.add_argument('--num', type=int, default=1, help='responses to each prompt, for pass@num')
  p.add_argument('--limit', type=int, default=0, help='rows of every task, the first; 0: all')
  p.add_argument('--rows', type=int, default=16, help='sampled or scored at once')
  p.add_argument('--mesh', default='data=1', help='devices along mesh axes, for instance model=4')
  return p.parse_args(arguments)


def number(value) -> str:
  return f'{value:.4g}' if isinstance(value, float) else str(value)


if __name__ == '__main__':
  cli.run(main)
