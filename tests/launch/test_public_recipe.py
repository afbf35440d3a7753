"""The recipe for a public model, on a random one: read from a folder, trained on files in GSM8K's
format over eight devices, and written as a folder again.
"""

import json

import jax.numpy as jnp
import numpy as np

import train_runs
from public_qwen3 import write_public
from data import tokenizer as tokenizer_lib
from launch import checkpoint, mesh, models
from nn import model, param

RECIPE = train_runs.ROOT / 'configs' / 'rl_gsm8k_qwen3.py'
TINY = ('rl.steps=2', 'rl.prompts=4', 'rl.group=4', 'rl.max_prompt=64', 'rl.max_tokens=4',
        'rl.microbatches=2', 'rl.graders=1', 'rl.optimizer.learning_rate=0.003',
        'rl.optimizer.warmup=0')


def test_the_recipe_trains_and_exports_a_public_model(tmp_path):
  public, workdir, out = (tmp_path / name for name in ('public', 'run', 'out'))
  cfg = write_public(public, tmp_path / 'tokenizer')
  for name, rows in {'train': 6, 'test': 2}.items():
    (tmp_path / f'{name}.jsonl').write_text(''.join(
        json.dumps({'question': f'How many {i}?', 'answer': 'It is 6 * 7.\n#### 42'})
        + '\n' for i in range(rows)))
  assert train_runs.run(
      workdir, *TINY, f'init={public}', f'model_from={public}', f'tokenizer={public}',
      f'export={out}', f'rl.data.files={tmp_path / "train.jsonl"}',
      f'rl.data.heldout_files={tmp_path / "test.jsonl"}', config=RECIPE) == 0

  steps, ends = train_runs.logged(workdir), train_runs.logged(workdir, evaluations=True)
  assert [*steps] == [('rl', 1), ('rl', 2)] and ends['rl', 2]['eval/problems'] == 2
  losses = [x['loss'] for x in steps.values() if 'loss' in x]      # none where all groups are alike
  assert losses and np.isfinite(losses).all(), steps
  assert models.describe(out) == models.describe(public)._replace(tokenizer=str(out))
  tokenizers_of = [tokenizer_lib.load(str(folder)).fingerprint() for folder in (public, out)]
  assert tokenizers_of[0] == tokenizers_of[1]

  # What was exported is the last checkpoint, rounded to the folder's bfloat16 once.
  sizes = {'data': 1, 'fsdp': 2, 'expert': 1, 'model': 4}
  abstract = param.abstract(model.specs(cfg), param.shardings(
      model.specs(cfg), mesh.make_mesh(sizes), dict(cfg.rules)))
  load = lambda path: param.flat(checkpoint.load_params(path, abstract, cfg))
  before, kept, after = load(public), load(workdir), load(out)
  for name, x in after.items():
    assert (kept[name] != before[name]).any(), name
    np.testing.assert_array_equal(x, kept[name].astype(jnp.bfloat16).astype(jnp.float32))
