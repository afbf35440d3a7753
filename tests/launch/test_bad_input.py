"""Every mistake is one clear line and exit status 2, before anything is compiled or written."""

import json
import re

import pytest

import train_runs
from launch import metrics


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
  """refused(*overrides) -> the line."""
  def call(*overrides, **options):
    return train_runs.refused(monkeypatch, capsys, tmp_path / 'run', *overrides, **options)
  return call


@pytest.fixture
def failed(monkeypatch, capsys, tmp_path):
  """failed(*overrides) -> the line of a run that had begun."""
  def call(*overrides, **options):
    return train_runs.failed(monkeypatch, capsys, tmp_path / 'run', *overrides, **options)
  return call


@pytest.mark.parametrize('overrides, said', [
    ('sft.stepz=3', "unknown key 'sft.stepz'; did you mean 'sft.steps'?"),
    ('rl.steps=many', "--config.rl.steps is 'many', wanted a whole number"),
    ('rl.methods=gropo', "unknown method 'gropo'; did you mean 'grpo'?"),
    ('rl.methods=grpo,leave_one_out', 'one advantage estimator wanted'),
    ('rl.data.files=x.jsonl', "without effect: rl.data.files = ('x.jsonl',)"),
    ('rl.reference=x rl.grpo.beta=0.0', "without effect: rl.reference = 'x'"),
    ('phases=sft,rll', "unknown phase 'rll'; did you mean 'rl'?"),
    ('phases=sft,sft', "names ['sft'] twice"),
    ('phases=,', 'phases is empty'),
    ('seed=-1', 'seed is -1, wanted at least 0'),
    ('model.vocab_size=100', 'model.vocab_size is 100, fewer than the 259 ids of the tokenizer'),
    ('tokenizer=/no/where', '/no/where'),
    ('sft.length=64', 'sft.length is 64 tokens, longer than model.max_length 32'),
    ('rl.max_tokens=40', 'rl.max_prompt + rl.max_tokens is 48 tokens, longer than model.max_'),
    ('mesh.data=16', 'model=1 needs 16 devices, there are 8'),
    ('mesh.data=3', 'sft: 8 rows of an optimiser step cannot be divided into 1 microbatches on 3'),
    ('sft.microbatches=3', 'sft: 8 rows of an optimiser step cannot be divided into 3 microb'),
    ('mesh.model=2', "embed/table: axis 'vocab' of size 259 cannot be split 2 ways"),
    ('rl.parts=3', 'rl.prompts 4 x rl.group 4 rows cannot be divided into rl.parts 3'),
    ('streams=3', '8 rows, 3 streams, 1 processes: each must divide the one before'),
    ('sft.microbatches=0', 'sft.microbatches is 0, wanted at least 1'),
    ('eval.every=0', 'eval.every is 0, wanted at least 1'),
    ('checkpoint.every=0', 'checkpoint.every is 0, wanted at least 1'),
    ('rl.group=0', 'rl.group is 0, wanted at least 1'),
    ('sft.steps=-1', 'sft.steps is -1, wanted at least 0'),
    ('rl.top_k=300 rl.support=300', 'ask for 300 candidates, the vocabulary has 259'),
    ('sft.optimizer.learning_rate=-1', "'learning_rate': -1.0"),
    ('rl.optimizer.name=muon rl.reset_optimizer=false', 'rl: the optimiser of the phase before'),
    ('arithmetic.train=1000', 'arithmetic problems wanted'),
    ('rl.routing_replay=true', 'rl.routing_replay is set, but no layer has experts'),
    ('rl.rewards.exact=exakt', "unknown reward 'exakt'; did you mean 'exact'?"),
    ('rl.rewards.exact=/no/file.py:f', 'there is no file /no/file.py'),
    ('rl.reward_weights.exakt=2', "'exakt'; did you mean 'exact'?"),
    ('eval.reward=', "eval.reward: which of ['digits', 'exact'] says that an answer is right?"),
    ('eval.reward=exakt', "'exakt'; did you mean 'exact'?"),
    ('checkpoint.best_metric=eval/loss1',
     "measure ['eval/accuracy', 'eval/loss', 'eval/token_accuracy']"),
    ('sft.until=eval/los<=1', "sft.until is 'eval/los<=1'; the evaluations of this phase measure "
     "['eval/accuracy', 'eval/loss', 'eval/token_accuracy']"),
    ('rl.until=accuracy>0.9', "rl.until is 'accuracy>0.9', wanted a metric of an evaluation and a"),
    ('checkpoint.best_mode=most', "checkpoint.best_mode is 'most', wanted max or min"),
    ('init=/no/where', '/no/where is no folder; wanted a workdir, or the folder'),
    ('rl.reference=/no/where', '/no/where is no folder'),
])
def test_settings_that_cannot_be(refused, overrides, said):
  assert said in refused(*overrides.split())


