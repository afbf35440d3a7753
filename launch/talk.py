"""A checkpoint that answers: restored with its config and tokenizer, asked as it was trained."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from data import chat, fields
from data import tokenizer as tokenizer_lib
from launch import checkpoint, growth, rl_phase
from launch import config as config_lib
from launch import engine as engine_lib
from launch import mesh as mesh_lib
from nn import model, param
from nn.config import ModelConfig
from rl import sample

MOST_TOKENS = 256      # of a response, where nothing else is said
CANDIDATES = 1024      # likeliest ids among which top_p and min_p choose, see rl/sample.py


@dataclasses.dataclass(frozen=True)
class Speaker:
  """What is needed to talk to a checkpoint."""
  step: int
  cfg: ModelConfig
  tokenizer: Any
  mesh: jax.sharding.Mesh
  params: Any
  template: str            # what a prompt is put into
  field: str               # what the template may call the prompt, beside 'prompt'
  chats: bool              # trained on conversations


@dataclasses.dataclass(frozen=True)
class Reply:
  text: str                # up to a stop string
  ids: list[int]           # all that was sampled, with what ended it
  logp: float              # of the ids together, in nats; see rl/sample.py, Sampled
  ended: bool              # by itself; False: max_tokens came first


def load(workdir: str, step: int | None, sizes: Mapping[str, int], template: str | None) -> Speaker:
  """Restores parameters, config and tokenizer.

  Args:
    workdir: of a run, or the folder of a step.
    step: None for the newest.
    sizes: of the mesh, see launch/mesh.py.
    template: what prompts are put into; None for that of the checkpoint's phase.

  Raises:
    ValueError: there is no such checkpoint, or it is of parameters alone.
  """
  folder = find(workdir, step)
  meta = checkpoint.read_meta(folder)
  if 'config' not in meta:
    raise ValueError(f'{folder} holds parameters alone, without config and tokenizer; '
                     'give the folder of a run')
  config = config_lib.from_json(json.dumps(meta['config']))
  tokenizer = tokenizer_lib.load(config.tokenizer)
  cfg = growth.model_at(config, tokenizer.vocab_size, meta['step'])
  mesh = mesh_lib.make_mesh(sizes)
  specs = model.specs(cfg)
  shardings = param.shardings(specs, mesh, dict(cfg.rules))
  params = checkpoint.load_params(folder, param.abstract(specs, shardings))
  data = config[meta['phase']].data
  problem = data.format == 'problem'
  if template is None:
    template = data.prompt_template if problem else '{prompt}'
  return Speaker(
      meta['step'], cfg, tokenizer, mesh, params, template, data.prompt if problem else 'prompt',
      data.format == 'chat')


def check_template(template: str | None, is_chat: bool) -> None:
  """Refuses a template that would have no effect, or leave the prompt out."""
  if is_chat and template is not None:
    raise ValueError('--template has no effect on a conversation; leave it out, or --chat')
  if template is not None and '{prompt}' not in template:
    raise ValueError(f'template {template!r} is without {{prompt}}')


def find(workdir: str, step: int | None) -> Path:
  """The folder of a whole checkpoint."""
  if step is None:
    return checkpoint.find(workdir)
  folder = Path(workdir) / checkpoint.FOLDER
  if step not in (steps := checkpoint.whole_steps(folder)):
    raise ValueError(f'{workdir} has no checkpoint of step {step}; there are {steps}')
  return checkpoint.find(folder / str(step))


def mesh_sizes(text: str) -> dict[str, int]:
  """'fsdp=2,model=2' -> {axis: devices}."""
  sizes = {}
  for part in text.split(','):
    axis, _, number = part.partition('=')
    if not number.removeprefix('-').isdigit():
      raise ValueError(f'mesh {text!r}: wanted axis=devices, with commas between several, as in '
                       'fsdp=2,model=2')
    sizes[axis.strip()] = int(number)
  return sizes


def make_sampling(
    speaker: Speaker, *, max_tokens: int, temperature: float, top_k: int, top_p: float,
    min_p: float, stop: tuple[str, ...],
) -> sample.Sampling:
  """The options of a command as the sampler's.

  Args:
    max_tokens: 0 for half of what the model can read, at most MOST_TOKENS.
  """
  cfg = speaker.cfg
  if max_tokens >= cfg.max_length:
    raise ValueError(f'max_tokens is {max_tokens}, but the model reads at most {cfg.max_length} '
                     'tokens with the prompt')
  return sample.Sampling(
      max_tokens=max_tokens or min(MOST_TOKENS, max(1, cfg.max_length // 2)),
      temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
      support=min(cfg.vocab_size, top_k or CANDIDATES), eos=(speaker.tokenizer.eos_id,),
      stop=tuple(text.encode() for text in stop))


def prompt(speaker: Speaker, text: str) -> tuple[str, list[int]]:
  """Text and ids of a prompt in its template."""
  form = fields.Format(kind='problem', prompt=speaker.field, prompt_template=speaker.template)
  return fields.prompt({speaker.field: text}, form, speaker.tokenizer)


def chat_prompt(speaker: Speaker, messages: list[dict]) -> tuple[str, list[int]]:
  """Text and ids of a conversation that the model is to continue."""
  return chat.prompt(speaker.tokenizer, messages)


def make_answer(speaker: Speaker, num: int, sampling: sample.Sampling) -> Callable:
  """answer(prompts: list of ids, key) -> [prompts][num] of Reply.

  It compiles once per number of prompts and length of the longest, the latter in steps of
  `engine.BUCKET` tokens.
  """
  tokenizer, cfg = speaker.tokenizer, speaker.cfg
  room = cfg.max_length - sampling.max_tokens
  table = sample.pack_bytes(tokenizer.token_bytes(), cfg.vocab_size) if sampling.stop else None
  if num < 1:
    raise ValueError(f'num is {num}, wanted at least 1')

  @functools.cache
  def sampler(width):
    return engine_lib.make_sample(cfg, speaker.mesh, width, table)

  def reply(rows, n):
    text = rl_phase.response_text(tokenizer, rows, n)
    ends = [text.find(stop.decode()) for stop in sampling.stop if stop.decode() in text]
    ids = rows.tokens[n, rows.start[n]:rows.end[n]].tolist()
    return Reply(text[:min(ends, default=len(text))], ids, float(rows.logp[n].sum()),
                 bool(rows.info['stopped'][n]))

  def answer(prompts, key):
    longest = max(map(len, prompts))
    if longest > room:
      raise ValueError(f'a prompt of {longest} tokens is too long: the model reads '
                       f'{cfg.max_length}, of which {sampling.max_tokens} are kept for the '
                       'response (max_tokens)')
    draw = sampler(min(engine_lib.round_up(longest, engine_lib.BUCKET), room))
    rows = draw(speaker.params, prompts, num, sampling, key)
    return [[reply(rows, n) for n in range(i * num, (i + 1) * num)] for i in range(len(prompts))]

  return answer
