"""Every default of a run, once. A run's config starts here, sets what it wants, and returns it:

    from configs.base import get_config as base

    def get_config():
      c = base()
      c.rl.steps = 200
      return c

A key that is not here is an error, and so is a value of another type. None is not used: it has no
type to check overrides by, so 0, '' and () stand for "none" or "choose".
"""

import dataclasses

from ml_collections import ConfigDict

from nn.config import PARTS, RULES, ModelConfig
from rl.methods import METHODS

# Blocks whose keys a config invents; the value's type is given here.
OPEN = {'rl.rewards': str, 'rl.reward_weights': float}

# What tuples hold if not strings, by the last part of their key; tuple: names or tuples of names.
ELEMENTS = {'weights': float, 'pairs': int, 'head': tuple, 'pattern': tuple, 'tail': tuple}


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 0                           # of everything random: parameters, data order, sampling
  c.tokenizer = 'bytes'                # or a tokenizer.json, its folder, a SentencePiece *.model
  c.phases = ('pretrain',)             # in this order: pretrain, sft, rl
  c.init = ''                          # checkpoint whose parameters the first phase starts from
  c.model_from = ''                    # checkpoint whose model this is; '': c.model alone says it
  c.export = ''                        # folder for the model at the end, as transformers reads it
  c.streams = 1                        # sub-streams of the data; a multiple of the processes
  c.report = True                      # write report.html at the end

  defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}    # explained there
  c.model = ConfigDict({name: x for name, x in defaults.items()
                        if name not in ('rules', *PARTS) and x is not dataclasses.MISSING})
  for part in PARTS:                   # explained there, too
    c.model[part] = ConfigDict(dataclasses.asdict(defaults[part]))
  c.model.vocab_size = 0               # ids; 0: as many as the tokenizer has
  c.model.embed_dim = 128              # width D
  c.model.num_heads = 4                # query heads
  c.model.num_kv_heads = 4             # key and value heads; a divisor of num_heads
  c.model.head_dim = 32                # width of a head, even
  c.model.ffw_dim = 384                # hidden width of an FFN
  c.model.rules = ConfigDict(dict(RULES))     # logical axis -> mesh axes it is split over

  c.mesh = ConfigDict()                # devices along each mesh axis; -1: the rest
  c.mesh.data = -1                     # copies of the parameters, rows split
  c.mesh.fsdp = 1                      # rows and parameters split
  c.mesh.expert = 1                    # rows and experts split
  c.mesh.model = 1                     # heads, FFN and vocabulary split

  c.pretrain = text_phase()
  c.pretrain.data = data('text')
  c.sft = text_phase()
  c.sft.data = data('problem')

  c.rl = ConfigDict()
  c.rl.steps = 100                     # rollout batches
  c.rl.until = ''                      # ends the phase early: 'eval/accuracy>=0.9' at an evaluation
  c.rl.prompts = 32                    # prompts of a rollout batch
  c.rl.group = 8                       # samples per prompt
  c.rl.max_prompt = 64                 # tokens; prompts are padded to it
  c.rl.max_tokens = 64                 # of a response, with the token that ends it
  c.rl.parts = 1                       # optimiser steps a rollout batch is divided into
  c.rl.uses = 1                        # times a rollout batch is gone through
  c.rl.watch = False                   # log what tells of reuse gone wrong: norms of the head's
                                       # gradient and of the middle layer's, chi-square between new
                                       # and old policy, change of every layer's weights
  c.rl.gate = ConfigDict()             # ends reuse of a batch (arXiv:2605.19425), see rl/gate.py
  c.rl.gate.window = 0                 # increments of the head's gradient norm kept, as 32; 0: off
  c.rl.gate.threshold = 0.5            # deviations above their mean at which a gradient is refused
  c.rl.gate.squared = False            # the increments are those of the squared norm
  c.rl.microbatches = 1                # passes an optimiser step is divided into, to save memory
  c.rl.temperature = 1.0               # divides the logits, in sampling and training
  c.rl.top_k = 0                       # sample among the k likeliest ids; 0: all
  c.rl.top_p = 1.0                     # sample among the likeliest ids that hold this probability
  c.rl.min_p = 0.0                     # drop ids below this share of the likeliest one's chance
  c.rl.support = 64                    # ids recorded per token when these three cut some off
  c.rl.routing_replay = False          # training takes the experts that sampling took, gates anew
  c.rl.stop = ()                       # strings that end a response, beside the end token
  c.rl.methods = ('grpo',)             # names in rl/methods, composed in this order
  for name in METHODS:
    c.rl[name] = ConfigDict()          # options of a listed method; its signature has the defaults
  c.rl.rewards = ConfigDict()          # name -> exact, math, number, digits, or file.py:function
  c.rl.reward_weights = ConfigDict()   # name -> its weight in the sum; 1 where not given
  c.rl.deadline = 5.0                  # seconds a verifier may take for a response; then it is 0
  c.rl.graders = 1                     # worker processes that run verifiers
  c.rl.refills = 4                     # draws after the first when filters leave too few rows
  c.rl.max_empty = 10                  # steps running without a row left; then the run stops
  c.rl.reference = ''                  # checkpoint of the reference policy; '': as the phase began
  c.rl.reset_optimizer = True          # begin with fresh moments; they are carried on otherwise
  c.rl.optimizer = optimizer(1e-4)
  c.rl.data = data('problem')

  c.upcycle = ConfigDict()             # growth of the expert count in the run, see moe/upcycle.py
  c.upcycle.at_step = 0                # of the run, inside pretrain or sft; its checkpoint is the
                                       # model before. 0: never
  c.upcycle.factor = 2                 # times as many experts in every layer
  # Whom to copy: uniform, grad_sq, saliency, fisher, weight; fresh: nobody, all begin anew.
  c.upcycle.selection = 'uniform'
  c.upcycle.score_batches = 4          # optimiser steps whose gradients are scored, on from where
                                       # the data are
  c.upcycle.allocation = 'greedy'      # by scores: greedy (the best up to cap) or weighted (drawn)
  c.upcycle.cap = 3                    # greedy: most copies of one expert; 1 is uniform
  c.upcycle.temperature = 1.0          # weighted: of softmax(score / mean score / temperature)
  c.upcycle.noise = 1e-3               # standard deviation of noise on selection biases of copies
  c.upcycle.router_noise = 0.01        # without biases: on their router rows, as a share of its RMS
  c.upcycle.optimizer = 'copy'         # moments of copies: copy, reset, or scale (less the more a
                                       # copy changed)

  c.arithmetic = ConfigDict()          # the generated task, for data of format 'arithmetic'
  c.arithmetic.digits = 2              # of an operand, at most
  c.arithmetic.operands = 2            # numbers in a problem
  c.arithmetic.ops = ('+',)            # operators to draw from: +, -, *
  c.arithmetic.worked = False          # answers show their intermediate digits
  c.arithmetic.pad = False             # leading zeros: all problems are equally long
  c.arithmetic.backwards = False       # results are written from the units on, as computed
  c.arithmetic.train = 3072            # problems for RL
  c.arithmetic.demos = 1024            # problems with a demonstration, for SFT
  c.arithmetic.heldout = 512           # problems for evaluation; none of them is in the other two

  c.recall = ConfigDict()              # the generated task, for data of format 'recall'
  c.recall.pairs = (4, 8, 16, 32)      # of keys and values in a row; as many tokens of each
  c.recall.symbols = 64                # keys to draw from, and as many values
  c.recall.rows = 65536                # of each number of pairs; new ones in every epoch
  c.recall.heldout = 64                # rows of each for evaluation

  c.eval = ConfigDict()                # on held-out rows; at both ends of a phase, and
  c.eval.every = 100                   # steps apart
  c.eval.rows = 512                    # RL: at most this many problems; the others read all rows
  c.eval.reward = ''                   # RL: the one that says what is right; '': the only one
  c.eval.pass_k = 0                    # samples per problem for pass@k; 0: greedy accuracy only
  c.eval.temperature = 1.0             # of these samples

  c.checkpoint = ConfigDict()          # at the end of a phase, and
  c.checkpoint.every = 100             # steps apart
  c.checkpoint.keep = 2                # latest ones that are kept
  c.checkpoint.best_metric = ''        # evaluation metric whose best checkpoint is kept too
  c.checkpoint.best_mode = 'max'       # max or min: which value of it is best

  c.log = ConfigDict()
  c.log.every = 1                      # steps between lines of metrics
  c.log.samples_every = 10             # RL steps between kept samples, the best and the worst
  c.log.tensorboard = True             # write TensorBoard files too
  c.log.wandb = ''                     # Weights & Biases project; '': not used

  c.lock()
  for path in OPEN:
    c[path].unlock()
  for name in METHODS:
    c.rl[name].unlock()                # checked against the signature when the config is loaded
  return c


