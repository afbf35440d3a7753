"""Templates of several families over a real tokenizer.json: ids and masks, segment by segment.

A case is written down as what the model reads, cut where the mask changes; what is trained on is in
brackets of its own. Each segment is encoded apart and the ids are joined.
"""

import json

import numpy as np
import pytest

from data import chat, fields, prompts, sft, sources, tokenizer
from data_samples import byte_level

# Qwen 2.5: ChatML, with a system prompt of its own where a conversation has none.
QWEN = """\
{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\nYou are a helpful cat.<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# Llama 3: headers, a text that begins once, no line end behind a turn.
LLAMA = """\
{{- bos_token -}}
{%- for m in messages -%}
  {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' -}}
  {{- (m.content | trim) + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

# Gemma: the assistant is called model, what the system says stands before the first question, and a
# turn ends with another token than a text.
GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
  {%- set first, rest = messages[0].content + '\\n\\n', messages[1:] -%}
{%- else -%}
  {%- set first, rest = '', messages -%}
{%- endif -%}
{%- for m in rest -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('turns must alternate') -}}
  {%- endif -%}
  {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' -}}
  {{- (first if loop.first else '') + (m.content | trim) + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

# A system prompt by default, and blocks that say what is trained on: here without the turn's end.
BLOCKS = """\
{%- set own = messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' + (messages[0].content if own else 'the cat sat') + '<|im_end|>\\n' -}}
{%- for m in (messages[1:] if own else messages) -%}
  {{- '<|im_start|>' + m.role + '\\n' -}}
  {%- if m.role == 'assistant' -%}
    {%- generation -%}{{- m.content -}}{%- endgeneration -%}
  {%- else -%}
    {{- m.content -}}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

CHATML_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
FAMILIES = {
    'qwen': (QWEN, CHATML_TOKENS, {'eos_token': '<|im_end|>'}, None),
    'llama': (LLAMA,
              ('<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'),
              {'eos_token': '<|eot_id|>', 'bos_token': '<|begin_of_text|>'}, None),
    'gemma': (GEMMA, ('<pad>', '<eos>', '<bos>', '<start_of_turn>', '<end_of_turn>'),
              {'eos_token': '<eos>', 'bos_token': '<bos>'}, [1, 4]),
    'blocks': (BLOCKS, CHATML_TOKENS, {'eos_token': '<|im_end|>'}, [2, 0]),
}

SYSTEM = {'role': 'system', 'content': 'on a mat'}
TALK = [
    {'role': 'user', 'content': 'number seven?'}, {'role': 'assistant', 'content': 'hello world'},
    {'role': 'user', 'content': ' and then '}, {'role': 'assistant', 'content': 'ran off. 7'}]

# [text] is trained on.
CASES = {
    ('qwen', 'plain'): (TALK, [
        '<|im_start|>system\nYou are a helpful cat.<|im_end|>\n'
        '<|im_start|>user\nnumber seven?<|im_end|>\n<|im_start|>assistant\n',
        ['hello world<|im_end|>'],
        '\n', '<|im_start|>user\n and then <|im_end|>\n<|im_start|>assistant\n',
        ['ran off. 7<|im_end|>'], '\n']),
    ('qwen', 'system'): ([SYSTEM, *TALK[:2]], [
        '<|im_start|>system\non a mat<|im_end|>\n'
        '<|im_start|>user\nnumber seven?<|im_end|>\n<|im_start|>assistant\n',
        ['hello world<|im_end|>'], '\n']),
    ('llama', 'system'): ([SYSTEM, *TALK], [
        '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\non a mat<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nnumber seven?<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n',
        ['hello world<|eot_id|>'],
        '<|start_header_id|>user<|end_header_id|>\n\nand then<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n',
        ['ran off. 7<|eot_id|>']]),
    ('gemma', 'plain'): (TALK, [
        '<bos><start_of_turn>user\nnumber seven?<end_of_turn>\n<start_of_turn>model\n',
        ['hello world<end_of_turn>'],
        '\n', '<start_of_turn>user\nand then<end_of_turn>\n<start_of_turn>model\n',
        ['ran off. 7<end_of_turn>'], '\n']),
    ('gemma', 'system'): ([SYSTEM, *TALK[:2]], [
        '<bos><start_of_turn>user\non a mat\n\nnumber seven?<end_of_turn>\n<start_of_turn>model\n',
        ['hello world<end_of_turn>'], '\n']),
    ('blocks', 'plain'): (TALK, [
        '<|im_start|>system\nthe cat sat<|im_end|>\n'
        '<|im_start|>user\nnumber seven?<|im_end|>\n<|im_start|>assistant\n',
        ['hello world'],
        '<|im_end|>\n<|im_start|>user\n and then <|im_end|>\n<|im_start|>assistant\n',
        ['ran off. 7'], '<|im_end|>\n']),
    ('blocks', 'system'): ([SYSTEM, *TALK[:2]], [
        '<|im_start|>system\non a mat<|im_end|>\n'
        '<|im_start|>user\nnumber seven?<|im_end|>\n<|im_start|>assistant\n',
        ['hello world'], '<|im_end|>\n']),
}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """{family: tokenizer}, each from a folder as its family's are."""
  found = {}
  for name, (template, specials, config, ends) in FAMILIES.items():
    folder = byte_level(tmp_path_factory.mktemp(name) / 'a', config | {'chat_template': template},
                        specials)
    if ends is not None:
      (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': ends}))
    found[name] = tokenizer.load(str(folder / 'tokenizer.json'))
  return found


def by_hand(tokens, segments):
  """Ids and mask of a case."""
  ids, mask = [], []
  for segment in segments:
    (text,) = segment if isinstance(segment, list) else (segment,)
    new = tokens.encode(text)
    ids += new
    mask += [int(isinstance(segment, list))] * len(new)
  return ids, mask


@pytest.mark.parametrize('family, kind', CASES)
def test_ids_and_mask_by_hand(made, family, kind):
  talk, segments = CASES[family, kind]
  ids, mask = chat.encode(made[family], talk)
  assert (ids, mask) == by_hand(made[family], segments)
  said = [m['content'] for m in talk if m['role'] == 'assistant']
  assert made[family].decode([i for i, m in zip(ids, mask) if m]) == ''.join(said)


@pytest.mark.parametrize('family', FAMILIES)
def test_the_special_tokens_are_single_ids(made, family):
  tokens, (_, specials, _, _) = made[family], FAMILIES[family]
  assert [tokens.encode(text) for text in specials] == [[i] for i in range(len(specials))]


def test_what_ends_a_response_comes_from_both_files(made):
  assert made['qwen'].end_ids == (2,) and made['llama'].end_ids == (3,)
  assert made['gemma'].end_ids == (1, 4) and made['blocks'].end_ids == (2, 0)


@pytest.mark.parametrize('family', FAMILIES)
def test_sampled_ids_are_never_encoded_again(made, family):
  """Ids that no text is encoded to: a word in single letters, its end as sampled or cut off."""
  tokens = made[family]
  letters = [i for c in 'hello world' for i in tokens.encode(c)]
  assert tokens.encode('hello world') != letters and tokens.decode(letters) == 'hello world'
  end = tokens.end_ids[-1] if family == 'gemma' else tokens.eos_id
  for sampled in (letters + [end], letters):
    _, asked = chat.prompt(tokens, TALK[:1])
    talk = [TALK[0], {'role': 'assistant', 'tokens': sampled}]
    _, asked_next = chat.prompt(tokens, [*talk, TALK[2]])
    assert asked_next[:len(asked) + len(letters)] == asked + letters
    # What follows is what would follow the same answer as text.
    _, as_text = chat.prompt(tokens, TALK[:3])
    tail = len(as_text) - len(asked) - len(tokens.encode('hello world'))
    assert asked_next[len(asked) + len(letters):] == as_text[-tail:]
    ids, mask = chat.encode(tokens, [*talk, *TALK[2:]])
    assert ids[:len(asked_next)] == asked_next
    first = [i for i, m in zip(ids, mask) if m][:len(letters)]
    assert first == letters and sum(mask[:len(asked)]) == 0


@pytest.mark.parametrize('family', FAMILIES)
def test_ids_flow_through_rows_of_prompts_and_of_examples(made, family):
  tokens = made[family]
  letters = [i for c in 'hello world' for i in tokens.encode(c)]
  talk = [TALK[0], {'role': 'assistant', 'tokens': letters}, *TALK[2:]]
  rows, form = sources.Listed([{'messages': talk}], 'rows'), fields.Format(kind='chat')
  asked = prompts.Prompts(rows, tokens, form=form, max_prompt=99, seed=0).row(0)['tokens']
  assert asked == tuple(chat.prompt(tokens, talk[:3])[1])
  example = sft.Examples(rows, form, tokens, length=99).example(0, 0)
  at = len(chat.prompt(tokens, talk[:1])[1])
  np.testing.assert_array_equal(example['tokens'][at:at + len(letters)], letters)
  np.testing.assert_array_equal(example['mask'][:at + len(letters)], [0] * at + [1] * len(letters))
  assert tuple(example['tokens'][:len(asked)]) == asked and example['mask'][len(asked)] == 1


@pytest.mark.parametrize('ids, said', [
    ([], 'wanted a list of token ids'), ('7', 'wanted a list of token ids'),
    ([400], 'ids from 400 to 400, the vocabulary has'), ([-1, 3], 'ids from -1 to 3')])
def test_ids_of_a_row_that_are_none_are_refused(made, ids, said):
  row = {'messages': [TALK[0], {'role': 'assistant', 'tokens': ids}]}
  with pytest.raises(ValueError, match=said):
    fields.example(row, fields.Format(kind='chat'), made['qwen'])


@pytest.mark.parametrize('content, said', [
    ('{', 'generation_config.json is not JSON'),
    ('{"eos_token_id": [400]}', r'eos_token_id \[400\]'),
    ('{"eos_token_id": ["a"]}', r"eos_token_id \['a'\]")])
def test_a_wrong_generation_config_is_named(tmp_path, content, said):
  folder = byte_level(tmp_path / 'a')
  (folder / 'generation_config.json').write_text(content)
  with pytest.raises(ValueError, match=said):
    tokenizer.load(str(folder))
  (folder / 'generation_config.json').write_text('{"eos_token_id": null}')
  assert tokenizer.load(str(folder)).end_ids == (0,)


def test_turns_that_do_not_alternate_are_refused_by_the_template(made):
  with pytest.raises(ValueError, match='turns must alternate'):
    chat.encode(made['gemma'], [TALK[0], TALK[2], TALK[1]])
