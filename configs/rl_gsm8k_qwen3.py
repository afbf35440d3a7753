"""GRPO on GSM8K's files with a public Qwen3; planned for Qwen3-1.7B on eight v5e or v6e chips.

    python launch/train.py --config configs/rl_gsm8k_qwen3.py --workdir runs/qwen3 \\
        --config.init=Qwen3-1.7B --config.model_from=Qwen3-1.7B --config.tokenizer=Qwen3-1.7B \\
        --config.export=Qwen3-1.7B-gsm8k \\
        --config.rl.data.files=train.jsonl --config.rl.data.heldout_files=test.jsonl

Qwen3-1.7B is the folder as published; the export is one like it. On one H200: --config.mesh.fsdp=1
--config.mesh.model=1. docs/interop.md says what a device holds, compiled ahead of time.
"""

from configs.base import get_config as base


def get_config():
  c = base()
  c.phases = ('rl',)

  c.model.dtype = 'bfloat16'
  c.model.remat = 'full'
  c.model.max_length = 1024
  c.mesh.fsdp = 2
  c.mesh.model = 4                     # weights are split, and not gathered for every sampled token

  c.rl.steps = 200
  c.rl.prompts = 32
  c.rl.group = 8
  c.rl.max_prompt = 256
  c.rl.max_tokens = 768
  c.rl.microbatches = 8
  c.rl.methods = ('dapo',)
  c.rl.rewards.math = 'math'
  c.rl.optimizer.learning_rate = 1e-6
  c.rl.optimizer.warmup = 10
  c.rl.graders = 4
  c.rl.data.prompt = 'question'
  c.rl.data.answer = 'answer'
  c.rl.data.prompt_template = (
      '<|im_start|>user\n{question}\nReason step by step, and put the answer into \\boxed{}.'
      '<|im_end|>\n<|im_start|>assistant\n')
  c.rl.data.skip_long_rows = True

  c.eval.every = 20
  c.eval.rows = 256
  c.checkpoint.every = 20
  c.log.samples_every = 5
  return c
