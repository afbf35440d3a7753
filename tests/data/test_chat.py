"""Chat templates: the mask covers what the assistant said and nothing else, worked out by hand."""

import pytest

from data import chat, tokenizer
from data_samples import byte_level

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")

BLOCKS = (
    "{% for message in messages %}\n<{{ message.role }}>\n"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }};{% endgeneration %}\n"
    "{% else %}{{ message.content }};{% endif %}\n{% endfor %}")

TALK = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': '1+1?'},
    {'role': 'assistant', 'content': '2'},
    {'role': 'user', 'content': 'Sure?'},
    {'role': 'assistant', 'content': 'Yes.'}]


class Marked(tokenizer.Bytes):
  """Bytes, with single ids from 300 on for the special texts of a template."""
  vocab_size = 400

  def __init__(self, template, eos, *others):
    super().__init__(template)
    self.eos_id, self.bos_id = 300, 301
    self._marks = {eos: 300} | {text: 302 + i for i, text in enumerate(others)}
    self.specials = {'eos_token': eos, 'bos_token': '<|begin|>'}
    self._marks['<|begin|>'] = 301

  def encode(self, text):
    ids = []
    while text:
      mark = next((m for m in self._marks if text.startswith(m)), None)
      ids += [self._marks[mark]] if mark else super().encode(text[0])
      text = text[len(mark or text[0]):]
    return ids

  encode_after = encode

  def spell(self, ids):
    """Ids as text, special ones included."""
    names = {i: m for m, i in self._marks.items()}
    return ''.join(names.get(i) or self.decode([i]) for i in ids)


def said(made, ids, mask):
  """The texts of the runs of ids under the mask."""
  runs, now = [], []
  for i, m in zip([*ids, 0], [*mask, 0]):
    if m:
      now.append(i)
    elif now:
      runs.append(made.spell(now))
      now = []
  return runs


def test_chatml_by_hand():
  made = Marked(CHATML, '<|im_end|>', '<|im_start|>')
  ids, mask = chat.encode(made, TALK)
  assert made.spell(ids) == (
      '<|im_start|>system\nBe brief.<|im_end|>\n'
      '<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n'
      '<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n')
  assert said(made, ids, mask) == ['2<|im_end|>', 'Yes.<|im_end|>']
  assert sum(mask) == 2 + 5 and set(mask) == {0, 1}


def test_llama3_by_hand():
  made = Marked(LLAMA3, '<|eot_id|>', '<|start_header_id|>', '<|end_header_id|>')
  ids, mask = chat.encode(made, TALK[1:])
  assert made.spell(ids) == (
      '<|begin|><|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>'
      '<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>'
      '<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>'
      '<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>')
  assert ids[0] == made.bos_id
  assert said(made, ids, mask) == ['2<|eot_id|>', 'Yes.<|eot_id|>']


def test_generation_blocks_say_what_is_trained_on():
  made = Marked(BLOCKS, '<|eot_id|>')
  ids, mask = chat.encode(made, TALK)
  assert made.spell(ids) == (
      '<system>\nBe brief.;<user>\n1+1?;<assistant>\n2;<user>\nSure?;<assistant>\nYes.;')
  assert said(made, ids, mask) == ['2;', 'Yes.;']


def test_a_generation_block_is_taken_to_its_end():
  made = Marked("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
                "{{ m.content + eos_token + ' ok' }}{% endgeneration %}"
                "{% else %}{{ m.content }}{% endif %}{% endfor %}", '<|eot_id|>')
  ids, mask = chat.encode(made, TALK)
  assert said(made, ids, mask) == ['2<|eot_id|> ok', 'Yes.<|eot_id|> ok']


