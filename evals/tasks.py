"""Evaluation tasks as seqio Tasks and one Mixture, run through seqio's Evaluator.

The only module that imports seqio and TensorFlow; a command imports it when it has work for it.
"""

import collections
import json
import os
from collections.abc import Callable, Mapping, Sequence

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')     # read once, when TensorFlow is imported

import numpy as np  # noqa: E402
import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402
from absl import logging  # noqa: E402

from evals import metrics, rows  # noqa: E402

tf.config.set_visible_devices([], 'GPU')     # it would take the memory that the model needs

SPLIT, MIXTURE = 'test', 'evaluation'
FILLER = -1                                  # behind a response, which seqio wants in one array

Result = tuple[dict[str, float], list[dict]]           # metrics, and a line for every output


class Vocabulary(seqio.PassThroughVocabulary):
  """Ids pass through; only the model's responses are decoded."""

  def __init__(self, decode: Callable[[list[int]], str]):
    super().__init__(size=np.iinfo(np.int32).max)
    self._text = decode

  def decode(self, ids):
    return self._text([int(i) for i in ids if i != FILLER])


class Unchanged(seqio.PassThroughFeatureConverter):
  """The engine pads and batches rows itself."""
  TASK_FEATURES, pack = {}, False


def evaluate(
    examples: Mapping[str, Sequence[rows.Example]],
    codec: rows.Codec,
    answer: Callable[[list[list[int]]], list[list[list[int]]]],
    score: Callable[[list[tuple[list[int], list[int]]]], list[float]],
) -> dict[str, Result]:
  """Runs tasks.

  Args:
    examples: {name in evals.rows.KINDS: what its rows became, each info with the 'row' it is of}.
    codec: decodes responses.
    answer: prompts, of which those without ids are not to be asked -> for each one or more
      responses.
    score: (given, scored) ids -> the log-probability of the scored ones, in nats.
  """
  logging.set_verbosity(logging.ERROR)       # seqio warns that it writes no files of its own

  def predict_fn(dataset):
    found = list(dataset.as_numpy_iterator())
    responses = answer([row['inputs'].tolist() for _, row in found])
    width = max((len(ids) for group in responses for ids in group), default=0)
    padded = np.full((len(found), len(responses[0]), width), FILLER, np.int32)
    for n, group in enumerate(responses):
      for k, ids in enumerate(group):
        padded[n, k, :len(ids)] = ids
    return [(int(index), padded[n]) for n, (index, _) in enumerate(found)]

  def score_fn(dataset):
    found = list(dataset.as_numpy_iterator())
    values = score([(row['inputs'].tolist(), row['targets'].tolist()) for _, row in found])
    return [(int(index), value) for (index, _), value in zip(found, values)]

  try:
    for name, found in examples.items():
      _add(name, found, codec)
    seqio.MixtureRegistry.add(MIXTURE, list(examples), default_rate=1.0)
    evaluator = seqio.Evaluator(
        MIXTURE, Unchanged(), eval_split=SPLIT, seed=None, async_compute_metrics=False)
    future, _ = evaluator.evaluate(
        compute_metrics=True, predict_fn=predict_fn, score_fn=score_fn)
    values = future.result()
  finally:
    seqio.MixtureRegistry.remove(MIXTURE)
    for name in examples:
      seqio.TaskRegistry.remove(name)
  return {name: (found, found.pop('outputs')) for name, found in values.items()}


def _add(name: str, examples: Sequence[rows.Example], codec: rows.Codec) -> None:
  """Registers a Task over examples that are in memory."""
  def elements():
    for example in examples:
      yield {'inputs': np.array(example.inputs, np.int32),
             'targets': np.array(example.targets, np.int32),
             'targets_pretokenized': json.dumps(example.info)}

  ids, text = tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.string)
  signature = {'inputs': ids, 'targets': ids, 'targets_pretokenized': text}

  def dataset(split, shuffle_files):
    del split, shuffle_files
    return tf.data.Dataset.from_generator(elements, output_signature=signature)

  feature = seqio.Feature(Vocabulary(codec.decode), add_eos=False)
  seqio.TaskRegistry.add(
      name, source=seqio.FunctionDataSource(dataset, [SPLIT]),
      output_features={'inputs': feature, 'targets': feature},
      postprocess_fn=_info, metric_fns=[METRICS[name]])


