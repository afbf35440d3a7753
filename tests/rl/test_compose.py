"""Composition: its algebra, what `ready` drops, orders and refuses; nothing depends on hashes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rl_toy
from nn.types import ENTROPY, LOGP, topk
from rl import pieces
from rl.compose import compose, ready, requests, wants
from rl.types import (OLD, POLICY, REFERENCE, SAMPLER, SLOTS, Context, Generate, Method, Score,
                      Source, Stage, Term, label)
from rl_toy import strict_ranks  # noqa: F401

same = lambda record: record
nothing = lambda view: (view.mask, {})


def stage(name, slot='add', **fields):
  return Method(stages=(Stage(name, slot, same, **fields),))


def term(name, *needs, **fields):
  return Method(terms=(Term(name, nothing, needs, **fields),))


A = compose(Method(state={'a': {'n': 1}}), stage('estimator', 'estimate'), term('one', LOGP, OLD))
B = compose(Method(state={'b': {}}), stage('shaper'), term('two', LOGP))
C = compose(stage('late', 'after'), stage('early', 'prompts'), term('three', ENTROPY))


def test_composition_is_associative_with_a_neutral_element():
  assert compose(compose(A, B), C) == compose(A, compose(B, C)) == compose(A, B, C)
  assert compose(Method(), A) == compose(A, Method()) == compose(A) == A
  assert compose() == Method()


def test_composition_keeps_the_order_of_its_parts():
  both = compose(A, B)
  assert [s.name for s in both.stages] == ['estimator', 'shaper']
  assert [t.name for t in both.terms] == ['one', 'two']
  assert both.state == {'a': {'n': 1}, 'b': {}}
  assert A.state == {'a': {'n': 1}}


def test_stages_run_in_the_order_of_the_slots_and_within_one_as_listed():
  others = [slot for slot in reversed(SLOTS) if slot != 'estimate']
  some = [stage(f'{slot} {i}', slot) for i in (2, 1) for slot in others]
  method = ready(compose(*some, stage('estimator', 'estimate')))
  names = [s.name for s in method.stages]
  expected = [n for slot in SLOTS
              for n in (['estimator'] if slot == 'estimate' else [f'{slot} 2', f'{slot} 1'])]
  assert names == expected


def test_being_ready_changes_no_method_that_is():
  once = ready(compose(A, B, C))
  assert ready(once) == once


TEACHER = Score(Source('teacher'), LOGP)


def test_a_coefficient_of_0_drops_the_term_its_passes_and_the_stages_that_only_weigh_it():
  average = Score(Source('average', 0.1), LOGP)
  shaped = compose(A, term('told', LOGP, TEACHER, coef=0.0),
                   stage('tell', 'weight', needs=(average,), on=('told',)),
                   stage('both', 'weight', on=('told', 'one')))
  method = ready(shaped)
  assert [t.name for t in method.terms] == ['one']
  assert [s.name for s in method.stages] == ['estimator', 'both']
  assert requests(method) == (OLD,)
  switched_on = tuple(dataclasses.replace(t, coef=1.0) for t in shaped.terms)
  kept = dataclasses.replace(shaped, terms=switched_on)
  assert set(requests(ready(kept))) == {OLD, TEACHER, average}


def test_an_integer_0_drops_too_but_a_schedule_never_does():
  assert not ready(term('a', LOGP, coef=0)).terms
  assert ready(term('a', LOGP, coef=lambda record: 0.0)).terms


def test_a_term_of_coefficient_0_may_stand_beside_its_replacement():
  method = ready(compose(pieces.kl(coef=0.0), pieces.kl('k2', coef=0.1)))
  assert [t.coef for t in method.terms] == [0.1]


def context(name, build=same, needs=()):
  return Context(name, build, needs)


REFLECT = Generate(POLICY, context('ask'), 8)

REFUSED = {
    'state named': (Method(state={'x': {}}), Method(state={'x': {}})),
    'known slot': (stage('x', 'rewards'),),
    "unknown terms \\['polcy'\\]": (A, stage('x', 'ratio', on=('polcy',))),
    'two stages of one name': (A, stage('x'), stage('x')),
    'two terms of one name': (term('x', LOGP), term('x', ENTROPY)),
    'must come after': (term('x', LOGP, after=('y',)), term('y', LOGP)),
    "must come after \\['gone'\\]": (
        term('gone', LOGP, coef=0.0), term('x', LOGP, after=('gone',))),
    'one advantage estimator wanted, got \\[\\]': (stage('x', 'multiply'),),
    'one advantage estimator wanted, got \\[.estimator., .x.\\]': (A, stage('x', 'estimate')),
    'after the update': (stage('x', 'after', needs=(OLD,)),),
    'two different requests are called': (
        stage('x', 'rows', needs=(Score(POLICY, LOGP, context('told', same)),)),
        stage('y', 'rows', needs=(Score(POLICY, LOGP, context('told', nothing)),))),
    "twice: \\['tis', 'icepop'\\]": (
        pieces.centred_advantage(), pieces.policy(), pieces.tis(), pieces.icepop()),
    "twice: \\['tis', 'sampler as old policy'\\]": (
        pieces.centred_advantage(), pieces.policy(old='sampler'), pieces.tis()),
}


@pytest.mark.parametrize('message', REFUSED)
def test_what_makes_no_sense_is_refused(message):
  with pytest.raises(ValueError, match=message):
    ready(compose(*REFUSED[message]))


@pytest.mark.parametrize('methods', [
    (A, B, C),
    (A, stage('x', 'add'), stage('y', 'clip')),        # one estimator, shapers
    (term('x', LOGP),),                                # none, and no shaper
    (term('y', LOGP), term('x', LOGP, after=('y',))),
    (stage('x', 'after'),),
    (pieces.centred_advantage(), pieces.policy(), pieces.tis(), pieces.geometric()),
    (pieces.centred_advantage(), pieces.policy(), pieces.kl(),
     pieces.tis(), pieces.icepop(on=('kl',))),
    (pieces.centred_advantage(), pieces.policy(old='sampler'), pieces.kl(), pieces.tis(on=('kl',))),
    (stage('x', 'rows', needs=(REFLECT,)), stage('y', 'rows', needs=(REFLECT,))),
])
def test_what_makes_sense_is_not_refused(methods):
  ready(compose(*methods))


def test_requests_are_listed_once_and_after_what_they_need():
  told = Score(POLICY, LOGP, context('tell', needs=(REFLECT,)))
  second = Score(Source('teacher'), topk(2), needs=(told,))
  method = compose(stage('x', needs=(second, OLD)), term('a', LOGP, OLD, told, REFERENCE))
  assert requests(method) == (REFLECT, told, second, OLD, REFERENCE)


def test_wants_of_all_terms_are_sorted_and_once():
  method = compose(term('a', topk(3), LOGP), term('b', ENTROPY, topk(2), LOGP, OLD))
  assert wants(method.terms) == (ENTROPY, LOGP, topk(2), topk(3))


def test_labels_tell_requests_apart():
  several = [OLD, SAMPLER, REFERENCE, REFLECT, Score(POLICY, ENTROPY), Score(POLICY, topk(2)),
             Score(POLICY, topk(3)), Score(POLICY, LOGP, context('ask')),
             Score(Source('average', 0.1), LOGP), Score(Source('average', 0.2), LOGP),
             Generate(POLICY, context('ask'), 9), Generate(POLICY, context('tell'), 8)]
  assert len({label(r) for r in several}) == len(several)


def test_a_minimal_method_learns_through_a_plain_driver():
  method = ready(compose(A, pieces.kl(coef=0.5)))
  rec = rl_toy.passes(rl_toy.record({}, [0]), old=rl_toy.policy(0), reference=rl_toy.policy(1))
  method = dataclasses.replace(method, terms=method.terms[1:])
  assert np.abs(rl_toy.gradient(method, rec, rl_toy.policy(0))[0]).max() > 0


PROGRAM = """
import jax, numpy as np
import rl_toy
from rl import compose, methods
from rl.types import label
method = methods.build(('dapo', 'kl', 'entropy', 'icepop', 'geometric'), {}, max_tokens=9)
print([s.name for s in method.stages], [t.name for t in method.terms])
print([label(r) for r in compose.requests(method)], compose.wants(method.terms))
p = rl_toy.policy(0)
rec = rl_toy.run(method, rl_toy.passes(rl_toy.record({'task': [0, 1]}, [0, 0]), old=p))
step = rl_toy.batch(method, rec)
print(jax.jit(jax.grad(lambda p: rl_toy.loss(method.terms, p, step)[0])).lower(p).as_text())
"""


def test_nothing_depends_on_the_order_of_hashes():
  here = Path(__file__).resolve().parent
  printed = set()
  for seed in ('1', '2'):
    path = os.pathsep.join([str(here.parent.parent), str(here)])
    env = os.environ | {'PYTHONHASHSEED': seed, 'PYTHONPATH': path}
    done = subprocess.run([sys.executable, '-c', PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed.add(done.stdout)
  assert len(printed) == 1 and 'module' in printed.pop()