def text_phase() -> ConfigDict:
  """What pretraining and SFT have in common."""
  c = ConfigDict()
  c.steps = 1000                       # optimiser steps
  c.until = ''                         # ends the phase early: 'eval/loss<=0.5' at an evaluation
  c.rows = 32                          # of a step, on all devices
  c.length = 128                       # tokens of a row
  c.microbatches = 1                   # passes an optimiser step is divided into, to save memory
  c.reset_optimizer = True             # begin with fresh moments; they are carried on otherwise
  c.mtp = ConfigDict()                 # how model.mtp's heads are trained
  c.mtp.coef = 0.0                     # of the mean of their losses, as 0.3; 0: not trained
  c.mtp.switch = 0                     # step of the phase from which the coefficient is
  c.mtp.later = 0.1                    # this one; 0: it stays
  c.mtp.detach = ()                    # what learns nothing from them: of trunk, embedding, head
  c.optimizer = optimizer(1e-3)
  return c


def optimizer(learning_rate: float) -> ConfigDict:
  c = ConfigDict()
  c.name = 'adamw'                     # adamw or muon (matrices by Muon, the rest by Adam)
  c.learning_rate = learning_rate      # the highest of the schedule
  c.schedule = 'constant'              # constant, wsd (falls in the last `decay` steps), cosine
  c.warmup = 0                         # steps below the highest rate at the start, always
  c.decay = 0                          # steps below the highest rate at the end, wsd only
  c.floor = 0.0                        # where wsd and cosine end, as a share of the highest rate
  c.weight_decay = 0.0                 # of matrices, per step and unit of learning rate
  c.clip = 1.0                         # largest global norm of a gradient; 0: any
  c.b1 = 0.9                           # Adam: memory of the mean
  c.b2 = 0.95                          # Adam: memory of the mean square
  c.eps = 1e-8                         # Adam and Muon: added to denominators
  c.muon_beta = 0.95                   # Muon: memory of the mean
  c.muon_steps = 5                     # Muon: Newton-Schulz iterations
  c.muon_rms = 0.2                     # Muon: RMS of an update per unit of rate; 0.2 is Adam's
  c.adam_rate = 1.0                    # Muon: rate of what Adam does, as a share of learning_rate
  return c