def _info(value, example, is_target):
  del example
  return json.loads(value) if is_target else value


# What seqio calls: targets are infos; the names of the arguments say what the model is to do.
# Each gives numbers, and under 'outputs' the lines.


def _answered(judge: Callable) -> Callable:
  """judge: (infos, outputs) -> [N] of 0 and 1, and further numbers."""

  def metric(targets, predictions):
    infos = [info for info, group in zip(targets, predictions) for _ in group]
    texts = [text for group in predictions for text in group]
    correct, more = judge(infos, texts)
    correct = np.where([info['too_long'] for info in infos], 0.0, correct)
    outputs = [
        {'row': info['row'], 'prompt': info['prompt'], 'output': text, 'target': info['target'],
         'correct': float(x)} for info, text, x in zip(infos, texts, correct)]
    by_row = correct.reshape(len(targets), -1)
    found = {'accuracy': float(correct.mean()), 'rows': len(targets), **more}
    if (num := by_row.shape[1]) > 1:
      found[f'pass@{num}'] = float((by_row > 0).any(axis=1).mean())
    if long := sum(info['too_long'] for info in targets):
      found['too_long'] = long
    return found | {'outputs': outputs}

  return metric


def _same_text(infos, outputs):
  return np.array([metrics.exact_match(i['target'], text) for i, text in zip(infos, outputs)]), {}


def _same_maths(infos, outputs):
  scores, report = metrics.maths([info['target'] for info in infos], outputs)
  return scores, {f'verifier_{name}': report[name] for name in report if report[name]}


def _same_letter(infos, outputs):
  named = (metrics.letter(text, info['choices']) for info, text in zip(infos, outputs))
  return np.array([float(found is not None and metrics.LETTERS[found] == info['target'])
                   for info, found in zip(infos, named)]), {}


def _likeliest(targets, scores):
  groups = collections.defaultdict(list)
  for info, score in zip(targets, scores):
    groups[info['row']].append((info, float(score)))
  outputs = []
  for row, group in groups.items():
    logp = [score for _, score in group]
    raw, normalised = metrics.likeliest(logp, [info['tokens'] for info, _ in group])
    target = group[0][0]['target']
    outputs.append({
        'row': row, 'prompt': group[0][0]['prompt'], 'output': raw, 'output_normalised': normalised,
        'target': target, 'correct': float(raw == target),
        'correct_normalised': float(normalised == target),
        'choices': [info['choice'] for info, _ in group], 'logp': logp})
  mean = lambda name: float(np.mean([x[name] for x in outputs]))
  return {'accuracy': mean('correct'), 'accuracy_normalised': mean('correct_normalised'),
          'rows': len(outputs), 'outputs': outputs}


def _perplexity(targets, scores):
  sums = collections.defaultdict(lambda: np.zeros(3))
  for info, score in zip(targets, scores):
    sums[info['row']] += float(score), info['tokens'], info['bytes']
  number = lambda x: {
      'perplexity': metrics.perplexity(x[0], x[1]),
      'bits_per_byte': metrics.bits_per_byte(x[0], x[2]), 'tokens': int(x[1]), 'bytes': int(x[2])}
  outputs = [{'row': row, 'logp': x[0], **number(x)} for row, x in sums.items()]
  return number(sum(sums.values())) | {'rows': len(sums), 'outputs': outputs}


METRICS = {
    'gsm8k': _answered(_same_maths),
    'math': _answered(_same_maths),
    'exact': _answered(_same_text),
    'choice': _likeliest,
    'choice_letter': _answered(_same_letter),
    'perplexity': _perplexity,
}
