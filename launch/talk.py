"""A checkpoint in use: opened with its config and tokenizer, asked as it was trained."""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from data import chat, fields
from data import tokenizer as tokenizer_lib
from launch import checkpoint, hf_files, models, rl_phase
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
  """A model with what is needed to talk to it."""
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


def open_model(path: str, sizes: Mapping[str, int], step: int | None = None,
               template: str | None = None) -> Speaker:
  """Restores parameters, config and tokenizer. The one door by which commands get a model.

  Args:
    path: the workdir of a run, the folder of a step, what launch/convert.py wrote, or a Hugging
      Face folder.
    sizes: of the mesh, see launch/mesh.py.
    step: of a workdir; None for the newest.
    template: what prompts are put into; None for that of the checkpoint's phase, if it has one.

  Raises:
    ValueError: there is no such checkpoint, or it is of parameters alone, or without a tokenizer.
  """
  public = hf_files.is_folder(path)
  if public and step is not None:
    raise ValueError(f'{path} is a Hugging Face folder, which has no step {step}')
  source = path if public else find(path, step)
  meta = {} if public else checkpoint.read_meta(source)
  known = models.describe(source)
  if not known.tokenizer:
    raise ValueError(f'{source} has no tokenizer; put a tokenizer.json into it')
  tokenizer, cfg, mesh = tokenizer_lib.load(known.tokenizer), known.cfg, mesh_lib.make_mesh(sizes)
  if tokenizer.vocab_size > cfg.vocab_size:
    raise ValueError(f'{source}: the tokenizer has {tokenizer.vocab_size} ids, the model '
                     f'{cfg.vocab_size}')
  specs = model.specs(cfg)
  shardings = param.shardings(specs, mesh, dict(cfg.rules))
  params = checkpoint.load_params(source, param.abstract(specs, shardings), cfg)
  form = asked_as(meta)
  return Speaker(
      meta.get('step', 0), cfg, tokenizer, mesh, params,
      form.prompt_template if template is None else template, form.prompt, form.kind == 'chat')


def asked_as(meta: Mapping[str, Any]) -> fields.Format:
  """How prompts were put to a model when it was trained: of the phase that a checkpoint is from."""
  if 'config' not in meta:
    return fields.Format()
  data = config_lib.from_json(json.dumps(meta['config']))[meta['phase']].data
  if data.format != 'problem':
    return fields.Format(kind='chat' if data.format == 'chat' else 'problem')
  return fields.Format(prompt=data.prompt, prompt_template=data.prompt_template)


def check_asking(options: argparse.Namespace) -> None:
  """Refuses options of cli.asking_parser without effect, and templates without the prompt."""
  if options.system and not options.chat:
    raise ValueError('--system is part of a conversation; it needs --chat')
  if options.chat and options.template is not None:
    raise ValueError('--template has no effect on a conversation; leave it out, or --chat')
  if options.template is not None and '{prompt}' not in options.template:
    raise ValueError(f'template {options.template!r} is without {{prompt}}')


def find(path: str, step: int | None) -> Path:
  """The folder of a whole checkpoint."""
  if step is None:
    return checkpoint.find(path)
  folder = Path(path) / checkpoint.FOLDER
  if step not in (steps := checkpoint.whole_steps(folder)):
    raise ValueError(f'{path} has no checkpoint of step {step}; there are {steps}')
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


def make_sampling(speaker: Speaker, options: argparse.Namespace) -> sample.Sampling:
  """The options of cli.asking_parser as the sampler's."""
  cfg = speaker.cfg
  if options.max_tokens >= cfg.max_length:
    raise ValueError(f'max_tokens is {options.max_tokens}, but the model reads at most '
                     f'{cfg.max_length} tokens with the prompt')
  return sample.Sampling(
      max_tokens=options.max_tokens or min(MOST_TOKENS, max(1, cfg.max_length // 2)),
      temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
      min_p=options.min_p, support=min(cfg.vocab_size, options.top_k or CANDIDATES),
      eos=speaker.tokenizer.end_ids, stop=tuple(text.encode() for text in options.stop))


def prompt(speaker: Speaker, text: str) -> tuple[str, list[int]]:
  """Text and ids of a prompt in its template."""
  form = fields.Format(kind='problem', prompt=speaker.field, prompt_template=speaker.template)
  return fields.prompt({speaker.field: text}, form, speaker.tokenizer)


def chat_prompt(speaker: Speaker, messages: list[dict]) -> tuple[str, list[int]]:
  """Text and ids of a conversation that the model is to continue."""
  return chat.prompt(speaker.tokenizer, messages)


def make_answer(speaker: Speaker, num: int, sampling: sample.Sampling) -> Callable:
  """answer(prompts: list of ids, key) -> [prompts][num] of Reply.

  It compiles once per number of prompts and length of the longest, the latter one of few.
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
    ids = rows.tokens[n, rows.start[n]:rows.end[n]].tolist()
    return Reply(response_text(tokenizer, ids, sampling.stop), ids, float(rows.logp[n].sum()),
                 bool(rows.info['stopped'][n]))

  def answer(prompts, key):
    longest = max(map(len, prompts))
    if longest > room:
      raise ValueError(f'a prompt of {longest} tokens is too long: the model reads '
                       f'{cfg.max_length}, of which {sampling.max_tokens} are kept for the '
                       'response (max_tokens)')
    draw = sampler(engine_lib.few(longest, room))
    rows = draw(speaker.params, prompts, num, sampling, key)
    return [[reply(rows, n) for n in range(i * num, (i + 1) * num)] for i in range(len(prompts))]

  return answer


def response_text(tokenizer: Any, ids: list[int], stop: tuple[bytes, ...]) -> str:
  """The text of sampled ids, up to a stop string."""
  text = rl_phase.text_of(tokenizer, ids)
  ends = [text.find(end.decode()) for end in stop if end.decode() in text]
  return text[:min(ends, default=len(text))]
