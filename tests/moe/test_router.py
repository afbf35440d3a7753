"""Scores, choice, gates, losses and balancing, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import router
from nn.config import MoE
from tests.moe import moe_tiny as tiny


def log(*shares):
  return jnp.log(jnp.array([shares], jnp.float32))


def test_softmax_gates_by_hand():
  choice = router.route(
      log(0.1, 0.4, 0.2, 0.3), None, MoE(experts=4, top_k=2, ffw_dim=1, scale=2.0))
  np.testing.assert_array_equal(choice.experts, [[1, 3]])
  np.testing.assert_allclose(choice.gates, [[2 * 4 / 7, 2 * 3 / 7]], rtol=1e-6)
  choice = router.route(
      log(0.1, 0.4, 0.2, 0.3), None, MoE(experts=4, top_k=2, ffw_dim=1, renormalise=False))
  np.testing.assert_allclose(choice.gates, [[0.4, 0.3]], rtol=1e-6)
  np.testing.assert_allclose(choice.normaliser, [0], atol=1e-6)


def test_sigmoid_gates_by_hand():
  logits = -jnp.log(1 / jnp.array([[0.2, 0.9, 0.6, 0.3]]) - 1)
  choice = router.route(
      logits, None, MoE(experts=4, top_k=2, ffw_dim=1, scores='sigmoid', scale=2.5))
  np.testing.assert_array_equal(choice.experts, [[1, 2]])
  np.testing.assert_allclose(choice.gates, [[2.5 * 0.9 / 1.5, 2.5 * 0.6 / 1.5]], rtol=1e-6)
  np.testing.assert_allclose(choice.shares, [[0.1, 0.45, 0.3, 0.15]], rtol=1e-6)


def test_the_bias_decides_the_choice_and_is_in_no_gate():
  cfg = MoE(experts=4, top_k=2, ffw_dim=1, bias_rate=0.1)
  choice = router.route(log(0.1, 0.4, 0.2, 0.3), jnp.array([0.35, 0.0, 0.0, 0.0]), cfg)
  np.testing.assert_array_equal(choice.experts, [[0, 1]])
  np.testing.assert_allclose(choice.gates, [[0.2, 0.8]], rtol=1e-6)


def test_only_the_best_groups_are_chosen_from():
  # Groups (0, 1), (2, 3), (4, 5): the best expert of all is in the worst group.
  scores = jnp.array([[0.3, 0.3, 0.2, 0.35, 0.5, 0.0]])
  choose = lambda top_groups, top_k: router.choose(
      scores, MoE(experts=6, top_k=top_k, ffw_dim=1, groups=3, top_groups=top_groups))
  np.testing.assert_array_equal(choose(1, 2), [[0, 1]])
  np.testing.assert_array_equal(choose(2, 3), [[3, 0, 1]])
  np.testing.assert_array_equal(choose(3, 1), [[4]])
  # Below zero, as with biases, what is left out stays out.
  np.testing.assert_array_equal(
      router.choose(scores - 9, MoE(experts=6, top_k=2, ffw_dim=1, groups=3)), [[0, 1]])


def test_replay_takes_given_experts_with_the_gates_of_today():
  cfg = MoE(experts=4, top_k=2, ffw_dim=1)
  logits = jnp.concatenate([log(0.1, 0.4, 0.2, 0.3)] * 2)
  choice = router.route(logits, None, cfg, jnp.array([[2, 0], [-1, -1]]))
  np.testing.assert_array_equal(choice.experts, [[2, 0], [1, 3]])
  np.testing.assert_allclose(choice.gates[0], [2 / 3, 1 / 3], rtol=1e-6)


def statistics(shares, real, cfg):
  return router.statistics(
      router.route(jnp.log(jnp.array(shares, jnp.float32)), None, cfg), jnp.array(real))


def test_losses_by_hand():
  cfg = MoE(experts=2, top_k=1, ffw_dim=1, balance_loss=0.5, z_loss=2.0)
  even = router.losses(statistics([[0.8, 0.2], [0.2, 0.8]], [True, True], cfg), cfg)
  np.testing.assert_allclose(even['balance'], 0.5, rtol=1e-6)
  # Three of four tokens choose expert 0, whose mean share is 0.7: 2 (3/4 0.7 + 1/4 0.3) = 1.2.
  shares = [[0.8, 0.2], [0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]
  uneven = router.losses(statistics(shares, [True] * 4, cfg), cfg)
  np.testing.assert_allclose(uneven['balance'], 0.5 * 1.2, rtol=1e-6)
  np.testing.assert_allclose(uneven['router_z'], 0, atol=1e-6)
  # Logits moved by 3 have a log-normaliser of 3.
  moved = router.losses(router.statistics(
      router.route(jnp.log(jnp.array(shares)) + 3, None, cfg), jnp.ones(4, bool)), cfg)
  np.testing.assert_allclose(moved['router_z'], 2 * 9, rtol=1e-6)


def test_padding_counts_nowhere():
  cfg = MoE(experts=2, top_k=1, ffw_dim=1)
  all_real = statistics([[0.8, 0.2], [0.3, 0.7]], [True, True], cfg)
  padded = statistics([[0.8, 0.2], [0.9, 0.1], [0.3, 0.7]], [True, False, True], cfg)
  jax.tree.map(np.testing.assert_array_equal, padded, all_real)


def test_the_bias_moves_against_the_load():
  bias = router.update_bias(
      jnp.array([[0.0, 0.5, 1.0], [0.0, 0.0, 0.0]]), jnp.array([[9, 3, 0], [4, 4, 4]]), 0.1)
  np.testing.assert_allclose(bias, [[-0.1, 0.6, 1.1], [0, 0, 0]], rtol=1e-6)


def test_violation_by_hand():
  metrics = router.load_metrics(jnp.array([[6, 2, 0, 0], [1, 1, 1, 1]]))
  np.testing.assert_allclose(metrics['violation'], [2, 0], atol=1e-6)
  np.testing.assert_allclose(metrics['idle'], [0.5, 0])


@pytest.mark.parametrize('changes, match', [
    (dict(top_k=9), 'top_k 9 is more than the 8 experts a token can reach'),
    (dict(groups=4, top_k=3), 'top_k 3 is more than the 2 experts'),
    (dict(groups=3), 'experts 8 is not a multiple of model.moe.groups 3'),
    (dict(top_groups=2), 'top_groups 2 is more than model.moe.groups 1'),
    (dict(experts=0), 'experts is 0, wanted at least 1'),
    (dict(scores='tanh'), "scores is 'tanh', wanted softmax or sigmoid"),
    (dict(dispatch='dense'), "dispatch is 'dense', wanted auto or global"),
    (dict(shared_gate=True), 'nothing to gate'),
    (dict(z_loss=-1.0), 'z_loss is -1.0, wanted at least 0'),
])
def test_settings_that_cannot_be_meant_are_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    MoE(**changes)


def test_settings_of_experts_that_no_layer_has_are_refused():
  with pytest.raises(
      ValueError,
      match=r"model.moe is set, but no layer has the FFN moe; the layers have \['mlp'\]"):
    tiny.config(MoE(experts=4), ffn='mlp')