def test_a_template_without_an_end_token_trains_on_all_it_adds():
  made = tokenizer.Bytes("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                         "{% if add_generation_prompt %}assistant: {% endif %}")
  ids, mask = chat.encode(made, TALK[1:3])
  assert made.decode(ids) == 'user: 1+1?\nassistant: 2\n'
  assert mask == [0] * len('user: 1+1?\nassistant: ') + [1, 1]


def test_bytes_end_an_answer_with_their_end_id():
  made = tokenizer.load('bytes')
  ids, mask = chat.encode(made, TALK[1:3])
  assert [i for i, m in zip(ids, mask) if m] == [ord('2') + 3, made.eos_id]
  text, asked = chat.prompt(made, TALK[1:2])
  assert text == 'user: 1+1?\nassistant: '
  assert ids[:len(asked)] == asked == made.encode(text)


def test_the_prompt_is_what_stands_before_the_answer():
  made = Marked(CHATML, '<|im_end|>', '<|im_start|>')
  ids, mask = chat.encode(made, TALK)
  for turns in (2, 4):
    _, asked = chat.prompt(made, TALK[:turns])
    assert ids[:len(asked)] == asked
    assert mask[len(asked) - 1:len(asked) + 1] == [0, 1]


@pytest.mark.parametrize('template, eos', [(CHATML, '<|im_end|>'), (BLOCKS, '<|im_end|>')])
def test_ids_of_a_message_pass_through_untouched(template, eos):
  made = Marked(template, eos, '<|im_start|>')
  odd = [399, 68, 2, 399]                                # no text has these ids
  talk = [TALK[1], {'role': 'assistant', 'tokens': odd}, TALK[3], TALK[4]]
  ids, mask = chat.encode(made, talk)
  at = ids.index(399)
  assert ids[at:at + 4] == odd and mask[at:at + 4] == [1] * 4
  assert chat.render(made, talk[:2], False).count('A') == 1


def test_an_end_among_the_sampled_ids_is_not_doubled():
  made = Marked(CHATML, '<|im_end|>', '<|im_start|>')
  open_ended = chat.encode(made, [TALK[1], {'role': 'assistant', 'tokens': [68]}])
  ended = chat.encode(made, [TALK[1], {'role': 'assistant', 'tokens': [68, made.eos_id]}])
  assert open_ended == ended
  plain = tokenizer.load('bytes')
  assert (chat.encode(plain, [TALK[1], {'role': 'assistant', 'tokens': [68, 1]}])
          == chat.encode(plain, [TALK[1], {'role': 'assistant', 'content': 'A'}]))


def test_a_trained_byte_level_tokenizer_agrees_with_encoding_the_whole_text(tmp_path):
  config = {'eos_token': '<|im_end|>', 'chat_template': CHATML}
  made = tokenizer.load(str(byte_level(tmp_path / 'bpe', config)))
  ids, mask = chat.encode(made, TALK)
  assert ids == made.encode(chat.render(made, TALK, False))
  assert made.decode([i for i, m in zip(ids, mask) if m]) == '2Yes.'


def test_a_template_that_rewrites_earlier_turns_is_refused():
  forgetful = ("{% for m in messages %}{{ m.role }}:{% if loop.last or m.role == 'user' %}"
               "{{ m.content }}{% endif %};{% endfor %}"
               "{% if add_generation_prompt %}assistant:{% endif %}")
  made = tokenizer.Bytes(forgetful)
  chat.encode(made, TALK[1:3])
  with pytest.raises(
      ValueError, match='message 2: .* writes the text up to this answer differently'):
    chat.encode(made, TALK)


@pytest.mark.parametrize('messages, complaint', [
    ([{'role': 'user', 'content': 'a'}], 'no message of the assistant'),
    ([{'role': 'user'}, {'role': 'assistant', 'content': 'a'}], "message 0: 'content' is NoneType"),
    ([{'content': 'a'}], "message 0: wanted an object with a 'role'"),
    (['hello'], "message 0: wanted an object with a 'role'"),
    ('hello', 'messages are str'),
    ([{'role': 'user', 'content': 'a\ufdd1'}], 'noncharacters'),
])
def test_malformed_messages_are_named(messages, complaint):
  with pytest.raises(ValueError, match=complaint):
    chat.encode(tokenizer.load('bytes'), messages)


@pytest.mark.parametrize('template, complaint', [
    ("{{ raise_exception('roles must alternate') }}", 'roles must alternate'),
    ("{{ ''.__class__.__mro__ }}", 'the chat template fails'),
    ("{% for m in messages %}\n{{ m.content }}\n{% endif %}", 'does not parse, line 3'),
    ('{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}', 'nested'),
    ('', 'no chat template'),
])
def test_templates_run_in_a_sandbox_and_their_errors_are_said(template, complaint):
  made = tokenizer.Bytes(template)
  made.chat_template = template
  with pytest.raises(ValueError, match=complaint):
    chat.encode(made, TALK)


def test_templates_find_what_hugging_face_offers():
  made = tokenizer.Bytes("{{ {'b': 'é', 'a': 1} | tojson }} {{ strftime_now('%d %b %Y') }}"
                         "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
                         "{{ m.content }}{% endfor %}{{ tools[0].name }}")
  text = chat.render(made, TALK[1:3], False, tools=[{'name': 'sum'}])
  assert text == '{"b": "é", "a": 1} 26 Jul 20242sum'