def data(kind: str) -> ConfigDict:
  c = ConfigDict()
  c.format = kind                      # text, tokens, chat, problem; arithmetic, recall (generated)
  c.files = ()                         # paths or globs of .txt, .jsonl (.gz, .zst), .npy, .bin, ...
  c.weights = ()                       # of the entries of files in what is drawn; (): by size
  c.heldout = 0.0                      # share of the rows, from the end, kept for evaluation
  c.heldout_files = ()                 # for evaluation, in place of a share
  c.text = 'text'                      # field of a JSON row: plain text
  c.tokens = 'tokens'                  # field of a JSON row: list of ids
  c.dtype = ''                         # of .bin files, as uint16; '': '<name>.json' beside it says
  c.messages = 'messages'              # field of a JSON row: list of {role, content}
  c.prompt = 'prompt'                  # field of a JSON row: problem
  c.response = 'response'              # field of a JSON row: demonstration, for SFT
  c.answer = 'answer'                  # field of a JSON row: what rewards compare with
  c.prompt_template = '{prompt}'       # what the model is shown
  c.skip_bad_rows = False              # count and report malformed rows; an error otherwise
  c.skip_long_rows = False             # count and report rows that are too long; an error otherwise
  c.pack = True                        # several short rows side by side in one; SFT only
  c.shuffle = True                     # anew in every epoch
  c.workers = 0                        # processes that read ahead; 0: threads of this one
  c.cache = ''                         # folder of file indexes; '': in the workdir
  return c
