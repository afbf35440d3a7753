"""Talks to a checkpoint: `python launch/generate.py --workdir runs/x --prompt 'What is 12 + 7?'`.

Without --prompt, or with --interactive, prompts are read from standard input, one a line. A prompt
is put into the template of the phase that the checkpoint is from, so that the model is asked as it
was trained; with --chat into the tokenizer's chat template instead. Responses go to standard
output, remarks to standard error.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import cli  # noqa: E402

NEW = '/new'           # typed instead of a prompt: forget the conversation


def main(arguments: list[str]) -> int:
  options = parse(arguments)
  cli.prepare(arguments)

  import jax
  from launch import talk

  talk.check_asking(options)
  sizes = talk.mesh_sizes(options.mesh)
  speaker = talk.open_model(options.workdir, sizes, options.step, options.template)
  sampling = talk.make_sampling(speaker, options)
  if speaker.chats and not options.chat:
    remark('this checkpoint was trained on conversations; --chat asks it so')
  before = [{'role': 'system', 'content': options.system}] if options.system else []
  say = lambda messages, text: [*messages, {'role': 'user', 'content': text}]
  if options.chat:
    ask = lambda messages: talk.chat_prompt(speaker, messages)
  else:
    ask = lambda messages: talk.prompt(speaker, messages[-1]['content'])
  answer = talk.make_answer(speaker, options.num, sampling)
  key = jax.random.key(options.seed)

  with jax.set_mesh(speaker.mesh):
    if options.prompt:
      asked = [ask(say(before, text)) for text in options.prompt]
      show(options, speaker, asked, answer([ids for _, ids in asked], key))
    if options.prompt and not options.interactive:
      return 0
    messages = before
    for turn, line in enumerate(lines(), 1):
      if line == NEW:
        messages = before
        continue
      now = say(messages, line)
      try:
        asked = ask(now)
        replies = answer([asked[1]], jax.random.fold_in(key, turn))
      except ValueError as error:
        hint = f' ({NEW} begins a new conversation)' * options.chat
        remark(f'error: {cli.one_line(error)}{hint}')
        continue
      show(options, speaker, [asked], replies)
      messages = [*now, {'role': 'assistant', 'tokens': replies[0][0].ids}]
  return 0


def parse(arguments: list[str]):
  p = cli.parser(__doc__, cli.asking_parser(temperature=1.0))
  p.add_argument('--workdir', required=True, help='a run, one of its steps, or a Hugging Face folder')
  p.add_argument('--step', type=int, help='of the checkpoint; the newest if not given')
  p.add_argument('--prompt', action='append', default=[], help='may be given several times')
  p.add_argument('--interactive', action='store_true', help='after that, read prompts')
  p.add_argument('--num', type=int, default=1, help='responses to each prompt')
  p.add_argument('--json', action='store_true', help='print one JSON object per response')
  p.add_argument('--mesh', default='data=1', help='devices along mesh axes, for instance model=4')
  return p.parse_args(arguments)


def lines():
  """What is typed, or piped in, until it ends."""
  if sys.stdin.isatty():
    import readline  # noqa: F401  input() then edits lines
    try:
      while True:
        yield input('> ')
    except (EOFError, KeyboardInterrupt):
      print(file=sys.stderr)
  else:
    for line in sys.stdin:
      yield line.rstrip('\n')


def show(options, speaker, asked, replies) -> None:
  """Prints the replies to every prompt, [prompts][num]."""
  import json
  several = len(asked) * options.num > 1
  for (text, _), group in zip(asked, replies):
    for n, reply in enumerate(group, 1):
      if options.json:
        print(json.dumps({
            'prompt': text, 'response': reply.text, 'tokens': len(reply.ids), 'logp': reply.logp,
            'ended': reply.ended, 'step': speaker.step}, ensure_ascii=False), flush=True)
        continue
      if several:
        print(f'--- {text!r}, response {n}')
      print(reply.text, flush=True)
      if not reply.ended:
        remark(f'(cut off after {len(reply.ids)} tokens, see --max_tokens)')


def remark(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


if __name__ == '__main__':
  cli.run(main)