def test_a_config_that_is_not_there_or_is_wrong(refused, tmp_path):
  assert "did you mean" in refused(config=train_runs.TINY.with_name('tine.py'))
  wrong = tmp_path / 'wrong.py'
  wrong.write_text('from configs.tiny import get_config as g\ndef get_config():\n  c = g()\n'
                   '  c.rl.step = 3\n  return c\n')
  assert f"{wrong}:4: c.rl.step = 3: unknown key 'step'" in refused(config=wrong)


@pytest.mark.parametrize('text, said', [
    (None, 'no file matches'),
    ('', 'is empty'),
    ('\n\n', 'every line is blank'),
    ('{"prompt": "a", "response": "b"\n', 'rows.jsonl:1: not JSON'),
    ('\n[1]\n', 'rows.jsonl:2: a JSON list, wanted an object'),
    ('{"prompt": "a", "respond": "b"}\n', "rows.jsonl:1: field 'response' is missing; the row has"),
    ('{"prompt": "a", "response": 3}\n', "rows.jsonl:1: field 'response' is int, wanted text"),
    ('{"prompt": "a", "response": "%s"}\n' % ('b' * 40), 'rows.jsonl:1: 42 tokens, rows have 16'),
])
def test_files_that_cannot_be_trained_on(refused, tmp_path, text, said):
  path = tmp_path / 'rows.jsonl'
  if text is not None:
    path.write_text(text)
  assert said in refused(
      'phases=sft', f'sft.data.files={path}', config=train_runs.config_file(tmp_path))


@pytest.mark.parametrize('text, said', [
    ('{"prompt": "a"}\n', "rows.jsonl:1: field 'answer' is missing; the row has ['prompt']"),
    ('{"answer": "a"}\n', "rows.jsonl:1: field 'prompt' is missing"),
    ('{"prompt": "%s", "answer": ""}\n' % ('b' * 40), 'rows.jsonl:1: a prompt of 40 tokens, max'),
])
def test_problems_that_cannot_be_asked(refused, tmp_path, text, said):
  path = tmp_path / 'rows.jsonl'
  path.write_text(text)
  assert said in refused(
      'phases=rl', f'rl.data.files={path}', config=train_runs.config_file(tmp_path))


def test_rewards_that_cannot_be_loaded(refused, tmp_path):
  path = tmp_path / 'reward.py'
  path.write_text('import nothing_of_this_name\ndef score(prompt, response, row):\n  return 1.0\n')
  assert "No module named 'nothing_of_this_name'" in refused(f'rl.rewards.exact={path}:score')
  assert "unknown function 'scores'; did you mean 'score'?" in refused(
      f'rl.rewards.exact={path}:scores')


def rows_file(path, bad_line):
  rows = [json.dumps({'prompt': f'{i % 10}=', 'response': str(i % 10)}) for i in range(40)]
  rows[5] = bad_line
  path.write_text('\n'.join(rows) + '\n')


@pytest.mark.parametrize('option, bad_line, fault, said', [
    ('skip_bad_rows', '{"prompt": "x"}', 'bad', "rows.jsonl:6: field 'response' is missing"),
    ('skip_long_rows', '{"prompt": "x", "response": "%s"}' % ('y' * 20), 'long',
     'rows.jsonl:6: 22 tokens, rows have 16'),
])
def test_bad_rows_stop_a_run_or_are_counted(failed, tmp_path, option, bad_line, fault, said):
  path, workdir = tmp_path / 'rows.jsonl', tmp_path / 'skips'
  rows_file(path, bad_line)
  overrides = ('phases=sft', f'sft.data.files={path}', 'sft.data.pack=false', 'sft.steps=5')
  config = train_runs.config_file(tmp_path)
  assert said in failed(*overrides, config=config)
  assert train_runs.run(workdir, *overrides, f'sft.data.{option}=true',
                        f'sft.data.heldout_files={path}', config=config) == 0
  # 5 steps of 8 rows: the 39 that are good, and one of the second epoch.
  assert sum(v.get(f'rows_{fault}', 0) for v in train_runs.logged(workdir).values()) == 1
  evaluations = train_runs.logged(workdir, evaluations=True).values()
  assert {v[f'eval/rows_{fault}'] for v in evaluations} == {1.0}
  texts = [line['text'] for line in metrics.read_lines(workdir / 'warnings.jsonl')]
  assert len(texts) == 1 and f'sft: 1 rows {fault}; the first: ' in texts[0] and said in texts[0]


