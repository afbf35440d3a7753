"""Exported adapters on the exported model, by peft and transformers, give our logits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import nn_tiny as tiny
import numpy as np
import pytest

from launch import adapters
from nn import hf, lora, model, param
from nn.config import LoRA, MoE
from nn.hf import peft as ours

pytestmark = pytest.mark.extras
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

DENSE = tiny.config(head=(), qk_norm=True, tied=False)
# A dense layer, whose matrices have the names of experts', then two of experts.
EXPERTS = tiny.config(
    pattern=(('attention', 'moe'),), qk_norm=True, tied=False,
    moe=MoE(experts=4, top_k=2, ffw_dim=8))


def export(folder, params, cfg):
  """The model without adapters as a folder of transformers."""
  family = hf.choose(cfg)
  leaves, tensors = param.flat(lora.base(params)), {}
  for piece in hf.pieces(family, cfg):
    tensor = tensors.setdefault(piece.tensor, np.zeros(piece.layout.theirs, np.float32))
    hf.write(piece, np.asarray(leaves[piece.path])[piece.lead], tensor)
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(hf.public_config(family, cfg)))
  adapters.save(folder / 'weights', {}, tensors)
  (folder / 'weights' / 'adapter_model.safetensors').rename(folder / 'model.safetensors')
  return family


def logits(net, tokens):
  with torch.no_grad():
    return net(torch.tensor(tokens)).logits.float().numpy()


@pytest.mark.parametrize('cfg, settings', [
    (DENSE, LoRA(rank=3, alpha=2.0, rslora=True, targets=('*/mixer/q', '*/ffn/*'))),
    (EXPERTS, LoRA(rank=2, alpha=3.0)),
    (EXPERTS, LoRA(rank=2, alpha=3.0, rslora=True, targets=('*/ffn/up', 'head/0/mixer/o'))),
    (EXPERTS, LoRA(rank=2, alpha=3.0, targets=('blocks/0/ffn/down',))),
])
def test_peft_computes_what_we_do(cfg, settings, tmp_path):
  adapted = dataclasses.replace(cfg, lora=settings)
  params, rows = tiny.params(adapted), tiny.batch(tiny.tokens(2, 9))
  expected = model.unembed(params, adapted, tiny.forward(params, adapted, rows).hidden)
  family = export(tmp_path / 'model', params, cfg)
  adapters.save(tmp_path / 'adapter', *ours.export(params['lora'], adapted, family, 'a model'))

  net = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'model', dtype=torch.float32, attn_implementation='eager')
  plain = logits(net, np.asarray(rows.tokens))
  net = peft.PeftModel.from_pretrained(net, str(tmp_path / 'adapter'))
  found = {name.replace('.default', '') for name, _ in net.named_parameters() if '.lora_' in name}
  _, tensors = ours.export(params['lora'], adapted, family)
  assert found == tensors.keys()
  np.testing.assert_allclose(logits(net, np.asarray(rows.tokens)), expected, atol=2e-4)
  assert np.abs(plain - expected).max() > 0.1


def test_what_peft_cannot_say_is_refused():
  cfg = dataclasses.replace(EXPERTS, lora=LoRA(rank=1))
  adapters_of = model.specs(cfg)['lora']
  values = jax.tree.map(lambda s: jnp.zeros(s.shape), adapters_of)
  family = dataclasses.replace(hf.choose(EXPERTS), fused=())
  with pytest.raises(ValueError, match='blocks/0/ffn/down, .* merge them into the model'):
    ours.export(values, cfg, family)