def test_bad_prompts_are_counted(tmp_path, capsys):
  path = tmp_path / 'rows.jsonl'
  rows = [{'prompt': '1=', 'answer': '1'}, {'prompt': '2='}, {'prompt': 'x' * 9, 'answer': '3'}]
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
  assert train_runs.run(
      tmp_path / 'run', 'phases=rl', 'rl.steps=0', f'rl.data.files={path}',
      'rl.data.skip_bad_rows=true', 'rl.data.skip_long_rows=true', 'rl.grpo.beta=0.0',
      config=train_runs.config_file(tmp_path)) == 0
  said = capsys.readouterr().out
  assert re.search(r"rl: 1 rows bad; the first: .*rows.jsonl:2: field 'answer' is missing", said)
  assert re.search(r'rl: 1 rows long; the first: .*rows.jsonl:3: a prompt of 9 tokens', said)


@pytest.fixture(scope='module')
def done(tmp_path_factory):
  """(workdir, overrides) of a finished run: 3 steps of SFT, then none of RL."""
  workdir = tmp_path_factory.mktemp('done') / 'run'
  overrides = ('sft.steps=3', 'rl.steps=0', 'rl.grpo.beta=0.0')
  assert train_runs.run(workdir, *overrides) == 0
  return workdir, overrides


@pytest.mark.parametrize('change, said', [
    ('phases=sft', "holds a run of phases ('sft', 'rl'), this one has ('sft',)"),
    ('sft.rows=16', 'sft.rows was 8 and is now 16'),
    ('rl.grpo.clip_high=0.3', "rl.grpo.clip_high was '(absent)' and is now 0.3"),
    ('model.embed_dim=32 --allow_config_change', 'ffn/down is float32[2, 32, 16] in the check'),
    ('sft.steps=2', 'has done 3 steps of phase sft, more than sft.steps 2'),
])
def test_a_workdir_of_another_run(done, monkeypatch, capsys, change, said):
  workdir, overrides = done
  before = {p: p.read_bytes() for p in workdir.rglob('*.json*')}
  # The last of an option counts.
  line = train_runs.failed(monkeypatch, capsys, workdir, *overrides, *change.split())
  assert said in line
  assert {p: p.read_bytes() for p in workdir.rglob('*.json*')} == before


def test_what_may_change_on_resume(done, tmp_path, capsys):
  workdir, overrides = done
  more = train_runs.rewound(workdir, 3, tmp_path / 'more')
  assert train_runs.run(more, *overrides, 'sft.steps=5', 'eval.every=1', 'sft.microbatches=2',
                        'mesh.data=2', 'log.every=3') == 0
  assert [step for _, step in train_runs.logged(more)] == [1, 2, 3, 5]
  assert train_runs.steps(more) == [2, 3, 4, 5]
  capsys.readouterr()


def test_a_changed_config_goes_on_when_that_is_allowed(done, tmp_path, capsys):
  workdir, overrides = done
  more = train_runs.rewound(workdir, 2, tmp_path / 'more')
  changed = (*overrides, 'sft.optimizer.learning_rate=0.5', 'arithmetic.demos=12')
  assert train_runs.run(more, *changed, '--allow_config_change') == 0
  rates = [v['learning_rate'] for v in train_runs.logged(more).values()]
  assert rates == [1e-3, 1e-3, 0.5]
  assert 'sft: the data are not those of the saved run' in capsys.readouterr().out
  assert train_runs.run(more, *changed) == 0


def test_steps_of_a_phase_that_is_done_stay(failed, tmp_path):
  overrides = ('phases=sft,pretrain', *train_runs.pretraining(tmp_path), 'pretrain.steps=1')
  assert train_runs.run(tmp_path / 'run', *overrides, 'sft.steps=1') == 0
  said = failed(*overrides, 'sft.steps=2')
  assert 'is in phase pretrain, which began at step 1 and with this config would begin at 2' in said


def test_a_workdir_that_is_a_file(failed, tmp_path):
  (tmp_path / 'run').write_text('')
  assert str(tmp_path / 'run') in failed()
